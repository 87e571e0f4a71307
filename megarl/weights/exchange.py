"""The two ends of an exchange: blocks of parameters into a buffer of bytes, and out of it into Hugging Face tensors.

Buffers hold, for each rank in turn, the blocks that a `megarl.weights.plan.Bucket` lists for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from megarl.weights.boxed import Boxed
from megarl.weights.plan import Block, Box, Bucket, Item, aligned, buffer_bytes

# A block of this rank's parameters, as a view of them.
BlockOf = Callable[[Block], torch.Tensor]
# Where the tensor of this name goes. None: nowhere yet, it is given out as a tensor of its own.
Place = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Arrived:
    """What an exchange brought: ``of(sender, block)``, asked for in the order of the bucket's arrivals. Blocks stay as
    they are, or (not ``lasting``) have to be copied before the stream's next bucket, and not be written to."""

    of: Callable[[int, Block], torch.Tensor]
    lasting: bool


def pack(bucket: Bucket, size: int, own: BlockOf, buffer: torch.Tensor) -> list[int]:
    """Put what this rank sends into a buffer of bytes. How many of them are for each of ``size`` ranks."""
    at = 0
    for rank in range(size):
        for block in bucket.sends.get(rank, ()):
            block.in_buffer(buffer, at).copy_(own(block))
            at += aligned(block.nbytes)
    return [buffer_bytes(bucket.sends.get(rank, ())) for rank in range(size)]


def packed_bytes(bucket: Bucket, size: int) -> int:
    """How many bytes this rank sends to all of ``size`` ranks."""
    return sum(buffer_bytes(bucket.sends.get(rank, ())) for rank in range(size))


def room(bucket: Bucket, size: int) -> list[int]:
    """How many bytes come from each of ``size`` ranks."""
    return [buffer_bytes(bucket.receives.get(rank, ())) for rank in range(size)]


def unpack(
    bucket: Bucket,
    arrived: Arrived,
    own: BlockOf,
    unfinished: dict[str, torch.Tensor],
    boxes: Mapping[str, Box],
    place: Place | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Put blocks together, and give a tensor away as soon as it has all of its own.

    ``unfinished`` keeps tensors that go on in the next bucket. Of a tensor in ``boxes`` there is memory for the box
    alone (`Boxed`), unless it has a ``place``. Without one, a tensor or box that arrived as one block is a view of what
    arrived, if that lasts; never of a parameter, since some of vLLM's loaders write into what they are given.
    """
    name = ""
    for sender, block in bucket.arrivals:
        if name != block.item.name and name in bucket.completes:
            yield name, unfinished.pop(name)
        name = block.item.name
        travelled = sender in bucket.receives
        data = arrived.of(sender, block) if travelled else own(block)
        box = boxes.get(name)
        shape = block.item.shape if box is None else box.shape(len(block.item.shape))
        if place is None and travelled and arrived.lasting and block.is_all_of(shape):
            unfinished[name] = _in_whole(block.item, box, data)
            continue
        if name not in unfinished:
            unfinished[name] = place(name) if place else _in_whole(block.item, box, data.new_empty(shape))
        block.hf.view(unfinished[name]).copy_(data)
    if name in bucket.completes:
        yield name, unfinished.pop(name)


def _in_whole(item: Item, box: Box | None, data: torch.Tensor) -> torch.Tensor:
    """A box's memory in a tensor of the item's shape."""
    return data if box is None else Boxed(item.name, item.shape, data, (box.top, box.left)[: len(item.shape)])
