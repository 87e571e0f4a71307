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
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megarl.config import Config


class FusedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 1711.05101) by torch's fused kernel, with the state layout of Apex's FusedAdam.

    Megatron expects the step count in the parameter group and exactly ``exp_avg`` and ``exp_avg_sq`` per parameter;
    torch's own AdamW keeps a ``step`` tensor with every parameter, which megatron's checkpoints cannot hold.
    """

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
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            state = [self.state[p] for p in params]
            # The kernel takes the step count as one tensor a parameter.
            steps = list(torch.full((len(params),), float(group["step"]), device=params[0].device).unbind())
            torch._fused_adamw_(
                params,
                [p.grad for p in params],
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


@contextlib.contextmanager
def _our_adam(device: torch.device) -> Iterator[None]:
    """Let megatron find our Adam for the moment of building, where it would fall back to torch's (without Transformer
    Engine
    or Apex) or take theirs, which knows CUDA only."""
    theirs, fallback = megatron_optimizer.Adam, megatron_optimizer.USING_PYTORCH_OPTIMIZER
    if device.type == "cuda" and not fallback:
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
    )
    with _our_adam(device):
        return get_megatron_optimizer(config, chunks, use_gloo_process_groups=False)


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
