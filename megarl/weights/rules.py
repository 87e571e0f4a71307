"""Weight rules: how one megatron-core tensor is made of Hugging Face tensors. Values, not code: they know no process
group.

A rule lists the *runs* of rows of HF tensors that, laid end to end, are the rows of the megatron tensor as its
torch_dist checkpoint has it (no tensor parallelism, no vocabulary padding, each expert by itself). Reading and writing
both follow the same runs, so there is no second direction to drift. Names are megatron's torch_dist keys as
Transformer Engine's layers have them; ``{i}`` is the layer, ``{e}`` the expert, ``{k}`` the multi-token-prediction
layer.

Layouts: Megatron-LM, ``megatron/core/transformer/attention.py`` (query groups interleaved) and ``mlp.py`` (gate over
up).
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar


class Shard(enum.Enum):
    """Which dimension tensor parallelism cuts; for an expert's tensor, expert tensor parallelism."""

    REPLICATED = "replicated"
    COLUMN = "column"  # dim 0: each rank holds some output rows
    ROW = "row"  # dim 1: each rank holds some input columns
    VOCAB = "vocab"  # dim 0, after padding the vocabulary


class Layers(enum.Enum):
    """Which layers a rule with ``{i}`` is for."""

    DECODER = "decoder"  # every decoder layer
    DENSE = "dense"  # decoder layers with one MLP
    MOE = "moe"  # decoder layers with experts
    MTP = "mtp"  # multi-token-prediction layers, which HF numbers after the decoder's


@dataclass(frozen=True)
class Run:
    """Rows ``start, start + step, ...`` (``rows`` of them) of the HF tensor ``hf``.

    Of a tensor that stacks all experts the run is in entry ``index`` of its first axis; with ``transposed`` that matrix
    is ``[in, out]``, and its columns are what is called rows here.
    """

    hf: str
    start: int
    rows: int
    step: int = 1
    index: int | None = None
    transposed: bool = False


@dataclass(frozen=True)
class CanonTensor:
    """One whole megatron tensor: its torch_dist name and shape, and the HF rows it is made of, in order.

    ``stride`` is megatron's ``partition_stride``: a gated fc1 is two blocks [gate; up], and a rank holds a piece of
    each. ``expert`` is the number of the expert, if it is one's. ``stacked`` is the length of the HF tensors' first
    axis where all experts share one. ``keep_fp32`` marks what megatron holds in fp32 whatever the model's dtype.
    """

    name: str
    shape: tuple[int, ...]
    runs: tuple[Run, ...]
    shard: Shard
    stride: int = 1
    expert: int | None = None
    stacked: int | None = None
    keep_fp32: bool = False

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every HF tensor this one is made of (of stacked ones, of the whole stack)."""
        rows: dict[str, int] = {}
        transposed: dict[str, bool] = {}
        for run in self.runs:
            rows[run.hf] = max(rows.get(run.hf, 0), run.start + (run.rows - 1) * run.step + 1)
            transposed[run.hf] = run.transposed
        stack = () if self.stacked is None else (self.stacked,)
        whole = {name: (n, *self.shape[1:]) for name, n in rows.items()}
        return {name: stack + (shape[::-1] if transposed[name] else shape) for name, shape in whole.items()}


class Dims(Protocol):
    """The sizes and switches rules need; `megarl.model.family.ModelSpec` has them."""

    num_layers: int
    mtp_num_layers: int

    def size(self, name: str) -> int:
        """A dimension by its name, such as ``hidden_size``."""

    def has(self, name: str) -> bool:
        """Whether the model has the part that a rule's ``when`` names."""

    def is_moe(self, i: int) -> bool:
        """Whether layer ``i`` has experts."""


class Rule(Protocol):
    """What every rule offers: the megatron tensor of layer ``i`` and expert ``e`` (each 0 where it does not apply)."""

    mcore: str
    layers: Layers
    when: str

    def tensor(self, dims: Dims, i: int, e: int) -> CanonTensor: ...


@dataclass(frozen=True)
class Copy:
    """The same tensor under another name. ``shape`` names its dimensions, looked up in the model's sizes.

    ``stacked``: HF keeps the experts' tensors as one; ``transposed``: as ``[in, out]``.
    """

    mcore: str
    hf: str
    shape: tuple[str, ...]
    shard: Shard = Shard.REPLICATED
    stacked: bool = False
    transposed: bool = False
    keep_fp32: bool = False
    layers: Layers = Layers.DECODER
    when: str = ""

    def tensor(self, dims: Dims, i: int, e: int) -> CanonTensor:
        shape = tuple(dims.size(name) for name in self.shape)
        index = e if self.stacked else None
        run = Run(_fill(self.hf, dims, i, e), 0, shape[0], index=index, transposed=self.transposed)
        return _canon(self.mcore, dims, i, e, shape, (run,), self.shard, stacked=self.stacked, keep_fp32=self.keep_fp32)


