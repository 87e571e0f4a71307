"""What of a model in training is on the device, and what waits in host memory.

Residency: every verb of the engine brings the memory that it needs onto the device and puts it back; loops never
mention it. Memory leaves as whole storages, in place: megatron's parameters, its buffers and the optimizer's fp32
shards are views of one another, and stay so. While a storage is away it has no bytes; on CUDA its content waits in
pinned host memory, on a CPU in another tensor, by the same code. Gradients begin every update with zeros, so that
their memory is freed and nothing of them is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megarl.config import OffloadConfig
from megarl.model.optimizer import state_tensors

PARTS = ("params", "grads", "optimizer")


@dataclass
class _Away:
    """A storage without its bytes."""

    storage: torch.UntypedStorage
    nbytes: int
    content: Tensor | None  # [nbytes] uint8 in host memory; None: worth nothing


class Residency:
    """The memory of one engine, in three parts: ``params``, ``grads`` and ``optimizer``."""

    def __init__(
        self, cfg: OffloadConfig, chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer | None
    ) -> None:
        self._chunks, self._optimizer = chunks, optimizer
        self._leaves = {part: bool(vars(cfg)[part]) for part in PARTS}
        self._users = dict.fromkeys(PARTS, 0)
        self._away: dict[str, list[_Away]] = {part: [] for part in PARTS}
        for part in PARTS:
            self._put_back(part)

    @contextlib.contextmanager
    def on_device(self, *parts: str) -> Iterator[None]:
        """Hold ``parts`` on the device. May be nested: the outermost puts them back."""
        for part in parts:
            if self._users[part] == 0:
                self._bring(part)
            self._users[part] += 1
        try:
            yield
        finally:
            for part in parts:
                self._users[part] -= 1
                if self._users[part] == 0:
                    self._put_back(part)

    def moves(self, part: str) -> bool:
        """Whether a part's memory comes and goes: then it has another address every time."""
        return self._leaves[part]

    def bytes_on_device(self) -> dict[str, int]:
        """What each part takes there now."""
        return {part: sum(storage.nbytes() for storage in self._storages(part)) for part in PARTS}

    def _bring(self, part: str) -> None:
        for away in self._away[part]:
            away.storage.resize_(away.nbytes)
            if away.content is not None:
                _bytes_of(away.storage).copy_(away.content, non_blocking=True)
        self._away[part] = []

    def _put_back(self, part: str) -> None:
        if not self._leaves[part]:
            return
        storages = self._storages(part)
        self._away[part] = [_copied(storage, keep=part != "grads") for storage in storages]
        on_cuda = any(storage.device.type == "cuda" for storage in storages)
        if on_cuda:
            torch.cuda.current_stream().synchronize()  # the copies have arrived
        for storage in storages:
            storage.resize_(0)
        if on_cuda:
            torch.cuda.empty_cache()  # to the driver, from where vLLM takes it

    def _storages(self, part: str) -> list[torch.UntypedStorage]:
        """Those that have bytes, each once. In fp32 the optimizer updates the parameters themselves: they are none of
        its own memory."""
        taken: set[int] = set()
        if part == "optimizer":
            taken = {x.untyped_storage().data_ptr() for x in [*_params(self._chunks), *_grads(self._chunks)]}
        tensors: dict[str, Callable[[], Iterable[Tensor]]] = {
            "params": lambda: _params(self._chunks),
            "grads": lambda: _grads(self._chunks),
            "optimizer": lambda: [] if self._optimizer is None else state_tensors(self._optimizer),
        }
        found = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors[part]()}
        return [storage for at, storage in found.items() if at not in taken and storage.nbytes()]


class HostWeights:
    """A copy of a model's parameters in host memory (pinned where there is CUDA)."""

    def __init__(self, model: torch.nn.Module) -> None:
        pin = torch.cuda.is_available()
        self.tensors = [torch.empty_like(p, device="cpu", pin_memory=pin).copy_(p.detach()) for p in model.parameters()]

    @torch.no_grad()
    def exchange(self, model: torch.nn.Module) -> None:
        """Swap contents with the model, in place: what was here is now there, bit for bit."""
        for parameter, kept in zip(model.parameters(), self.tensors, strict=True):
            theirs = parameter.detach().clone()
            parameter.copy_(kept)
            kept.copy_(theirs)


def _params(chunks: list[DistributedDataParallel]) -> Iterator[Tensor]:
    """With the distributed optimizer parameters lie in buffers; FP8 ones have no memory of their own."""
    for chunk in chunks:
        yield from (buffer.param_data for buffer in _buffers(chunk) if buffer.param_data is not None)
        yield from (p.detach() for p in chunk.module.parameters() if not is_float8tensor(p))


def _grads(chunks: list[DistributedDataParallel]) -> Iterator[Tensor]:
    for chunk in chunks:
        yield from (buffer.grad_data for buffer in _buffers(chunk))


def _buffers(chunk: DistributedDataParallel) -> list[Any]:
    return [*chunk.buffers, *chunk.expert_parallel_buffers]


def _copied(storage: torch.UntypedStorage, *, keep: bool) -> _Away:
    """The storage, as it will be once its bytes are freed."""
    if not keep:
        return _Away(storage, storage.nbytes(), None)
    # torch keeps pinned memory for the next time: asking the driver for it takes longer than the copy.
    pin = storage.device.type == "cuda"
    content = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pin)
    return _Away(storage, storage.nbytes(), content.copy_(_bytes_of(storage), non_blocking=True))


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
