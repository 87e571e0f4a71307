"""Who sends what to whom: the exchange that turns the shards of trainer ranks into Hugging Face tensors, as a value.

Pure arithmetic. From what each rank *holds* of which megatron tensor, and which box of which HF tensor each rank
*needs*, `make_plan` computes buckets of blocks. Every rank computes the same plan and keeps its own part of it, so
nothing has to be announced when weights move.

Ranks are positions in the group that together holds the model. Sizes are in bytes. A box is in the rows and columns
that `Segment.view` shows: of a matrix ``[out, in]`` itself; of stacked or transposed experts, of each one's
``[out, in]`` matrix.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from megarl.weights.rules import CanonTensor, Shard
from megarl.weights.shard import Segment, local_shape, segments

# Blocks begin at multiples of this in a buffer of bytes, so that a view of any dtype is aligned.
_ALIGNMENT = 16


@dataclass(frozen=True)
class Held:
    """A rank's share of one megatron tensor: the ``cut``-th of ``cuts`` equal ones. What is not cut is share 0 of 1."""

    cut: int
    cuts: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Box:
    """Rows ``[top, bottom)`` and columns ``[left, right)``; None reaches to the end."""

    top: int = 0
    bottom: int | None = None
    left: int = 0
    right: int | None = None

    def shape(self, dimensions: int) -> tuple[int, ...]:
        """Of a box without open ends, in a tensor of one or two dimensions."""
        assert self.bottom is not None and self.right is not None, self
        return (self.bottom - self.top, self.right - self.left)[:dimensions]


EVERYTHING = Box()
# (position of a rank, megarl tensor, HF tensor it is made of) -> what that rank needs of it
Needs = Callable[[int, CanonTensor, str], Box | None]


def whole(position: int, tensor: CanonTensor, hf: str) -> Box:
    """Every rank needs every tensor."""
    return EVERYTHING


