"""The two ends of an exchange: blocks of parameters into a buffer of bytes, and out of it into Hugging Face tensors.

Buffers hold, for each rank in turn, the blocks that a `megarl.weights.plan.Bucket` lists for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from megarl.weights.plan import Block, Bucket, aligned, buffer_bytes

# A block of this rank's parameters, as a view of them.
BlockOf = Callable[[Block], torch.Tensor]
# Where the tensor of this name goes. None: nowhere yet, it is given out as a tensor of its own.
Place = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Arrived:
    """What an exchange brought: bytes by sender. They stay as they are, or only (not ``lasting``) until the stream's
    next bucket."""

    parts: dict[int, torch.Tensor]
    lasting: bool


def pack(bucket: Bucket, size: int, own: BlockOf, buffer: torch.Tensor) -> list[int]:
    """Put what this rank sends into a buffer of bytes. How many of them are for each of ``size`` ranks."""
    at = 0
    for rank in range(size):
        for block in bucket.sends.get(rank, ()):
            _slot(buffer, at, block).copy_(own(block))
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
    place: Place | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Put blocks together, and give a tensor away as soon as it has all of its own.

    ``unfinished`` keeps tensors that go on in the next bucket. Without a ``place``, a tensor that arrived as
    one block is a view of what arrived, if that lasts; never of a parameter, since some of vLLM's loaders write into
    what they are given.
    """
    at = dict.fromkeys(bucket.receives, 0)
    name = ""
    for sender, block in bucket.arrivals:
        if name != block.item.name and name in bucket.completes:
            yield name, unfinished.pop(name)
        name = block.item.name
        if sender in at:
            data = _slot(arrived.parts[sender], at[sender], block)
            at[sender] += aligned(block.nbytes)
        else:
            data = own(block)
        if place is None and sender in at and block.is_all and arrived.lasting:
            unfinished[name] = data
            continue
        if name not in unfinished:
            unfinished[name] = place(name) if place else data.new_empty(block.item.shape)
        block.hf.view(unfinished[name]).copy_(data)
    if name in bucket.completes:
        yield name, unfinished.pop(name)


def _slot(buffer: torch.Tensor, at: int, block: Block) -> torch.Tensor:
    """Where a block is in a buffer of bytes, as a view of the block's dtype and shape."""
    return buffer[at : at + block.nbytes].view(block.item.dtype).view(block.shape)
