"""Are two checkpoints the same model? Compared bit by bit through the rules, whatever format each has; and is each what
its manifest says?

Both sides are read as canonical tensors, a chunk at a time, and compared as bits, so NaNs count. Every difference is a
line naming the tensor. Hashes of a manifest show what no comparison within one run can: bytes that changed after they
were written.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megarl.convert.manifest import MANIFEST, describe, dtype_name
from megarl.convert.mcore2hf import ToHF, convert_to_hf
from megarl.convert.sources import Source, as_bits, damage, gather, rows_per_chunk
from megarl.weights.rules import CanonTensor

Moved = Callable[[int], None]
# Of a model's description, what a conversion may change.
_MAY_DIFFER = ("mtp_num_layers", "mtp_in_checkpoint")


def nbytes(source: Source) -> int:
    """Size of all tensors as `compare` counts them."""
    return sum(math.prod(tensor.shape) * source.dtype(tensor).itemsize for tensor in source.spec.tensors())


def compare(a: Source, b: Source, dtype: torch.dtype | None = None, moved: Moved = lambda _: None) -> list[str]:
    """Every difference between two checkpoints, a line each; none where they are the same model bit for bit.

    With ``dtype`` both sides are cast to it first. ``moved`` is told how many bytes of ``a`` are done.
    """
    ours, theirs = describe(a.spec), describe(b.spec)
    out = [
        f"config: {field} is {ours[field]} in {a.path}, {theirs[field]} in {b.path}"
        for field in ours
        if ours[field] != theirs.get(field) and field not in _MAY_DIFFER
    ]
    left = {tensor.name: tensor for tensor in a.spec.tensors()}
    right = {tensor.name: tensor for tensor in b.spec.tensors()}
    for names, present, absent in ((left.keys() - right.keys(), a, b), (right.keys() - left.keys(), b, a)):
        out += [f"{name}: only in {present.path}, not in {absent.path}" for name in sorted(names)]
    for name, tensor in left.items():
        if name in right and (difference := _differs(a, b, tensor, right[name], dtype)):
            out.append(f"{name}: {difference} ({a.path}: {a.where(tensor)}; {b.path}: {b.where(right[name])})")
        moved(math.prod(tensor.shape) * a.dtype(tensor).itemsize)
    return out


def _differs(a: Source, b: Source, tensor: CanonTensor, other: CanonTensor, dtype: torch.dtype | None) -> str | None:
    """How a tensor differs; None where it does not."""
    if tensor.shape != other.shape:
        return f"shape {tensor.shape} and {other.shape}"
    dtypes = [dtype_name(dtype or source.dtype(each)) for source, each in ((a, tensor), (b, other))]
    if dtypes[0] != dtypes[1]:
        return f"dtype {dtypes[0]} and {dtypes[1]}"
    count, first = 0, None
    step = rows_per_chunk(tensor.shape, 8)
    for start in range(0, tensor.shape[0], step):
        stop = min(start + step, tensor.shape[0])
        x, y = gather(a, tensor, start, stop), gather(b, other, start, stop)
        x, y = (as_bits(side if dtype is None else side.to(dtype)) for side in (x, y))
        if not torch.equal(x, y):
            unequal = x != y
            count += int(unequal.sum())
            first = start + int(unequal.nonzero()[0, 0]) if first is None else first
    return None if first is None else f"{count} of {math.prod(tensor.shape)} values differ, first in row {first}"


def check_manifest(source: Source, moved: Moved = lambda _: None) -> list[str]:
    """Everything in which a checkpoint is not what its manifest says; none also where it has no manifest. ``moved`` is
    told how many bytes of the manifest's tensors are done."""
    if source.manifest is None:
        return []
    present = set(source.all_stored_names())
    said = source.manifest.tensors
    out = []
    for name in sorted(said.keys() | present):
        if name not in present:
            out.append(f"{source.path / MANIFEST}: {name} is not in the checkpoint")
        elif problem := damage(source, source.manifest, name):
            out.append(problem)
        if name in said:
            moved(said[name].nbytes)
    return out


@dataclass(frozen=True)
class Logits:
    """How far apart logits of the first ``layers`` layers are, in the largest absolute difference.

    ``between``: transformers on one checkpoint and on the other. ``megatron``: transformers on the first, megatron-core
    on the second; None where megatron-core does not compute the model, and then ``why_not`` says why.
    """

    layers: int
    between: float
    megatron: float | None
    why_not: str
    std: float
    equal: bool


def compare_logits(a: Path, b: Path, layers: int, config_from: Path | None = None, num_tokens: int = 64) -> Logits:
    """Cut the first ``layers`` layers out of both checkpoints, as small Hugging Face models, and run them on a CPU."""
    from megarl.model.compare import compare_logits as megatron_logits
    from megarl.model.compare import transformers_logits
    from megarl.model.family import read_spec

    with tempfile.TemporaryDirectory() as folder:
        cuts = [Path(folder) / side for side in ("a", "b")]
        for source, cut in zip((a, b), cuts, strict=True):
            convert_to_hf(ToHF(source, cut, config_from, layers=layers))
        spec = read_spec(cuts[0])
        tokens = torch.randint(0, spec.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(0))
        x, y = (transformers_logits(cut, tokens) for cut in cuts)
        between = (x - y).abs().max().item()
        if spec.not_computed:
            return Logits(layers, between, None, ", ".join(spec.not_computed), x.std().item(), between == 0)
        result = megatron_logits(*cuts, num_tokens=num_tokens)
        return Logits(layers, between, result.max_difference, "", result.std, between == 0 and result.equal)
