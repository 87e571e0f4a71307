"""megatron's optimizer and learning-rate schedule, and the Adam it gets where Transformer Engine and Apex are
missing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, distrib_optimizer, get_megatron_optimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megarl.config import Config


class FusedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 1711.05101) by torch's fused kernel, with the state layout of Apex's FusedAdam.

    Megatron expects the step count in the parameter group and exactly ``exp_avg`` and ``exp_avg_sq`` per parameter;
    torch's own AdamW keeps a ``step`` tensor with every parameter, which megatron's checkpoints cannot hold.

    The moments of the first parameters, up to ``offload_fraction`` of all elements, are in host memory, where these are
    updated. (Megatron's own HybridDeviceOptimizer needs CUDA, and makes new dictionaries of state with every step.)
    """

    offload_fraction = 0.0

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,  # megatron-core 0.19 asks, for CUDA graphs of the optimizer
    ) -> None:
        if not adam_w_mode or capturable:
            raise ValueError("FusedAdamW decouples weight decay (adam_w_mode=True) and is not captured in CUDA graphs")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            group["step"] += 1
            on_host = self.on_host()
            here = [p for p in params if p not in on_host]
            self._update(group, here, here, [p.grad for p in here])
            for p in (p for p in params if p in on_host):  # one by one: the host has a copy of one only
                copy = p.detach().to("cpu", copy=True)
                self._update(group, [p], [copy], [p.grad.to("cpu", copy=True)])
                p.copy_(copy)

    def _update(self, group: dict[str, Any], keys: list[Tensor], params: list[Tensor], grads: list[Tensor]) -> None:
        """Update ``params``, which are ``keys`` or copies of them, beside those keys' moments."""
        if not keys:
            return
        state = [self.moments(p) for p in keys]
        # The kernel takes the step count as one tensor a parameter.
        steps = list(torch.full((len(params),), float(group["step"]), device=params[0].device).unbind())
        torch._fused_adamw_(
            params,
            grads,
            [s["exp_avg"] for s in state],
            [s["exp_avg_sq"] for s in state],
            [],
            steps,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )

    def moments(self, p: Tensor) -> dict[str, Tensor]:
        """A parameter's ``exp_avg`` and ``exp_avg_sq``, made at the first call."""
        if not self.state[p]:
            device = "cpu" if p in self.on_host() else p.device
            pin = device == "cpu" and p.device.type == "cuda"
            names = ("exp_avg", "exp_avg_sq")
            self.state[p] = {n: torch.zeros(p.shape, dtype=p.dtype, device=device, pin_memory=pin) for n in names}
        return self.state[p]

    def on_host(self) -> set[Tensor]:
        """The parameters whose moments are in host memory: the same ones throughout, by their order."""
        everything = [p for group in self.param_groups for p in group["params"]]
        left = self.offload_fraction * sum(p.numel() for p in everything)
        chosen = set()
        for p in everything:
            if left <= 0:
                break
            chosen.add(p)
            left -= p.numel()
        return chosen


@contextlib.contextmanager
def _our_adam(device: torch.device, *, on_host: bool) -> Iterator[None]:
    """Let megatron find our Adam for the moment of building, where it would fall back to torch's (without Transformer
    Engine or Apex) or take theirs, which knows CUDA only and keeps nothing ``on_host``."""
    theirs, fallback = megatron_optimizer.Adam, megatron_optimizer.USING_PYTORCH_OPTIMIZER
    if device.type == "cuda" and not fallback and not on_host:
        yield
        return
    megatron_optimizer.Adam = distrib_optimizer.Adam = FusedAdamW
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    try:
        yield
    finally:
        megatron_optimizer.Adam = distrib_optimizer.Adam = theirs
        megatron_optimizer.USING_PYTORCH_OPTIMIZER = fallback


def build_optimizer(cfg: Config, chunks: list[DistributedDataParallel], device: torch.device) -> MegatronOptimizer:
    """Adam over the chunks of a model, sharded over data parallelism with ``use_distributed_optimizer``."""
    o = cfg.optimizer
    config = OptimizerConfig(
        optimizer="adam",
        lr=o.lr,
        min_lr=o.min_lr,
        weight_decay=o.weight_decay,
        adam_beta1=o.adam_beta1,
        adam_beta2=o.adam_beta2,
        adam_eps=o.adam_eps,
        clip_grad=o.clip_grad,
        bf16=cfg.model.dtype == "bf16",
        params_dtype=torch.bfloat16 if cfg.model.dtype == "bf16" else torch.float32,
        use_distributed_optimizer=o.use_distributed_optimizer,
        fp8_recipe=cfg.fp8_cfg.fp8_recipe if cfg.fp8_cfg.enabled else None,
        **_precision_aware(cfg),
    )
    with _our_adam(device, on_host=o.optimizer_cpu_offload):
        optimizer = get_megatron_optimizer(config, chunks, use_gloo_process_groups=False)
    for part in parts_of(optimizer) if o.optimizer_cpu_offload else []:
        part.optimizer.offload_fraction = o.optimizer_offload_fraction
    return optimizer


def _precision_aware(cfg: Config) -> dict[str, Any]:
    """Moments in bf16: 6 + 8 / DP bytes a parameter in place of 6 + 12 / DP."""
    if not cfg.optimizer.use_precision_aware_optimizer:
        return {}
    moments = {"exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.bfloat16}
    return {"use_precision_aware_optimizer": True, "main_params_dtype": torch.float32, **moments}


def parts_of(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Megatron chains an optimizer for experts to that of the rest."""
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [part for part in parts if part.optimizer is not None and not getattr(part, "is_stub_optimizer", False)]


def state_tensors(optimizer: MegatronOptimizer) -> Iterator[Tensor]:
    """What an optimizer keeps on the device: the weights that it updates, and moments that are not on the host."""
    for part in parts_of(optimizer):
        adam = part.optimizer
        on_host = adam.on_host() if isinstance(adam, FusedAdamW) else set()
        for group in adam.param_groups:
            for p in group["params"]:
                yield p.detach()
                moments = () if p in on_host else adam.state.get(p, {}).values()
                yield from (x for x in moments if isinstance(x, Tensor))


def build_scheduler(cfg: Config, optimizer: MegatronOptimizer, total_updates: int) -> OptimizerParamScheduler:
    """Learning rate over optimizer updates: linear warm-up, then constant, linear or cosine decay to ``min_lr``.

    The schedule is stepped before each update, so that the first of w warm-up updates has lr / w. ``min_lr`` would be
    reached one update after the last: with the usual 0 an update would be wasted.
    """
    o = cfg.optimizer
    decay = o.lr_decay_iters or total_updates + 1
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=o.lr,
        min_lr=o.min_lr,
        lr_warmup_steps=o.lr_warmup_iters,
        lr_decay_steps=max(decay, o.lr_warmup_iters + 1),
        lr_decay_style=o.lr_decay_style,
        start_wd=o.weight_decay,
        end_wd=o.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
