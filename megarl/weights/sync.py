"""Weights from the trainer to vLLM, in memory, a bucket at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from megarl.model.family import ModelSpec
from megarl.parallel.mesh import Mesh
from megarl.rollout.vllm_layout import kept_by
from megarl.weights.boxed import SyncError
from megarl.weights.checksums import Checked
from megarl.weights.plan import Box, Holders, Item, Needs
from megarl.weights.rules import CanonTensor
from megarl.weights.stream import Deal, WeightStream


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

    def deal(items: list[Item], holders: Holders) -> tuple[list[Item], Needs]:
        return items, needs

    return deal


def push(stream: WeightStream, receiver: Receiver, *, verify: bool = False) -> None:
    """Give vLLM the trainer's current weights. A collective over all ranks.

    vLLM's cache takes memory only after the last bucket is gone. Beside the weights, a push takes two buckets (none
    where ranks read each other's memory) and this rank's part of the tensors of one of vLLM's modules, which vLLM keeps
    until the module is complete.

    With ``verify``, both sides are compared. The trainer sums up the bits of every tensor in its own parameters, by the
    rules, and each rank those of what has come to it, as it goes into vLLM. Then vLLM's weights are spoiled and sent
    again, and what it computes with must be the same, bit for bit, as before: so all of it comes from what was sent,
    and did the first time. Raises SyncError on all ranks, naming the tensors.
    """
    receiver.wake_weights()
    if verify:
        _verified(stream, receiver)
    else:
        receiver.load_weights(stream)
    receiver.wake_kv_cache()


def _verified(stream: WeightStream, receiver: Receiver) -> None:
    expected = stream.sums()

    def load() -> dict[str, int]:
        arriving = Checked(stream, expected)
        receiver.load_weights(arriving)
        _raise_together(stream.mesh, "tensors reached vLLM with other bits than the trainer's", arriving.wrong)
        return receiver.checksums()

    before = load()
    receiver.spoil()
    after = load()
    differ = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    _raise_together(stream.mesh, "vLLM did not hold what it was sent, in its own tensors", differ)


def _raise_together(mesh: Mesh, problem: str, names: list[str]) -> None:
    everywhere: list[list[str]] = [[] for _ in range(mesh.world_size)]
    dist.all_gather_object(everywhere, names, group=mesh.host_group)
    found = [f"rank {rank}: {', '.join(names)}" for rank, names in enumerate(everywhere) if names]
    if found:
        raise SyncError(f"{problem} (weight_sync.verify):\n  " + "\n  ".join(found))
