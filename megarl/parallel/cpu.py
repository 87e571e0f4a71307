"""Megatron-core on a machine without CUDA.

megatron-core writes ``device="cuda"`` and ``torch.cuda.current_device()`` throughout. `megatron_on_cpu` makes those
calls mean the CPU *while it is entered* and puts everything back on leaving: nothing is patched on import. Every
Engine verb enters it; vLLM, which lives in the same process, never sees it.

Attributes are replaced rather than a ``TorchFunctionMode`` entered, because a mode costs a Python call for every torch
operation of the model and this costs one only for tensor factories.

Checked with megatron-core 0.16.1 and 0.19.2, torch 2.13.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

# Factories that megatron-core calls with device="cuda" (schedules, clip_grads, optimizer, mappings).
_FACTORIES = ("zeros", "ones", "empty", "full", "tensor", "arange", "rand", "randn", "as_tensor")


class _Stream:
    """A CUDA stream where there is none: work is already ordered, so waiting is nothing."""

    device = torch.device("cpu")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def synchronize(self) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


class _Event(_Stream):
    """A CUDA event where there is none: always reached."""

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True


def _without_cuda(device: Any) -> Any:
    """Read a ``device`` argument that says "cuda" as the CPU."""
    kind = device.type if isinstance(device, torch.device) else device
    return "cpu" if isinstance(kind, str) and kind.startswith("cuda") else device


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs:
            kwargs["device"] = _without_cuda(kwargs["device"])
        kwargs.pop("pin_memory", None)  # for faster copies to CUDA; YaRN's table with context parallelism asks for it
        return factory(*args, **kwargs)

    return make


def _cuda_type_name(original: Callable[..., Any]) -> Callable[..., Any]:
    """``tensor.type()`` as DistributedOptimizer wants to read it: it compares with 'torch.cuda.FloatTensor' and
    friends."""

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original(self, *args, **kwargs)
        return original(self).replace("torch.", "torch.cuda.", 1)

    return type_


def _torch_patches() -> list[tuple[Any, str, Any]]:
    patches: list[tuple[Any, str, Any]] = [(torch, name, _on_cpu(getattr(torch, name))) for name in _FACTORIES]
    stream = _Stream()
    patches += [
        (torch.cuda, "current_device", lambda: "cpu"),
        (torch.cuda, "set_device", lambda device: None),
        (torch.cuda, "synchronize", lambda device=None: None),
        (torch.cuda, "empty_cache", lambda: None),
        (torch.cuda, "current_stream", lambda device=None: stream),
        (torch.cuda, "default_stream", lambda device=None: stream),
        (torch.cuda, "stream", lambda s: stream),
        (torch.cuda, "Stream", _Stream),
        (torch.cuda, "Event", _Event),
        (torch.cuda, "manual_seed", torch.default_generator.manual_seed),
        (torch.cuda, "get_rng_state", lambda device=None: torch.get_rng_state()),
        (torch.Tensor, "cuda", lambda self, *args, **kwargs: self),
        (torch.Tensor, "type", _cuda_type_name(torch.Tensor.type)),
    ]
    return patches


def _megatron_patches() -> list[tuple[Any, str, Any]]:
    # Imported here: with CUDA this module must not be the one that first imports megatron.
    from megatron.core.tensor_parallel import mappings
    from megatron.core.tensor_parallel import random as rng
    from megatron.core.transformer.moe import token_dispatcher

    # The tracker itself is left as it is: with these two it forks, saves and restores the CPU generator for real.
    return [
        (rng, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state()),
        (rng, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state)),
        # Only a copy from CUDA turns the sizes of all-to-all's parts into what torch.distributed takes.
        (token_dispatcher, "maybe_move_tensor_to_cpu", _as_if_moved),
        # gloo gathers and scatters parts of one size only; experts' ranks have different numbers of tokens.
        (mappings, "_gather_along_first_dim", _gather_uneven(mappings._gather_along_first_dim)),
        (mappings, "_reduce_scatter_along_first_dim", _scatter_uneven(mappings._reduce_scatter_along_first_dim)),
    ]


def _gather_uneven(even: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def gather(
        x: torch.Tensor, group: dist.ProcessGroup, sizes: list[int] | None = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return even(x, group, sizes, *args, **kwargs)
        padded = x.new_zeros((max(sizes), *x.shape[1:]))
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])

    return gather


def _scatter_uneven(even: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def scatter(
        x: torch.Tensor, group: dist.ProcessGroup, sizes: list[int] | None = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return even(x, group, sizes, *args, **kwargs)
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total.split(sizes)[group.rank()]

    return scatter


def _as_if_moved(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _transformer_engine_patches() -> list[tuple[Any, str, Any]]:
    """What megatron-core 0.16.1 gets wrong about a Transformer Engine that is not installed; 0.19.2 has it so."""
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    if HAVE_TE:
        return []
    return [
        (moe_utils, "te_general_gemm", None),  # the router asks whether it is None, but it is not there
        (multi_latent_attention, "HAVE_TE", False),  # the names it imports are there, but are no classes
    ]


@contextlib.contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Let megatron-core's CUDA calls mean the CPU inside the ``with``. Entering it twice is harmless."""
    with torch.device("cpu"):
        torch.empty(0)  # the first such context makes torch remember which functions they change: not ours below
    with _patched([*_torch_patches(), *_megatron_patches(), *_transformer_engine_patches()]):
        yield


@contextlib.contextmanager
def megatron_on_cuda() -> Iterator[None]:
    """Let megatron-core build and run experts and latent attention where Transformer Engine is not installed."""
    with _patched(_transformer_engine_patches()):
        yield


_ABSENT = object()


@contextlib.contextmanager
def _patched(patches: list[tuple[Any, str, Any]]) -> Iterator[None]:
    saved: list[tuple[Any, str, Any]] = []
    try:
        for owner, name, value in patches:
            saved.append((owner, name, getattr(owner, name, _ABSENT)))
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(saved):
            if value is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
