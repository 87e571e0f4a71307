"""Weights on their way to engines in other processes: which tensors travel together, and the group they travel in.

Both ends compute buckets from the same list of names, shapes and dtypes, so that only bytes are sent. The group is of
its own: neither end's default process group knows of it.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_ALIGNMENT = 16
_POLL_S = 0.0005
Metadata = list[tuple[str, tuple[int, ...], torch.dtype]]


def buckets_of(metadata: Metadata, bucket_bytes: int) -> Iterator[Metadata]:
    """Tensors that travel together; one that is larger than a bucket travels alone."""
    bucket: Metadata = []
    filled = 0
    for name, shape, dtype in metadata:
        nbytes = _aligned(shape, dtype)
        if bucket and filled + nbytes > bucket_bytes:
            yield bucket
            bucket, filled = [], 0
        bucket.append((name, shape, dtype))
        filled += nbytes
    if bucket:
        yield bucket


def shares_of(metadata: Metadata, senders: Iterable[int]) -> list[tuple[int, Metadata]]:
    """Which sender each tensor comes from -> the sender and its tensors, in turn."""
    runs = itertools.groupby(zip(senders, metadata, strict=True), key=lambda pair: pair[0])
    return [(sender, [entry for _, entry in pairs]) for sender, pairs in runs]


def views(bucket: Metadata, device: torch.device) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """New memory for a bucket, as bytes and as its tensors."""
    buffer = torch.empty(sum(_aligned(shape, dtype) for _, shape, dtype in bucket), dtype=torch.uint8, device=device)
    tensors, at = {}, 0
    for name, shape, dtype in bucket:
        tensors[name] = buffer[at : at + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        at += _aligned(shape, dtype)
    return buffer, tensors


def _aligned(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


@dataclass
class Group:
    """A sender, rank 0, and every worker of every engine."""

    group: Any  # dist.ProcessGroupGloo or dist.ProcessGroupNCCL, made directly
    store: dist.TCPStore | None

    @classmethod
    def join(
        cls, store: dist.TCPStore, rank: int, size: int, device: torch.device, timeout_s: float, sender: int = 0
    ) -> Group:
        """A collective over all ``size`` members of the group of this sender."""
        prefixed, timeout = dist.PrefixStore(f"weights-{sender}", store), timedelta(seconds=timeout_s)
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            return cls(dist.ProcessGroupNCCL(prefixed, rank, size, options), store)
        return cls(dist.ProcessGroupGloo(prefixed, rank, size, timeout), store)

    def broadcast(self, buffer: torch.Tensor, watch: Callable[[], None] | None = None) -> None:
        """From the sender to everybody else. ``watch`` is called while this waits, and ends the waiting by raising."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        work = self.group.broadcast([buffer], options)
        while watch is not None and not work.is_completed():
            watch()
            time.sleep(_POLL_S)
        work.wait()

    def close(self) -> None:
        """Leave. Members that wait for this one then fail at once, not at the deadline; unless an exchange is pending
        here, to which gloo holds on until its own."""
        if dist.is_nccl_available() and isinstance(self.group, dist.ProcessGroupNCCL):
            self.group.abort()
        self.group = self.store = None  # gloo closes its connections when nobody holds the group; abort() does not


def fill(bucket: Metadata, weights: Iterator[tuple[str, torch.Tensor]], device: torch.device) -> torch.Tensor:
    """A bucket's bytes, from the next tensors of a stream. Raises ValueError where they are not the ones promised."""
    buffer, tensors = views(bucket, device)
    for name, shape, dtype in bucket:
        given, tensor = next(weights)
        if (given, tuple(tensor.shape), tensor.dtype) != (name, shape, dtype):
            raise ValueError(f"the stream gave {given} {tuple(tensor.shape)} {tensor.dtype} where {name} was announced")
        tensors[name].copy_(tensor)
    return buffer


def described(metadata: Metadata) -> dict[str, Any]:
    """For JSON."""
    return {
        "names": [name for name, _, _ in metadata],
        "shapes": [list(shape) for _, shape, _ in metadata],
        "dtypes": [str(dtype).removeprefix("torch.") for _, _, dtype in metadata],
    }


def understood(names: Iterable[str], shapes: Iterable[Iterable[int]], dtypes: Iterable[str]) -> Metadata:
    """From JSON."""
    return [(n, tuple(s), getattr(torch, d)) for n, s, d in zip(names, shapes, dtypes, strict=True)]