@dataclass(frozen=True)
class QKV:
    """Query, key and value, interleaved by query group: for each group its query heads, then its key head, then its
    value head.

    ``{qkv}`` in the HF name becomes q, k and v. Serves weights ``[rows, hidden]`` and biases ``[rows]``.
    """

    mcore: str
    hf: str
    bias: bool = False
    layers: Layers = Layers.DECODER
    when: str = ""

    def tensor(self, dims: Dims, i: int, e: int) -> CanonTensor:
        head, groups = dims.size("kv_channels"), dims.size("num_query_groups")
        per_group = dims.size("num_attention_heads") // groups * head
        q, k, v = (_fill(self.hf, dims, i, e, qkv=letter) for letter in "qkv")
        runs = []
        for g in range(groups):
            runs += [Run(q, g * per_group, per_group), Run(k, g * head, head), Run(v, g * head, head)]
        rows = groups * (per_group + 2 * head)
        shape = (rows,) if self.bias else (rows, dims.size("hidden_size"))
        return _canon(self.mcore, dims, i, e, shape, tuple(runs), Shard.COLUMN)


@dataclass(frozen=True)
class GateUp:
    """A gated MLP's first layer: all gate rows, then all up rows. ``{part}`` in the HF name becomes each of ``parts``.

    ``ffn`` names the MLP's inner size.
    """

    mcore: str
    hf: str
    ffn: str = "ffn_hidden_size"
    parts: tuple[str, str] = ("gate", "up")
    layers: Layers = Layers.DECODER
    when: str = ""

    def tensor(self, dims: Dims, i: int, e: int) -> CanonTensor:
        f = dims.size(self.ffn)
        runs = tuple(Run(_fill(self.hf, dims, i, e, part=part), 0, f) for part in self.parts)
        return _canon(self.mcore, dims, i, e, (2 * f, dims.size("hidden_size")), runs, Shard.COLUMN, stride=2)


@dataclass(frozen=True)
class StackedGateUp:
    """The experts' first layers as gpt-oss has them: one HF tensor ``[experts, hidden, 2 x ffn]``, gate in the even
    columns and up in the odd ones; its bias is ``[experts, 2 x ffn]``."""

    mcore: str
    hf: str
    ffn: str = "moe_ffn_hidden_size"
    bias: bool = False
    layers: Layers = Layers.MOE
    when: str = ""

    def tensor(self, dims: Dims, i: int, e: int) -> CanonTensor:
        f, hf = dims.size(self.ffn), _fill(self.hf, dims, i, e)
        runs = tuple(Run(hf, part, f, step=2, index=e, transposed=not self.bias) for part in (0, 1))
        shape = (2 * f,) if self.bias else (2 * f, dims.size("hidden_size"))
        return _canon(self.mcore, dims, i, e, shape, runs, Shard.COLUMN, stride=2, stacked=True)


def _fill(template: str, dims: Dims, i: int, e: int, **more: str) -> str:
    return template.format(i=i, e=e, k=i - dims.num_layers, **more)


def _canon(
    mcore: str,
    dims: Dims,
    i: int,
    e: int,
    shape: tuple[int, ...],
    runs: tuple[Run, ...],
    shard: Shard,
    stride: int = 1,
    stacked: bool = False,
    keep_fp32: bool = False,
) -> CanonTensor:
    expert = e if "{e}" in mcore else None
    stack = dims.size("num_experts") if stacked else None
    return CanonTensor(_fill(mcore, dims, i, e), shape, runs, shard, stride, expert, stack, keep_fp32)


R = TypeVar("R", bound=Rule)


def only(rules: tuple[R, ...], layers: Layers = Layers.DECODER, when: str = "") -> tuple[R, ...]:
    """The same rules for some layers only, or for models that have some part only."""
    return tuple(dataclasses.replace(rule, layers=layers, when=rule.when or when) for rule in rules)  # type: ignore[type-var]


def renamed(rules: tuple[R, ...], mcore: tuple[str, str], hf: tuple[str, str]) -> tuple[R, ...]:
    """The same rules under other names: the first of each pair replaced by the second."""
    changed = [(r, r.mcore.replace(*mcore), r.hf.replace(*hf)) for r in rules]  # type: ignore[attr-defined]
    return tuple(dataclasses.replace(r, mcore=m, hf=h) for r, m, h in changed)  # type: ignore[type-var]


def insert_after(rules: tuple[Rule, ...], mcore: str, *new: Rule) -> tuple[Rule, ...]:
    """The list with ``new`` after the rule for ``mcore``: weights of one module stay together in the stream."""
    at = [rule.mcore for rule in rules].index(mcore) + 1
    return (*rules[:at], *new, *rules[at:])


def compile_rules(rules: tuple[Rule, ...], dims: Dims) -> list[CanonTensor]:
    """Every tensor of a model, static: embedding first, then layer by layer, then the final norm and the head.

    The order is the one vLLM loads best: all parts of one module together, one layer after the other.
    """
    rules = tuple(rule for rule in rules if not rule.when or dims.has(rule.when))
    once = [rule.tensor(dims, 0, 0) for rule in rules if "{" not in rule.mcore]
    layered = [rule for rule in rules if "{" in rule.mcore]
    layers = [tensor for i in range(dims.num_layers + dims.mtp_num_layers) for tensor in _layer(layered, dims, i)]
    return once[:1] + layers + once[1:]


def _layer(rules: list[Rule], dims: Dims, i: int) -> Iterator[CanonTensor]:
    if i < dims.num_layers:
        wanted = {Layers.DECODER, Layers.MOE if dims.is_moe(i) else Layers.DENSE}
    else:
        wanted = {Layers.MTP}
    for rule in rules:
        if rule.layers in wanted:
            experts = range(dims.size("num_experts")) if "{e}" in rule.mcore else range(1)
            yield from (rule.tensor(dims, i, e) for e in experts)
