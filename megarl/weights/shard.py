"""Which rows and columns of a tensor a tensor-parallel rank holds, as plain arithmetic.

`row_segments` is the one place where HF rows and megatron rows meet, and `segments` where they meet a rank's rows.
Loading copies along segments in one direction, exporting in the other; files and live models alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megarl.weights.rules import CanonTensor, Shard

# The embedding is padded to a multiple of this times TP: rows of equal number on every rank, aligned for FP8.
VOCAB_MULTIPLE = 16
_DIMENSION = {Shard.COLUMN: 0, Shard.VOCAB: 0, Shard.ROW: 1}


@dataclass(frozen=True)
class Segment:
    """A block of rows: ``view(hf)`` is ``local[local_rows]``. 1-D tensors have ``columns`` None.

    ``index`` and ``transposed`` as in `megarl.weights.rules.Run`; ``hf_rows`` may have a step.
    """

    hf: str
    hf_rows: slice
    local_rows: slice
    columns: slice | None
    index: int | None = None
    transposed: bool = False

    def view(self, hf: Any) -> Any:
        """The block of the whole HF tensor, a torch tensor or numpy array, as a view: to read, or to write into."""
        matrix = hf if self.index is None else hf[self.index]
        if self.transposed:
            matrix = matrix.T
        return matrix[self.hf_rows] if self.columns is None else matrix[self.hf_rows, self.columns]


def padded_vocab(vocab_size: int, tp_size: int) -> int:
    multiple = VOCAB_MULTIPLE * tp_size
    return -(-vocab_size // multiple) * multiple


def local_shape(tensor: CanonTensor, tp_size: int) -> tuple[int, ...]:
    """Shape of a rank's parameter; raises ValueError where the tensor does not divide.

    ``tp_size`` is that of expert tensor parallelism for an expert's tensor, and 1 for what every rank holds whole.
    """
    shape = list(tensor.shape)
    if tensor.shard is Shard.VOCAB:
        shape[0] = padded_vocab(shape[0], tp_size)
    dim = _DIMENSION.get(tensor.shard)
    if dim is not None:
        if shape[dim] % (tp_size * tensor.stride):
            raise ValueError(
                f"{tensor.name}: dimension {dim} of {tuple(shape)} does not divide by TP {tp_size} x {tensor.stride}"
            )
        shape[dim] //= tp_size
    return tuple(shape)


def rows_of(tensor: CanonTensor, tp_size: int, tp_rank: int) -> list[tuple[int, int]]:
    """(start, stop) of the whole tensor's rows this rank holds, in the order it holds them. Padding rows may lie past
    the end."""
    if _DIMENSION.get(tensor.shard) != 0:
        return [(0, tensor.shape[0])]
    total = local_shape(tensor, tp_size)[0] * tp_size
    block = total // tensor.stride
    share = block // tp_size
    return [(b * block + tp_rank * share, b * block + (tp_rank + 1) * share) for b in range(tensor.stride)]


def columns_of(tensor: CanonTensor, tp_size: int, tp_rank: int) -> slice | None:
    """The whole tensor's columns this rank holds; None for 1-D tensors."""
    if len(tensor.shape) == 1:
        return None
    width = tensor.shape[1] // tp_size if tensor.shard is Shard.ROW else tensor.shape[1]
    first = tp_rank * width if tensor.shard is Shard.ROW else 0
    return slice(first, first + width)


def segments(tensor: CanonTensor, tp_size: int, tp_rank: int) -> list[Segment]:
    """The blocks that make up this rank's parameter. Vocabulary padding is in no segment: it has no HF rows."""
    columns = columns_of(tensor, tp_size, tp_rank)
    out: list[Segment] = []
    local = 0
    for start, stop in rows_of(tensor, tp_size, tp_rank):
        out += row_segments(tensor, start, stop, columns, local)
        local += stop - start
    return out


def row_segments(
    tensor: CanonTensor, start: int, stop: int, columns: slice | None = None, local: int = 0
) -> list[Segment]:
    """The blocks that make up rows ``start`` to ``stop`` of the whole tensor; ``local`` is where the first one goes.

    ``columns`` None takes all of them. Rows past the tensor's end are padding and in no block.
    """
    if columns is None and len(tensor.shape) == 2:
        columns = slice(0, tensor.shape[1])
    out = []
    at = 0  # row of the whole tensor where the current run begins
    for run in tensor.runs:
        low, high = max(start, at), min(stop, at + run.rows)
        if low < high:
            first, last = (run.start + (row - at) * run.step for row in (low, high - 1))
            hf_rows = slice(first, last + 1, run.step) if run.step > 1 else slice(first, last + 1)
            here = local + low - start
            out.append(Segment(run.hf, hf_rows, slice(here, here + high - low), columns, run.index, run.transposed))
        at += run.rows
    return out