@dataclass(frozen=True)
class Item:
    """An HF tensor to be delivered: its name and what it is filled from, another name where it is a copy."""

    name: str
    source: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[CanonTensor, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Block:
    """A part of one rank's parameter ``tensor``, and where in the HF tensor it belongs: ``hf.view(...)``."""

    item: Item
    tensor: str
    hf: Segment
    rows: slice  # of the parameter
    columns: slice | None
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.item.dtype.itemsize

    def is_all_of(self, shape: tuple[int, ...]) -> bool:
        """Whether the HF tensor, or a box of this shape in it, is this block and nothing else."""
        return self.hf.index is None and not self.hf.transposed and self.shape == shape

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """The block as a view of the parameter."""
        return parameter[self.rows] if self.columns is None else parameter[self.rows, self.columns]

    def in_buffer(self, buffer: torch.Tensor, at: int) -> torch.Tensor:
        """Where the block is in a buffer of bytes, as a view of its dtype and shape."""
        return buffer[at : at + self.nbytes].view(self.item.dtype).view(self.shape)


@dataclass
class Bucket:
    """One exchange, as one rank sees it."""

    sends: dict[int, list[Block]] = field(default_factory=lambda: defaultdict(list))  # receiver -> blocks
    receives: dict[int, list[Block]] = field(default_factory=lambda: defaultdict(list))  # sender -> blocks
    arrivals: list[tuple[int, Block]] = field(default_factory=list)  # (sender, block) in streaming order, own included
    completes: set[str] = field(default_factory=set)  # HF tensors that have all their blocks after this bucket
    travels: bool = False  # whether any rank sends anything


def aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def buffer_bytes(blocks: Iterable[Block]) -> int:
    """What the blocks of one pair of ranks take in a buffer."""
    return sum(aligned(block.nbytes) for block in blocks)


def items_of(tensors: Iterable[CanonTensor], dtypes: Mapping[str, torch.dtype]) -> list[Item]:
    """Every HF tensor, in streaming order. Raises ValueError where its parts have different dtypes."""
    parts: dict[str, list[CanonTensor]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in tensors:
        for name, shape in tensor.hf_shapes().items():
            parts.setdefault(name, []).append(tensor)
            shapes[name] = shape
    out = []
    for name, of in parts.items():
        found = {dtypes[tensor.name] for tensor in of}
        if len(found) > 1:
            raise ValueError(f"{name} would be made of {sorted(map(str, found))}: {', '.join(t.name for t in of)}")
        out.append(Item(name, name, shapes[name], found.pop(), tuple(of)))
    return out


def with_copies(items: list[Item], copies: Mapping[str, str]) -> list[Item]:
    """The items, and copies of some of them under other names: ``{name: name of the one it equals}``."""
    by_name = {item.name: item for item in items}
    return items + [replace(by_name[of], name=name) for name, of in copies.items()]


def boxes_of(items: Iterable[Item], needs: Needs, position: int) -> dict[str, Box]:
    """What of the items a rank gets, with no end left open. Not those of which it gets nothing or all, nor stacked
    ones, for which it needs the whole tensor's memory."""
    out = {}
    for item in items:
        box = needs(position, item.parts[0], item.name)
        if box is None or len(item.parts) > 1 or item.parts[0].stacked is not None:
            continue
        rows, columns = item.shape if len(item.shape) == 2 else (*item.shape, 1)
        right = columns if box.right is None else min(box.right, columns)
        closed = Box(box.top, rows if box.bottom is None else min(box.bottom, rows), box.left, right)
        if closed != Box(0, rows, 0, columns):
            out[item.name] = closed
    return out


class Holders:
    """What every rank of the group holds. Raises ValueError where the shares of a tensor do not make it whole."""

    def __init__(self, tensors: Iterable[CanonTensor], held: Sequence[Mapping[str, Held]]) -> None:
        self._at: dict[str, dict[int, list[int]]] = {}  # tensor -> cut -> positions
        self.cuts: dict[str, int] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for position, mine in enumerate(held):
            for name, share in mine.items():
                self._at.setdefault(name, {}).setdefault(share.cut, []).append(position)
                same = self.cuts.setdefault(name, share.cuts) == share.cuts
                if not same or self.dtypes.setdefault(name, share.dtype) != share.dtype:
                    raise ValueError(f"ranks hold {name} in different ways: {[m.get(name) for m in held]}")
        for tensor in tensors:
            cuts = self.cuts.get(tensor.name)
            if cuts is None:
                raise ValueError(f"{tensor.name}: no rank of the group holds it")
            missing = set(range(cuts)) - self._at[tensor.name].keys()
            if missing:
                raise ValueError(f"{tensor.name}: no rank of the group holds share {sorted(missing)} of {cuts}")

    def first(self, name: str, cut: int) -> int:
        """The first of those that hold the share."""
        return min(self._at[name][cut])

    def sender(self, name: str, cut: int, receiver: int) -> int:
        """The receiver itself where it holds the share; else the holder nearest to it, likely on its node."""
        at = self._at[name][cut]
        return receiver if receiver in at else min(at, key=lambda position: (abs(position - receiver), position))


def pieces(tensor: CanonTensor, cuts: int, cut: int, item: Item, box: Box) -> list[Block]:
    """What of one share of a megatron tensor lies in a box of one HF tensor."""
    out = []
    for part in segments(tensor, cuts, cut):
        if part.hf != item.source:
            continue
        block = _intersect(part, box)
        if block is not None:
            hf, rows, columns = block
            shape = (rows.stop - rows.start,)
            shape += () if columns is None else (columns.stop - columns.start,)
            out.append(Block(item, tensor.name, hf, rows, columns, shape))
    return out


def _intersect(part: Segment, box: Box) -> tuple[Segment, slice, slice | None] | None:
    """The part of a segment inside a box, with its rows and columns in the parameter."""
    step = part.hf_rows.step or 1
    first, count = part.hf_rows.start, part.local_rows.stop - part.local_rows.start
    low = max(0, -(-(box.top - first) // step))
    high = count if box.bottom is None else min(count, -(-(box.bottom - first) // step))
    if low >= high:
        return None
    local = slice(part.local_rows.start + low, part.local_rows.start + high)
    top, last = first + low * step, first + (high - 1) * step
    hf_rows = slice(top, last + 1, step) if step > 1 else slice(top, last + 1)
    if part.columns is None:
        return replace(part, hf_rows=hf_rows, local_rows=local), local, None
    left = max(part.columns.start, box.left)
    right = part.columns.stop if box.right is None else min(part.columns.stop, box.right)
    if left >= right:
        return None
    hf = replace(part, hf_rows=hf_rows, local_rows=local, columns=slice(left, right))
    return hf, local, slice(left - part.columns.start, right - part.columns.start)


@dataclass
class _Unit:
    """Some rows of one part of one item: the smallest thing that is put into a bucket."""

    traffic: dict[int, int]  # bytes of buffers that each rank needs for it, sending and receiving
    mine: list[tuple[int, int, Block]]  # (sender, receiver, block) of what the planning rank takes part in
    completes: str | None = None  # the item, if this is the last of it that the planning rank gets


def make_plan(
    items: Iterable[Item], holders: Holders, needs: Needs, size: int, position: int, bucket_bytes: int
) -> list[Bucket]:
    """The stream, cut into buckets, as the rank at ``position`` of a group of ``size`` sees it.

    No rank's buffers for a bucket, of what it sends and receives, take more than ``bucket_bytes``, unless one row of
    one tensor alone does: larger tensors are cut into ranges of rows. What one module of vLLM is made of (query, key
    and value; all experts of a layer) is kept in one bucket where it fits: vLLM holds on to tensors until a module is
    complete.
    """
    filling = _Filling(size, position, bucket_bytes)
    for units in _modules(items, holders, needs, size, position, bucket_bytes // size):
        together: dict[int, int] = defaultdict(int)
        for unit in units:
            for rank, nbytes in unit.traffic.items():
                together[rank] += nbytes
        if max(together.values(), default=0) <= bucket_bytes:
            filling.make_room(together)
        for unit in units:
            filling.make_room(unit.traffic)
            filling.add(unit)
    return filling.buckets


class _Filling:
    """Buckets, of which the last is being filled."""

    def __init__(self, size: int, position: int, limit: int) -> None:
        self.buckets = [Bucket()]
        self._size, self._position, self._limit = size, position, limit
        self._load = [0] * size

    def make_room(self, traffic: Mapping[int, int]) -> None:
        """Begin a new bucket if this does not fit into the present one."""
        if self.buckets[-1].travels and any(self._load[r] + n > self._limit for r, n in traffic.items()):
            self.buckets.append(Bucket())
            self._load = [0] * self._size

    def add(self, unit: _Unit) -> None:
        bucket = self.buckets[-1]
        bucket.travels = bucket.travels or bool(unit.traffic)
        for rank, nbytes in unit.traffic.items():
            self._load[rank] += nbytes
        for sender, receiver, block in unit.mine:
            if receiver != self._position:
                bucket.sends[receiver].append(block)
                continue
            bucket.arrivals.append((sender, block))
            if sender != self._position:
                bucket.receives[sender].append(block)
        if unit.completes:
            bucket.completes.add(unit.completes)


_EXPERT = re.compile(r"(.*\.mlp\.experts\.).*")


def _module(item: Item) -> str:
    """What vLLM makes one module of: all experts of a layer; else all that megatron makes one linear layer of."""
    name = item.parts[0].name
    match = _EXPERT.fullmatch(name)
    return match[1] if match else name.rpartition(".")[0]


def _modules(
    items: Iterable[Item], holders: Holders, needs: Needs, size: int, position: int, unit_bytes: int
) -> Iterator[list[_Unit]]:
    """Units of at most ``unit_bytes`` where rows are not larger: their owner may have to send them to all others."""
    module, units = "", []
    for item in items:
        if units and _module(item) != module:
            yield units
            units = []
        module = _module(item)
        ranges = [(part, rows) for part in item.parts for rows in _row_ranges(item, part, unit_bytes)]
        own = [_unit(item, part, rows, holders, needs, size, position) for part, rows in ranges]
        last = [unit for unit in own if any(receiver == position for _, receiver, _ in unit.mine)][-1:]
        for unit in last:
            unit.completes = item.name
        units += own
    if units:
        yield units


def _row_ranges(item: Item, part: CanonTensor, most_bytes: int) -> list[tuple[int, int]]:
    """What is one part of an item, in ranges of its rows."""
    rows = max(run.start + (run.rows - 1) * run.step + 1 for run in part.runs if run.hf == item.source)
    count = min(rows, -(-item.nbytes // len(item.parts) // max(1, most_bytes)))
    return [(k * rows // count, (k + 1) * rows // count) for k in range(count)]


def _inside(box: Box, rows: tuple[int, int]) -> Box:
    bottom = rows[1] if box.bottom is None else min(box.bottom, rows[1])
    return replace(box, top=max(box.top, rows[0]), bottom=bottom)


def _unit(
    item: Item, part: CanonTensor, rows: tuple[int, int], holders: Holders, needs: Needs, size: int, position: int
) -> _Unit:
    traffic: dict[int, int] = defaultdict(int)
    mine = []
    known: dict[tuple[int, Box], tuple[list[Block], int]] = {}  # many ranks need the same box
    for receiver in range(size):
        box = needs(receiver, part, item.name)
        if box is None:
            continue
        box = _inside(box, rows)
        for cut in range(holders.cuts[part.name]):
            if (cut, box) not in known:
                blocks = pieces(part, holders.cuts[part.name], cut, item, box)
                known[cut, box] = (blocks, buffer_bytes(blocks))
            blocks, nbytes = known[cut, box]
            if not blocks:
                continue
            sender = holders.sender(part.name, cut, receiver)
            if sender != receiver:
                traffic[sender] += nbytes
                traffic[receiver] += nbytes
            if position in (sender, receiver):
                mine += [(sender, receiver, block) for block in blocks]
    return _Unit(traffic, mine)


def share_of(tensor: CanonTensor, shape: tuple[int, ...], size: int, rank: int) -> tuple[int, int]:
    """(cut, cuts) of a rank's parameter of this shape.

    ``size`` and ``rank`` are those of tensor parallelism; for an expert's tensor, of expert tensor parallelism. Raises
    ValueError where the shape is not what the tensor's rule says.
    """
    cuts = 1 if tensor.shard is Shard.REPLICATED else size
    expected = local_shape(tensor, cuts)
    if shape != expected:
        raise ValueError(
            f"{tensor.name}: megatron built {shape}, its rule says {expected} with {size} ranks sharing it"
        )
    return (rank if cuts > 1 else 0), cuts
