"""Tensors of which only a box is there: a rank of vLLM keeps a part of most Hugging Face tensors, and gets no more.

vLLM's loaders are given whole tensors and take their part as a view (``narrow``). A `Boxed` has the whole tensor's
shape and the memory of its box. A view that lies inside the box is a plain tensor; whatever reads more is refused. So
a rank needs no memory for the rest, and a box that is not the part that vLLM takes is found at the first push.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class SyncError(RuntimeError):
    """vLLM does not hold the trainer's weights, or would not."""


class Boxed(torch.Tensor):
    """``shape`` of (a view of) the tensor named ``whole``, of which ``box`` is there; the box begins at ``at``."""

    whole: str
    box: torch.Tensor
    at: tuple[int, ...]
    origin: tuple[int, ...]  # where in the whole tensor this view of it begins

    __torch_function__ = torch._C._disabled_torch_function_impl  # whose default makes every result a Boxed

    @staticmethod
    def __new__(
        cls: type[Boxed],
        whole: str,
        shape: Sequence[int],
        box: torch.Tensor,
        at: Sequence[int],
        origin: Sequence[int] | None = None,
    ) -> Boxed:
        self: Boxed = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=box.dtype, device=box.device)
        self.whole, self.box, self.at = whole, box, tuple(at)
        self.origin = tuple(origin) if origin is not None else (0,) * len(self.at)
        return self

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        view = _VIEWS.get(func)
        if view is None:
            (boxed,) = (x for x in args if isinstance(x, Boxed))
            raise SyncError(boxed._refused(func))
        return view(*args, **(kwargs or {}))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Boxed({self.whole}, {self._where(self.shape, (0,) * self.dim())} of which {self._there()} is there)"

    def _refused(self, func: Any) -> str:
        return (
            f"{self.whole}: {func} reads {self._where(self.shape, (0,) * self.dim())} of it, of which only"
            f" {self._there()} was sent to this rank: vLLM takes another part than megarl.rollout.vllm_layout says"
        )

    def _there(self) -> str:
        return self._where(self.box.shape, self.at)

    def _where(self, shape: Sequence[int], at: Sequence[int]) -> str:
        firsts = [a + b for a, b in zip(self.origin, at, strict=True)]
        return "[" + ", ".join(f"{first}:{first + n}" for first, n in zip(firsts, shape, strict=True)) + "]"

    def _view(self, shape: Sequence[int], box: torch.Tensor, at: Sequence[int], origin: Sequence[int]) -> torch.Tensor:
        """A view: a plain tensor if all of it is there, or there is nothing of it."""
        if 0 in shape:
            return box.new_empty(tuple(shape))
        return box if box.shape == tuple(shape) else Boxed(self.whole, shape, box, at, origin)


def _slice(x: Boxed, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> torch.Tensor:
    if step != 1:
        raise SyncError(x._refused(f"a slice with step {step}"))
    dim %= x.dim()
    start, end, _ = slice(start, end).indices(x.shape[dim])
    first, last = x.at[dim], x.at[dim] + x.box.shape[dim]  # of the box
    low = min(max(start, first), last)
    high = max(low, min(end, last))
    return x._view(
        _changed(x.shape, dim, max(0, end - start)),
        x.box.narrow(dim, low - first, high - low),
        _changed(x.at, dim, low - start),
        _changed(x.origin, dim, x.origin[dim] + start),
    )


def _changed(values: Sequence[int], dim: int, value: int) -> tuple[int, ...]:
    return (*values[:dim], value, *values[dim + 1 :])


def _unsqueeze(x: Boxed, dim: int) -> torch.Tensor:
    dim %= x.dim() + 1
    shape, at, origin = ((*v[:dim], new, *v[dim:]) for v, new in ((x.shape, 1), (x.at, 0), (x.origin, 0)))
    return x._view(shape, x.box.unsqueeze(dim), at, origin)


def _select(x: Boxed, dim: int, index: int) -> torch.Tensor:
    dim, index = dim % x.dim(), index % x.shape[dim]
    if not x.at[dim] <= index < x.at[dim] + x.box.shape[dim]:
        raise SyncError(x._refused(f"an index {index}"))
    shape, at, origin = ((*v[:dim], *v[dim + 1 :]) for v in (x.shape, x.at, x.origin))
    return x._view(shape, x.box.select(dim, index - x.at[dim]), at, origin)


def _unbind(x: Boxed, dim: int = 0) -> list[torch.Tensor]:
    return [_select(x, dim, index) for index in range(x.shape[dim])]


def _itself(x: Boxed) -> torch.Tensor:
    return x._view(x.shape, x.box, x.at, x.origin)


# What vLLM's loaders (linear.py, parameter.py, vocab_parallel_embedding.py, fused_moe/) do before they copy.
_VIEWS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.slice.Tensor: _slice,
    torch.ops.aten.unsqueeze.default: _unsqueeze,
    torch.ops.aten.select.int: _select,
    torch.ops.aten.unbind.int: _unbind,
    torch.ops.aten.detach.default: _itself,
    torch.ops.aten.alias.default: _itself,
}
