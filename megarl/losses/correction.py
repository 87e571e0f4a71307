"""Weights that correct for the sampling engine not computing exactly what the trainer computes.

Notation: r_t = pi_old / pi_rollout of a token: the *trainer's* policy before the step's updates over what vLLM sampled
with. Weights are [T], without gradient, and multiply the policy loss, not its KL or entropy terms.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megarl.config import LossConfig
from megarl.data.records import MicroBatch
from megarl.losses.kl import MAX_LOG_RATIO


def tis(log_ratio: Tensor, batch: MicroBatch, cfg: LossConfig) -> Tensor:
    """min(r_t, C) (truncated importance sampling, Yao et al., fengyao.notion.site/off-policy-rl)."""
    return _exp(log_ratio).clamp(max=cfg.truncated_importance_sampling_ratio)


def seq_tis(log_ratio: Tensor, batch: MicroBatch, cfg: LossConfig) -> Tensor:
    """min(product of the sequence's r_t, C), the same for all its tokens (verl's sequence level)."""
    ratio = _exp(batch.per_sequence(log_ratio)).clamp(max=cfg.truncated_importance_sampling_ratio)
    return batch.per_token(ratio)


def icepop(log_ratio: Tensor, batch: MicroBatch, cfg: LossConfig) -> Tensor:
    """r_t where it lies within the bounds, else 0 (IcePop, ringtech.notion.site/icepop)."""
    ratio = _exp(log_ratio)
    return torch.where(_within(ratio, cfg), ratio, 0)


def seq_mask_tis(log_ratio: Tensor, batch: MicroBatch, cfg: LossConfig) -> Tensor:
    """r_t, uncut, of sequences whose geometric mean of r_t lies within the bounds; 0 for all of the others (NeMo-RL's
    seq-mask-tis)."""
    mean = _exp(batch.per_sequence(log_ratio) / batch.lengths.clamp(min=1))
    return torch.where(batch.per_token(_within(mean, cfg)), _exp(log_ratio), 0)


CORRECTIONS: dict[str, Callable[[Tensor, MicroBatch, LossConfig], Tensor]] = {
    "tis": tis,
    "seq-tis": seq_tis,
    "icepop": icepop,
    "seq-mask-tis": seq_mask_tis,
}


def rollout_weights(old_logps: Tensor, batch: MicroBatch, cfg: LossConfig) -> Tensor:
    """[T]: the configured weights.

    A token or sequence of weight 0 stays in the loss's denominator, as with slime and NeMo-RL: what is left out makes
    the update smaller, not the rest of it larger.
    """
    assert batch.rollout_logps is not None, "the correction needs rollout_logps"
    log_ratio = torch.where(batch.loss_mask, old_logps - batch.rollout_logps, 0).detach()
    return CORRECTIONS[cfg.truncated_importance_sampling_type](log_ratio, batch, cfg)


def _exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _within(ratio: Tensor, cfg: LossConfig) -> Tensor:
    low, high = cfg.truncated_importance_sampling_ratio_min, cfg.truncated_importance_sampling_ratio
    return (ratio >= low) & (ratio <= high)
