"""How blocks get from rank to rank: by a collective, or by reading the memory of the rank that holds them.

Both give the same bytes. gloo sends through sockets even to the process next door, which costs several copies in the
kernel. Where all ranks of a replica compute on CPUs of one host, their parameters therefore lie in shared memory, and
each rank copies what it needs straight out of the others': no buckets are filled, and nothing is sent.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from megarl.parallel.mesh import Mesh
from megarl.weights.exchange import Arrived, BlockOf, pack, packed_bytes, room
from megarl.weights.plan import Block, Bucket, aligned

_SHARED = Path("/dev/shm")  # where torch puts a tensor's memory to share it
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class OnItsWay(Protocol):
    """An exchange that has begun."""

    def wait(self) -> Arrived: ...


class Transport(Protocol):
    """Exchanges the buckets of a plan, in order. Every method is a collective over the ranks of a model replica."""

    def begin(self) -> None:
        """The parameters are what they should be, and stay so until `end`."""

    def send(self, bucket: Bucket) -> OnItsWay:
        """Begin the exchange of the next bucket. The one before it has to be over."""

    def end(self) -> None:
        """Every rank has used what arrived."""


# What this rank holds of the streamed tensors, as it is now.
Parameters = Callable[[], Mapping[str, torch.Tensor]]


def transport(
    mesh: Mesh, buckets: Sequence[Bucket], parameters: Parameters, own: BlockOf, *, stays: bool = True
) -> Transport:
    """The fastest that works between the ranks of ``mesh.replica_group``. Memory that does not stay where it is cannot
    be mapped by others."""
    if stays and mesh.device.type == "cpu" and any(bucket.travels for bucket in buckets):
        shared = SharedMemory(mesh, parameters)
        if shared.join():
            return shared
    return Collective(mesh, own)


class Collective:
    """One all-to-all a bucket."""

    def __init__(self, mesh: Mesh, own: BlockOf) -> None:
        self._mesh = mesh
        self._own = own

    def begin(self) -> None:
        pass  # a bucket is packed when it is sent

    def send(self, bucket: Bucket) -> OnItsWay:
        if not bucket.travels:
            return _Ready(Arrived(_nothing, lasting=True))
        group, device = self._mesh.replica_group, self._mesh.device
        outgoing = torch.empty(packed_bytes(bucket, group.size()), dtype=torch.uint8, device=device)
        sizes = pack(bucket, group.size(), self._own, outgoing)
        coming = room(bucket, group.size())
        incoming = torch.empty(sum(coming), dtype=torch.uint8, device=device)
        work = dist.all_to_all_single(incoming, outgoing, coming, sizes, group=group, async_op=True)
        return _Exchange(outgoing, incoming, coming, work)

    def end(self) -> None:
        pass


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
        return Arrived(Unpacking(self.incoming.split(self.coming)), lasting=True)


class Unpacking:
    """Blocks out of the buffers that came from each rank, in the order in which they were packed."""

    def __init__(self, buffers: Sequence[torch.Tensor]) -> None:
        self._buffers = buffers
        self._at = [0] * len(buffers)

    def __call__(self, sender: int, block: Block) -> torch.Tensor:
        at = self._at[sender]
        self._at[sender] += aligned(block.nbytes)
        return block.in_buffer(self._buffers[sender], at)


@dataclass(frozen=True)
class _Ready:
    """What needs no waiting."""

    arrived: Arrived

    def wait(self) -> Arrived:
        return self.arrived


def _nothing(sender: int, block: Block) -> torch.Tensor:
    raise AssertionError(f"{block.item.name} comes from rank {sender} of the replica in a bucket that does not travel")


@dataclass(frozen=True)
class _Storage:
    """Memory of a process, as others find it: by the number of an open file, whose inode says that it is the one."""

    descriptor: int
    device: int
    inode: int
    nbytes: int


@dataclass(frozen=True)
class _View:
    """A tensor in one of a process's storages."""

    storage: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Offer:
    """A rank's parameters, for others to map. ``boot`` names the running kernel: one host, or containers of one."""

    boot: str
    process: int
    storages: list[_Storage]
    views: dict[str, _View]


