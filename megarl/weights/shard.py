"""Which rows and columns of a tensor a tensor-parallel rank holds, as plain arithmetic.

`segments` is the one place where HF rows, megatron rows and a rank's rows meet. Loading copies along its segments in
one direction, exporting in the other.
"""

from __future__ import annotations

from dataclasses import dataclass

from megarl.weights.rules import CanonTensor, Shard

# The embedding is padded to a multiple of this times TP: rows of equal number on every rank, aligned for FP8.
VOCAB_MULTIPLE = 16


@dataclass(frozen=True)
class Segment:
    """A block of rows: ``hf[hf_rows, columns]`` is ``local[local_rows]``. 1-D tensors have ``columns`` None."""

    hf: str
    hf_rows: slice
    local_rows: slice
    columns: slice | None


def padded_vocab(vocab_size: int, tp_size: int) -> int:
    multiple = VOCAB_MULTIPLE * tp_size
    return -(-vocab_size // multiple) * multiple


def local_shape(tensor: CanonTensor, tp_size: int) -> tuple[int, ...]:
    """Shape of a rank's parameter; raises ValueError where the tensor does not divide."""
    shape = list(tensor.shape)
    if tensor.shard is Shard.VOCAB:
        shape[0] = padded_vocab(shape[0], tp_size)
    dim = {Shard.COLUMN: 0, Shard.VOCAB: 0, Shard.ROW: 1}.get(tensor.shard)
    if dim is not None:
        if shape[dim] % (tp_size * tensor.stride):
            raise ValueError(
                f"{tensor.name}: dimension {dim} of {tuple(shape)} does not divide by TP {tp_size} x {tensor.stride}"
            )
        shape[dim] //= tp_size
    return tuple(shape)


def _rows_of(tensor: CanonTensor, tp_size: int, tp_rank: int) -> list[tuple[int, int]]:
    """(start, stop) of the whole tensor's rows this rank holds, in the order it holds them. Padding rows may lie past
    the end."""
    if tensor.shard in (Shard.REPLICATED, Shard.ROW):
        return [(0, tensor.shape[0])]
    total = local_shape(tensor, tp_size)[0] * tp_size
    block = total // tensor.stride
    share = block // tp_size
    return [(b * block + tp_rank * share, b * block + (tp_rank + 1) * share) for b in range(tensor.stride)]


def segments(tensor: CanonTensor, tp_size: int, tp_rank: int) -> list[Segment]:
    """The blocks that make up this rank's parameter. Vocabulary padding is in no segment: it has no HF rows."""
    columns = None
    if len(tensor.shape) == 2:
        width = tensor.shape[1] // tp_size if tensor.shard is Shard.ROW else tensor.shape[1]
        first = tp_rank * width if tensor.shard is Shard.ROW else 0
        columns = slice(first, first + width)
    out = []
    local = 0
    for start, stop in _rows_of(tensor, tp_size, tp_rank):
        at = 0  # row of the whole tensor where the current run begins
        for run in tensor.runs:
            low, high = max(start, at), min(stop, at + run.rows)
            if low < high:
                hf_rows = slice(run.start + low - at, run.start + high - at)
                here = local + low - start
                out.append(Segment(run.hf, hf_rows, slice(here, here + high - low), columns))
            at += run.rows
        local += stop - start
    return out
