"""Whether boxes cover an array exactly once: each chunk of a checkpoint is a box of its tensor.

Works for any cuts, not only regular grids: along each axis the boxes' edges cut it into intervals, and the boxes over
one interval must tile the remaining axes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """``sizes`` elements from ``offsets`` on, an entry an axis."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        spans = zip(self.offsets, self.sizes, strict=True)
        return "[" + ", ".join(f"{start}:{start + size}" for start, size in spans) + "]"


def fault_in_tiling(shape: tuple[int, ...], boxes: Sequence[Box]) -> str | None:
    """What keeps the boxes from covering every element exactly once; None where nothing does."""
    if 0 in shape:
        return None
    for box in boxes:
        if len(box.offsets) != len(shape) or len(box.sizes) != len(shape):
            return f"chunk {box} has not {len(shape)} axes"
        inside = all(o >= 0 and s > 0 and o + s <= n for o, s, n in zip(box.offsets, box.sizes, shape, strict=True))
        if not inside:
            return f"chunk {box} lies outside of shape {shape}"
    return _fault(shape, tuple(boxes), 0)


def _fault(shape: tuple[int, ...], boxes: tuple[Box, ...], axis: int) -> str | None:
    if axis == len(shape):
        if len(boxes) > 1 and boxes[0] == boxes[1]:
            return f"chunk {boxes[0]} is there twice"
        return f"chunks {boxes[0]} and {boxes[1]} overlap" if len(boxes) > 1 else None
    edges = sorted({0, shape[axis]} | {b.offsets[axis] + add for b in boxes for add in (0, b.sizes[axis])})
    over: list[list[Box]] = [[] for _ in edges[1:]]
    for box in boxes:
        first = bisect_left(edges, box.offsets[axis])
        for k in range(first, bisect_left(edges, box.offsets[axis] + box.sizes[axis])):
            over[k].append(box)
    seen: set[tuple[Box, ...]] = set()  # long boxes meet the same neighbours in many intervals
    for k, covering in enumerate(over):
        if not covering:
            return f"no chunk covers {edges[k]}:{edges[k + 1]} of axis {axis}"
        if tuple(covering) not in seen:
            seen.add(tuple(covering))
            if fault := _fault(shape, tuple(covering), axis + 1):
                return fault
    return None
