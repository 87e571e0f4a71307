"""Routers that know about packs: auxiliary losses that count a pack's tokens once and no padding, and experts that a
rollout has already chosen.

Megatron hands a router hidden states only. What else it has to know of the pack, a `Routing`, travels with the pack's
`PackedLayout`, and `RoutedLayer` gives it to its router right before it is used: so it is the right one where stages
work on several microbatches at a time, and where recomputation runs a layer again.

Shapes: t tokens of a pack that are on this rank, after context and sequence parallelism.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """One pack, as a rank's routers see it."""

    padding: Tensor  # [t] bool: tokens that count for nothing
    tokens: int  # of the whole pack, without padding: what its auxiliary losses are means over
    share: float  # of the step's auxiliary losses, times what the step's gradients will be divided by
    experts: Tensor | None = (
        None  # [t, layers with experts, top-k]: where to send each token; None leaves it to routers
    )


class PackedRouter(TopKRouter):
    """Megatron's router, told of the pack. Without a `Routing` it has no auxiliary losses, and chooses by itself.

    A step's auxiliary loss is the mean over its packs, weighed by their tokens, of ``moe_aux_loss_coeff`` times E sum_i
    f_i P_i (Switch, 2101.03961, eq. 4 to 6): f_i of a pack's choices fell on expert i, P_i is its mean probability.
    Megatron multiplies a pack's loss by this rank's tokens, and divides by the step's count: right where every rank
    counts all of its tokens, which a policy does not that learns from responses, or sequences, alone.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pack: Routing | None = None  # as `RoutedLayer` says
        self.place = 0  # of this layer among those with experts
        self.reported: Tensor | None = None  # this rank's part of the auxiliary losses, weighed by tokens
        self.router_replay = _Replay()
        again = self.config.recompute_granularity == "selective" and "moe" in self.config.recompute_modules
        # Packs that backward will route again, without `RoutedLayer`: in the order in which it has seen them.
        self.waiting: deque[Routing | None] | None = deque() if again else None

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Of ``logits [t, 1, experts]``."""
        if self.waiting is not None and self.training:
            if torch.is_grad_enabled():
                self.pack = self.waiting.popleft()
            else:
                self.waiting.append(self.pack)
        padding = None if self.pack is None else self.pack.padding
        experts = None if self.pack is None else self.pack.experts
        self.router_replay.chosen = None if experts is None else experts[:, self.place]
        return super().routing(logits, padding, *args, **kwargs)

    def begin_step(self) -> None:
        """Forget what a step left behind that did not come to its end."""
        self.reported = None
        if self.waiting is not None:
            self.waiting.clear()

    def is_aux_loss_enabled(self) -> bool:
        """A pack of padding has none: it would be 0 / 0."""
        counts = self.pack is not None and self.pack.tokens > 0
        return counts and bool(super().is_aux_loss_enabled())

    def attach_and_log_load_balancing_loss(
        self, activation: Tensor, aux_loss_coeff: float, aux_loss: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """``aux_loss`` is this rank's part: E sum_i f_i P_i, f_i of the whole pack and P_i of the tokens here. Parts
        add up over the ranks that share a pack, as gradients do."""
        assert self.pack is not None, "without a pack there is no auxiliary loss"
        part = self.pack.tokens * aux_loss.detach() / aux_loss_coeff
        self.reported = part if self.reported is None else self.reported + part
        attached: Tensor = MoEAuxLossAutoScaler.apply(activation, aux_loss * self.pack.share)
        return attached

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Count tokens for the experts' bias. Megatron-core 0.16.1 would mask [t, experts] with [t]."""
        if padding_mask is not None:
            routing_map = routing_map & ~padding_mask[:, None]
        super()._apply_expert_bias(routing_map)


class _Replay:
    """In the place of megatron's `RouterReplay`, which lists all routers of a process in one variable of its class."""

    chosen: Tensor | None = None  # [t, top-k]

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """(scores, experts), each [t, top-k]."""
        if self.chosen is None:
            values, experts = default_compute_topk(scores, topk, num_groups, group_topk)
            return values, experts
        return scores.gather(1, self.chosen), self.chosen


class RoutedLayer(TransformerLayer):
    """A layer with experts."""

    def forward(self, *args: Any, packed_seq_params: Any = None, **kwargs: Any) -> Any:
        self.mlp.router.pack = packed_seq_params.routing
        return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)


def with_packed_router(layer: ModuleSpec) -> ModuleSpec:
    """The spec of a layer with experts, whose router is told of the pack."""
    layer.module = RoutedLayer
    mlp = layer.submodules.mlp
    # megatron-core 0.16.1 has a spec there, 0.19.2 a function.
    submodules = mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules
    submodules.router = PackedRouter
    return layer


def routers(model: torch.nn.Module) -> Iterator[PackedRouter]:
    """Of this rank's layers."""
    return (module for module in model.modules() if isinstance(module, PackedRouter))
