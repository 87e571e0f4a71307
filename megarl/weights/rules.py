"""Weight rules: how one megatron-core tensor is made of Hugging Face tensors. Values, not code: they know no process
group.

A rule lists the *runs* of rows of HF tensors that, laid end to end, are the rows of the megatron tensor as its
torch_dist checkpoint has it (no tensor parallelism, no vocabulary padding). Reading and writing both follow the same
runs, so there is no second direction to drift. Names are megatron's torch_dist keys; ``{i}`` is the layer.

Layouts: Megatron-LM, ``megatron/core/transformer/attention.py`` (query groups interleaved) and ``mlp.py`` (gate over
up).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol


class Shard(enum.Enum):
    """Which dimension tensor parallelism cuts."""

    REPLICATED = "replicated"
    COLUMN = "column"  # dim 0: each rank holds some output rows
    ROW = "row"  # dim 1: each rank holds some input columns
    VOCAB = "vocab"  # dim 0, after padding the vocabulary


@dataclass(frozen=True)
class Run:
    """``rows`` consecutive rows of the HF tensor ``hf``, from ``start`` on."""

    hf: str
    start: int
    rows: int


@dataclass(frozen=True)
class CanonTensor:
    """One whole megatron tensor: its torch_dist name and shape, and the HF rows it is made of, in order.

    ``stride`` is megatron's ``partition_stride``: a gated fc1 is two blocks [gate; up], and a rank holds a piece of
    each.
    """

    name: str
    shape: tuple[int, ...]
    runs: tuple[Run, ...]
    shard: Shard
    stride: int = 1

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every HF tensor this one is made of."""
        rows: dict[str, int] = {}
        for run in self.runs:
            rows[run.hf] = max(rows.get(run.hf, 0), run.start + run.rows)
        return {name: (n, *self.shape[1:]) for name, n in rows.items()}


class Dims(Protocol):
    """The sizes rules need; `megarl.model.family.ModelSpec` has them."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    ffn_hidden_size: int
    vocab_size: int


class Rule(Protocol):
    """What every rule offers: the megatron tensor of layer ``i``."""

    mcore: str
    hf: str

    def tensor(self, dims: Dims, i: int) -> CanonTensor: ...


@dataclass(frozen=True)
class Copy:
    """The same tensor under another name. ``shape`` names its dimensions, looked up in the model's sizes."""

    mcore: str
    hf: str
    shape: tuple[str, ...]
    shard: Shard = Shard.REPLICATED

    def tensor(self, dims: Dims, i: int) -> CanonTensor:
        shape = tuple(_size(dims, name) for name in self.shape)
        return CanonTensor(self.mcore.format(i=i), shape, (Run(self.hf.format(i=i), 0, shape[0]),), self.shard)


@dataclass(frozen=True)
class QKV:
    """Query, key and value, interleaved by query group: for each group its query heads, then its key head, then its
    value head.

    ``{qkv}`` in the HF name becomes q, k and v. Serves weights ``[rows, hidden]`` and biases ``[rows]``.
    """

    mcore: str
    hf: str
    bias: bool = False

    def tensor(self, dims: Dims, i: int) -> CanonTensor:
        head, groups = dims.kv_channels, dims.num_query_groups
        per_group = dims.num_attention_heads // groups * head
        q, k, v = (self.hf.format(i=i, qkv=letter) for letter in "qkv")
        runs = []
        for g in range(groups):
            runs += [Run(q, g * per_group, per_group), Run(k, g * head, head), Run(v, g * head, head)]
        rows = groups * (per_group + 2 * head)
        shape = (rows,) if self.bias else (rows, dims.hidden_size)
        return CanonTensor(self.mcore.format(i=i), shape, tuple(runs), Shard.COLUMN)


@dataclass(frozen=True)
class GateUp:
    """The gated MLP's first layer: all gate rows, then all up rows. ``{part}`` in the HF name becomes gate and up."""

    mcore: str
    hf: str

    def tensor(self, dims: Dims, i: int) -> CanonTensor:
        f = dims.ffn_hidden_size
        runs = tuple(Run(self.hf.format(i=i, part=part), 0, f) for part in ("gate", "up"))
        return CanonTensor(self.mcore.format(i=i), (2 * f, dims.hidden_size), runs, Shard.COLUMN, stride=2)


def _size(dims: Dims, name: str) -> int:
    if name == "query_size":
        return dims.num_attention_heads * dims.kv_channels
    return int(getattr(dims, name))


def insert_after(rules: tuple[Rule, ...], mcore: str, *new: Rule) -> tuple[Rule, ...]:
    """The list with ``new`` after the rule for ``mcore``: weights of one module stay together in the stream."""
    at = [rule.mcore for rule in rules].index(mcore) + 1
    return (*rules[:at], *new, *rules[at:])


def compile_rules(rules: tuple[Rule, ...], dims: Dims) -> list[CanonTensor]:
    """Every tensor of a model, static: embedding first, then layer by layer, then the final norm and the head.

    The order is the one vLLM loads best: all parts of one module together, one layer after the other.
    """
    once = [rule.tensor(dims, 0) for rule in rules if "{i}" not in rule.mcore]
    layers = [rule.tensor(dims, i) for i in range(dims.num_layers) for rule in rules if "{i}" in rule.mcore]
    return once[:1] + layers + once[1:]
