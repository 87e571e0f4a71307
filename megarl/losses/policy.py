"""Policy-gradient losses over the response tokens of rollouts.

Notation: q = exp(logps - old_logps), A = advantages, both per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megarl.config import LossConfig
from megarl.data.records import MicroBatch
from megarl.losses.kl import kl
from megarl.losses.mismatch import mismatch

# e^20 per token is far outside any clip range; beyond e^88 fp32 overflows. A clamped ratio has no gradient.
_MAX_LOG_RATIO = 20.0


def grpo(logps: Tensor, batch: MicroBatch, cfg: LossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """GRPO (2402.03300, eq. 3): the clipped surrogate, plus KL to the reference, minus an entropy bonus."""
    loss, metrics = ppo_clip(logps, batch, cfg)
    if cfg.kl_loss_coef:
        assert batch.ref_logps is not None, "loss.kl_loss_coef is set, so the loop computes ref_logps"
        penalty = kl(logps, batch.ref_logps, cfg.kl_type)
        loss = loss + cfg.kl_loss_coef * penalty
        metrics["kl_loss"] = penalty
    assert batch.entropy is not None, "the engine sets the entropy before it calls a loss"
    if cfg.entropy_coef:
        loss = loss - cfg.entropy_coef * batch.entropy
    return loss, metrics | {"entropy": batch.entropy}


def ppo_clip(logps: Tensor, batch: MicroBatch, cfg: LossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """max(-A q, -A clip(q, 1 - low, 1 + high)) (PPO, 1707.06347, eq. 7; separate bounds: DAPO, 2503.14476, eq. 10).

    With ``clip_ratio_c`` the loss of a negative advantage is at most -c A (dual clip, 1912.09729, eq. 5). Without
    ``old_logps`` (a single update per rollout) the policy is its own old policy: q is 1, with the gradient of q.
    With truncated importance sampling each token counts by `importance_weights`.
    """
    old_logps = logps.detach() if batch.old_logps is None else batch.old_logps
    log_ratio = (logps - old_logps).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    advantages = batch.advantages
    clipped = ratio.clamp(1 - cfg.clip_ratio_low, 1 + cfg.clip_ratio_high)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    metrics = {"pg_clipfrac": (-advantages * clipped > -advantages * ratio).float(), "ppo_kl": -log_ratio}
    if cfg.clip_ratio_c is not None:
        bound = -cfg.clip_ratio_c * advantages
        dual = (advantages < 0) & (loss > bound)
        loss = torch.where(dual, bound, loss)
        metrics["pg_clipfrac_lower"] = dual.float()
    if cfg.truncated_importance_sampling_type == "tis":
        weights = importance_weights(old_logps, batch, cfg.truncated_importance_sampling_ratio)
        loss = loss * weights
        metrics["tis_weight"] = weights
    if batch.rollout_logps is not None:
        metrics |= mismatch(old_logps, batch.rollout_logps)
    return loss, metrics | {"pg_loss": loss}


def importance_weights(old_logps: Tensor, batch: MicroBatch, cap: float) -> Tensor:
    """[T]: min(pi_old / pi_rollout, cap), without gradient.

    Corrects for the sampling engine not computing exactly what the trainer computes (Yao et al.,
    fengyao.notion.site/off-policy-rl).
    """
    assert batch.rollout_logps is not None, "truncated importance sampling needs rollout_logps"
    log_ratio = (old_logps - batch.rollout_logps).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return log_ratio.exp().clamp(max=cap).detach()