class SharedMemory:
    """Parameters in memory that all ranks of the replica map.

    The memory has no name in any file system: it goes when the last process that maps it does, however that ends.
    """

    def __init__(self, mesh: Mesh, parameters: Parameters) -> None:
        self._mesh = mesh
        self._parameters = parameters
        self._shared: list[int] = []  # addresses of the storages that others have mapped
        self._theirs: list[dict[str, torch.Tensor]] = []  # by rank of the replica

    def join(self) -> bool:
        """Move the parameters' memory, in place, to where others can map it. False, on all ranks, where that cannot be:
        ranks on several hosts, /dev/shm too small, a system without /proc. A collective."""
        parameters = self._parameters()
        storages = _storages(parameters)
        if not self._all(_SHARED.is_dir() and _BOOT.is_file() and self._fits(storages)):
            return False
        offers: list[_Offer | None] = [None] * self._mesh.replica_group.size()
        dist.all_gather_object(offers, _offer(parameters, storages), group=self._mesh.replica_group)
        self._shared = [storage.data_ptr() for storage in storages]
        maps = [_open(offer) for offer in offers if offer is not None]
        self._theirs = [found for found in maps if found is not None]
        return self._all(len(self._theirs) == len(offers))

    def begin(self) -> None:
        unmoved = self._shared == [storage.data_ptr() for storage in _storages(self._parameters())]
        if not self._all(unmoved) and not self.join():
            raise RuntimeError(
                f"rank {self._mesh.rank}: parameters moved to where no other can map them; is {_SHARED} full?"
            )

    def send(self, bucket: Bucket) -> OnItsWay:
        return _Ready(Arrived(self._block, lasting=False))

    def end(self) -> None:
        self._all(True)

    def _block(self, sender: int, block: Block) -> torch.Tensor:
        return block.of(self._theirs[sender][block.tensor])

    def _all(self, mine: bool) -> bool:
        """Whether it is so on all ranks; known once all have got here."""
        flag = torch.tensor([mine], dtype=torch.int)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self._mesh.replica_group)
        return bool(flag.item())

    def _fits(self, storages: list[torch.UntypedStorage]) -> bool:
        """Whether /dev/shm has room, if every rank of the job needs as much of it as this one."""
        needed = sum(storage.nbytes() for storage in storages if not storage.is_shared())
        space = os.statvfs(_SHARED)
        return needed * self._mesh.world_size <= space.f_bavail * space.f_frsize


def _storages(parameters: Mapping[str, torch.Tensor]) -> list[torch.UntypedStorage]:
    """Each once: megatron's buffers hold many parameters."""
    return list({x.untyped_storage().data_ptr(): x.untyped_storage() for x in parameters.values()}.values())


def _offer(parameters: Mapping[str, torch.Tensor], storages: list[torch.UntypedStorage]) -> _Offer:
    number = {storage.data_ptr(): k for k, storage in enumerate(storages)}
    views = {
        name: _View(number[x.untyped_storage().data_ptr()], x.storage_offset(), tuple(x.shape), x.stride(), x.dtype)
        for name, x in parameters.items()
    }
    shared = []
    for storage in storages:
        # What torch's multiprocessing calls: it moves the memory, and gives the descriptor that the storage keeps open.
        descriptor, nbytes = storage._share_fd_cpu_()
        status = os.fstat(descriptor)
        shared.append(_Storage(descriptor, status.st_dev, status.st_ino, nbytes))
    return _Offer(_BOOT.read_text(), os.getpid(), shared, views)


def _open(offer: _Offer) -> dict[str, torch.Tensor] | None:
    """Another rank's parameters; None where they cannot be mapped here."""
    if offer.boot != _BOOT.read_text():
        return None
    mapped = [_map(offer.process, storage) for storage in offer.storages]
    out = {}
    for name, view in offer.views.items():
        memory = mapped[view.storage]
        if memory is None:
            return None
        out[name] = memory.view(view.dtype).as_strided(view.shape, view.strides, view.offset)
    return out


def _map(process: int, storage: _Storage) -> torch.Tensor | None:
    """The bytes of another process's memory; None if there is no such process here, or what it has open is not that."""
    with suppress(OSError), open(f"/proc/{process}/fd/{storage.descriptor}", "r+b") as file:
        status = os.fstat(file.fileno())
        if (status.st_dev, status.st_ino) == (storage.device, storage.inode):
            return torch.frombuffer(mmap.mmap(file.fileno(), storage.nbytes), dtype=torch.uint8)
    return None
