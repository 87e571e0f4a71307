"""What autograd keeps for the backward pass, in bytes: the measure of recomputation and of context parallelism."""

from __future__ import annotations

from typing import Any

import torch


class KeptActivations:
    """While it is entered, ``bytes`` grows by every storage that an operation saves for backward, each once, but for
    those of ``model``'s parameters. What a recomputed part saves inside is not kept, and does not count."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.bytes = 0
        self._seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._alive: list[torch.Tensor] = []  # so that no address is given out twice
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._saved, lambda x: x)

    def _saved(self, x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._alive.append(x)
            self.bytes += storage.nbytes()
        return x

    def __enter__(self) -> KeptActivations:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        self._alive.clear()


def kept_by_decoder(model: torch.nn.Module) -> list[int]:
    """Bytes that each of the next forward passes keeps in the layers of a model, once they have run. From now on they
    are measured."""
    found: list[int] = []
    forward = model.decoder.forward

    def measured(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        with KeptActivations(model) as kept:
            out = forward(*args, **kwargs)
        found.append(kept.bytes)
        return out

    model.decoder.forward = measured
    return found
