"""Sums that say whether two sides hold the same bits of a Hugging Face tensor, whoever holds which part of it.

The sum of a block is that of its elements' bits, each times ``2 p + 1``, where ``p`` is the element's place in the
whole tensor, modulo 2**64: blocks add up to what they tile, and any one element that differs gives another number.

`sum_of_segment` is the trainer's side: from a rank's parameters and the rules alone, without the plan, buffers and
transports that bring the weights to vLLM. `Checked` is the other side: what has come.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping

import torch

from megarl.weights.boxed import Boxed
from megarl.weights.plan import Box
from megarl.weights.shard import Segment

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22  # elements that are summed at a time


def checksum(tensor: torch.Tensor) -> int:
    """Of a whole tensor; of a `Boxed`, of its box."""
    if not isinstance(tensor, Boxed):
        return int(_sum(tensor.detach().reshape(tensor.numel(), 1), 0, 1, 0))
    strides = _strides(tensor.shape)
    first = sum(at * stride for at, stride in zip(tensor.at, strides, strict=True))
    return int(_sum(tensor.box, first, *strides))


def sum_of_segment(parameter: torch.Tensor, part: Segment, shape: tuple[int, ...], box: Box) -> torch.Tensor:
    """The sum, as a tensor, of what of a box of an HF tensor of this ``shape`` is in one segment of a parameter."""
    rows = range(part.hf_rows.start, part.hf_rows.stop, part.hf_rows.step or 1)
    mine = _inside(rows, box.top, box.bottom)
    block = parameter[part.local_rows][mine]
    strides, first = _strides(shape), 0
    if part.index is not None:
        first, strides = part.index * strides[0], strides[1:]
    if part.transposed:
        strides = strides[::-1]
    first += rows[mine].start * strides[0]
    if part.columns is None:
        return _sum(block, first, rows.step * strides[0])
    columns = range(part.columns.start, part.columns.stop)
    theirs = _inside(columns, box.left, box.right)
    return _sum(block[:, theirs], first + columns[theirs].start * strides[1], rows.step * strides[0], strides[1])


def _inside(places: range, start: int, stop: int | None) -> slice:
    """Where in ascending places those from ``start`` to before ``stop`` are."""
    first = bisect_left(places, start)
    return slice(first, max(first, len(places) if stop is None else bisect_left(places, stop)))


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """How many elements apart neighbours along each dimension are, in the whole tensor."""
    return torch.empty(shape, device="meta").stride()


def _sum(block: torch.Tensor, first: int, row_stride: int, column_stride: int = 0) -> torch.Tensor:
    """Of a block ``[rows, columns]`` or ``[rows]`` whose first element has the place ``first``."""
    matrix = block if block.dim() == 2 else block[:, None]
    rows, columns = matrix.shape
    total = torch.zeros((), dtype=torch.int64, device=block.device)
    across = torch.arange(columns, device=block.device)
    step = max(1, _CHUNK // max(1, columns))
    for start in range(0, rows, step):
        chunk = matrix[start : start + step].contiguous()
        bits = chunk.view(_BITS[chunk.element_size()]).to(torch.int64)
        down = torch.arange(start, start + len(bits), device=block.device) * row_stride + first
        total += ((2 * down + 1) * bits.sum(1)).sum() + 2 * column_stride * (bits * across).sum()
    return total


class Checked:
    """Weights on their way into vLLM, whose sums are compared with the trainer's as they pass, every time anew."""

    def __init__(self, weights: Iterable[tuple[str, torch.Tensor]], expected: Mapping[str, int]) -> None:
        self.wrong: list[str] = []  # names of tensors that came with other bits, or did not come
        self._weights = weights
        self._expected = expected

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        missing, self.wrong = set(self._expected), []
        for name, tensor in self._weights:
            if self._expected.get(name) != checksum(tensor):
                self.wrong.append(name)
            missing.discard(name)
            yield name, tensor
        self.wrong += sorted(missing)
