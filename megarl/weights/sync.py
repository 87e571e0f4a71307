"""Weights from the trainer to vLLM, in memory, a bucket at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from megarl.model.family import ModelSpec
from megarl.parallel.mesh import Mesh
from megarl.rollout.vllm_layout import kept_by
from megarl.weights.plan import Box, Item, Needs
from megarl.weights.rules import CanonTensor
from megarl.weights.stream import Deal, WeightStream


class SyncError(RuntimeError):
    """vLLM does not hold the trainer's weights."""


class Receiver(Protocol):
    """What takes weights: `megarl.rollout.vllm_engine.VLLMEngine`, in this process; `megarl.rollout.remote` for servers
    in others."""

    def wake_weights(self) -> None: ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None: ...

    def wake_kv_cache(self) -> None: ...

    def checksums(self) -> dict[str, int]: ...

    def spoil(self) -> None: ...


def to_engines(spec: ModelSpec, mesh: Mesh, tensor_parallel_size: int) -> Deal:
    """For engines in the trainers' processes, ``tensor_parallel_size`` consecutive ranks each: every rank gets what its
    part of vLLM keeps."""
    kept = kept_by(spec, tensor_parallel_size)

    def needs(position: int, tensor: CanonTensor, name: str) -> Box:
        return kept(mesh.replica_ranks[position] % tensor_parallel_size, tensor, name)

    def deal(items: list[Item]) -> tuple[list[Item], Needs]:
        return items, needs

    return deal


def push(stream: WeightStream, receiver: Receiver, *, verify: bool = False) -> None:
    """Give vLLM the trainer's current weights. A collective over all ranks.

    vLLM's cache takes memory only after the last bucket is gone, so the peak is weights plus two buckets.

    With ``verify``, vLLM's weights are then spoiled and sent again, and what it computes with must be the same, bit for
    bit, as it was before: so all of it is the trainer's, and was after the first time. Raises SyncError on all ranks,
    naming vLLM's tensors that differ, or that no weight of the trainer's goes into.
    """
    receiver.wake_weights()
    receiver.load_weights(stream)
    if verify:
        _verify(stream, receiver)
    receiver.wake_kv_cache()


def _verify(stream: WeightStream, receiver: Receiver) -> None:
    held = receiver.checksums()
    receiver.spoil()
    receiver.load_weights(stream)
    sent = receiver.checksums()
    differ = sorted(name for name in held.keys() | sent.keys() if held.get(name) != sent.get(name))
    everywhere: list[list[str]] = [[] for _ in range(stream.mesh.world_size)]
    dist.all_gather_object(everywhere, differ, group=stream.mesh.host_group)
    found = [f"rank {rank}: {', '.join(names)}" for rank, names in enumerate(everywhere) if names]
    if found:
        raise SyncError(
            "vLLM did not hold the trainer's weights after a push (weight_sync.verify):\n  " + "\n  ".join(found)
        )
