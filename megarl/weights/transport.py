"""How the bytes of a bucket get from rank to rank: by a collective, or through memory that ranks of one host share.

Both give the same bytes. gloo sends through sockets even to the process next door, which costs several copies in the
kernel. Where all ranks of a replica compute on CPUs of one host, each therefore packs what others need into memory of
its own that they map too, and copies what it needs out of theirs.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from megarl.parallel.mesh import Mesh
from megarl.weights.exchange import Arrived, BlockOf, pack, packed_bytes, room
from megarl.weights.plan import Bucket


class OnItsWay(Protocol):
    """An exchange that has begun."""

    def wait(self) -> Arrived: ...


class Transport(Protocol):
    """Exchanges buckets, in the order of the plan. Every method is a collective over the ranks of a model replica."""

    def send(self, bucket: Bucket, own: BlockOf) -> OnItsWay:
        """Pack what others need and begin the exchange. It reads the parameters now, and not again. The exchange before
        it has to be over, what arrived in the one before that used up."""

    def rest(self) -> None:
        """Give memory back until the next exchange. What arrived has to be used up."""


def transport(mesh: Mesh, buckets: Sequence[Bucket]) -> Transport:
    """The faster one that works between the ranks of ``mesh.replica_group``."""
    shared = None
    if mesh.device.type == "cpu" and len(mesh.replica_ranks) > 1:
        shared = SharedMemory.join(mesh, max(packed_bytes(bucket, len(mesh.replica_ranks)) for bucket in buckets))
    return shared or Collective(mesh)


class Collective:
    """One all-to-all a bucket."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def send(self, bucket: Bucket, own: BlockOf) -> OnItsWay:
        if not bucket.travels:
            return _Nothing()
        group, device = self._mesh.replica_group, self._mesh.device
        outgoing = torch.empty(packed_bytes(bucket, group.size()), dtype=torch.uint8, device=device)
        sizes = pack(bucket, group.size(), own, outgoing)
        coming = room(bucket, group.size())
        incoming = torch.empty(sum(coming), dtype=torch.uint8, device=device)
        work = dist.all_to_all_single(incoming, outgoing, coming, sizes, group=group, async_op=True)
        return _Exchange(outgoing, incoming, coming, work)

    def rest(self) -> None:
        pass  # each exchange has buffers of its own


class _Nothing:
    """A bucket of which nothing travels."""

    def wait(self) -> Arrived:
        return Arrived({}, lasting=True)


@dataclass
class _Exchange:
    """A running all-to-all and its buffers, which have to stay until it is over."""

    outgoing: torch.Tensor
    incoming: torch.Tensor
    coming: list[int]
    work: dist.Work

    def wait(self) -> Arrived:
        self.work.wait()
        self.outgoing = torch.empty(0)
        return Arrived(dict(enumerate(self.incoming.split(self.coming))), lasting=True)


class SharedMemory:
    """Two slots on each rank: one is read while the next is filled.

    A slot begins with where each receiver's part of it starts, as 64-bit numbers. The memory has no name in any file
    system: it goes when the last process that maps it does, however that ends.
    """

    def __init__(self, mesh: Mesh, slots: list[list[torch.Tensor]], own: mmap.mmap) -> None:
        self._group = mesh.replica_group
        self._position = mesh.replica_ranks.index(mesh.rank)
        self._slots = slots  # [rank][slot], bytes
        self._own = own
        self._turn = 0

    @classmethod
    def join(cls, mesh: Mesh, nbytes: int) -> SharedMemory | None:
        """Memory for exchanges of which this rank sends ``nbytes`` at most. None, on all ranks, where one of them
        cannot map another's: on another host, in a container of its own, on a system without memfd. A collective."""
        group = mesh.replica_group
        token = secrets.token_bytes(16)
        own = _create(2 * (_table_bytes(group.size()) + nbytes), token)
        offers: list[tuple[str, bytes] | None] = [None] * group.size()
        dist.all_gather_object(offers, own and (f"/proc/{os.getpid()}/fd/{own[0]}", token), group=group)
        maps = [_open(offer) for offer in offers]
        agreed = torch.tensor([all(found is not None for found in maps)], dtype=torch.int)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=group)
        if own:
            os.close(own[0])  # the maps keep the memory
        if own is None or not agreed.item():
            return None
        slots = [list(torch.frombuffer(m, dtype=torch.uint8).chunk(2)) for m in maps if m is not None]
        return cls(mesh, slots, own[1])

    def send(self, bucket: Bucket, own: BlockOf) -> OnItsWay:
        if not bucket.travels:
            return _Nothing()
        self._turn ^= 1  # every rank has read what is in here: it said so when the exchange before this one was over
        slot, size = self._slots[self._position][self._turn], self._group.size()
        table = _table_bytes(size)
        sizes = pack(bucket, size, own, slot[table:])
        starts = torch.tensor([table, *sizes]).cumsum(0)[:-1]
        slot[: 8 * size].view(torch.int64).copy_(starts)
        return _Filled(self, self._turn, room(bucket, size))

    def arrived(self, turn: int, coming: list[int]) -> Arrived:
        """Wait until every rank has filled its slot, and used up what arrived before."""
        self._meet()
        parts = {}
        for sender, nbytes in enumerate(coming):
            if nbytes:
                slot = self._slots[sender][turn]
                start = int(slot[8 * self._position : 8 * self._position + 8].view(torch.int64))
                parts[sender] = slot[start : start + nbytes]
        return Arrived(parts, lasting=False)

    def rest(self) -> None:
        self._meet()
        self._own.madvise(mmap.MADV_REMOVE)

    def _meet(self) -> None:
        dist.all_reduce(torch.zeros(1), group=self._group)


@dataclass(frozen=True)
class _Filled:
    """This rank's slot is filled."""

    memory: SharedMemory
    turn: int
    coming: list[int]

    def wait(self) -> Arrived:
        return self.memory.arrived(self.turn, self.coming)


def _table_bytes(size: int) -> int:
    return -(-8 * size // 64) * 64  # what follows is aligned for any dtype


def _create(nbytes: int, token: bytes) -> tuple[int, mmap.mmap] | None:
    """New memory that begins with the token, with its file descriptor."""
    if not hasattr(os, "memfd_create") or not hasattr(mmap, "MADV_REMOVE"):
        return None
    descriptor = os.memfd_create("megarl-weights")
    os.ftruncate(descriptor, -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE)
    memory = mmap.mmap(descriptor, 0)
    memory[: len(token)] = token
    return descriptor, memory


def _open(offer: tuple[str, bytes] | None) -> mmap.mmap | None:
    """Another rank's memory; None where its path leads nowhere here, or to something else."""
    if offer is None:
        return None
    path, token = offer
    with contextlib.suppress(OSError, ValueError), open(path, "r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
        if memory[: len(token)] == token:
            return memory
    return None
