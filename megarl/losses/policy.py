"""Policy-gradient losses over the response tokens of rollouts.

Notation: q = exp(logps - old_logps), A = advantages, both per token. Without ``old_logps`` (a single update per
rollout) the policy is its own old policy: q is 1, with the gradient of q. A loss of whole sequences gives each token
its sequence's loss, so that ``seq-mean-token-mean`` is their mean.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megarl.config import LossConfig
from megarl.data.records import MicroBatch
from megarl.losses.correction import rollout_weights
from megarl.losses.kl import MAX_LOG_RATIO, kl
from megarl.losses.mismatch import mismatch

Terms = tuple[Tensor, dict[str, Tensor]]


def grpo(logps: Tensor, batch: MicroBatch, cfg: LossConfig) -> Terms:
    """GRPO (2402.03300, eq. 3) and its relatives: the configured policy loss, weighed by what corrects for the sampling
    engine, plus KL to the reference, minus an entropy bonus."""
    assert batch.entropy is not None, "the engine sets the entropy before it calls a loss"
    logps = torch.where(batch.loss_mask, logps, 0)  # no gradient comes from what is masked, whatever is there
    loss, metrics = POLICY_LOSSES[cfg.policy_loss](logps, batch, cfg)
    if cfg.truncated_importance_sampling_type != "none":
        weights = rollout_weights(_old_logps(logps, batch, cfg), batch, cfg)
        loss = loss * weights
        metrics["tis_weight"] = weights
    metrics["pg_loss"] = loss
    if cfg.kl_loss_coef:
        assert batch.ref_logps is not None, "loss.kl_loss_coef is set, so the loop computes ref_logps"
        penalty = kl(logps, batch.ref_logps, cfg.kl_type, cfg.kl_gradient, _old_logps(logps, batch, cfg))
        loss = loss + cfg.kl_loss_coef * penalty
        metrics["kl_loss"] = penalty
    if cfg.entropy_coef:
        loss = loss - cfg.entropy_coef * batch.entropy
    if batch.rollout_logps is not None:
        trainers = logps.detach() if batch.old_logps is None else batch.old_logps
        metrics |= mismatch(trainers, batch.rollout_logps, batch.fresh)
    return loss, metrics | {"entropy": batch.entropy}


# ---- one function a method ----


def ppo_clip(logps: Tensor, batch: MicroBatch, cfg: LossConfig) -> Terms:
    """max(-A q, -A clip(q, 1 - low, 1 + high)) (PPO, 1707.06347, eq. 7; separate bounds: DAPO, 2503.14476, eq. 10).

    With ``clip_ratio_c`` the loss of a negative advantage is at most -c A (dual clip, 1912.09729, eq. 5).
    """
    log_ratio = logps - _old_logps(logps, batch, cfg)
    loss, metrics = _clipped(log_ratio, batch.advantages, cfg)
    if cfg.clip_ratio_c is not None:
        bound = -cfg.clip_ratio_c * batch.advantages
        dual = (batch.advantages < 0) & (loss > bound)
        loss = torch.where(dual, bound, loss)
        metrics["pg_clipfrac_lower"] = dual.float()
    return loss, metrics


def gspo(logps: Tensor, batch: MicroBatch, cfg: LossConfig) -> Terms:
    """PPO's clip of s = exp(mean over the sequence of logps - old_logps) in place of q (GSPO, 2507.18071, eq. 5, 7).

    Written as its token form (eq. 14): each token's ratio has the value s and the gradient of the token alone, which is
    the same for one advantage a sequence, and allows one a token. Clip ranges are a thousandth of PPO's: 3e-4, 4e-4.
    """
    log_ratio = logps - _old_logps(logps, batch, cfg)
    mean = batch.per_sequence(log_ratio) / batch.lengths.clamp(min=1)
    return _clipped(batch.per_token(mean.detach()) + logps - logps.detach(), batch.advantages, cfg)


def sequence_clip(logps: Tensor, batch: MicroBatch, cfg: LossConfig) -> Terms:
    """PPO's clip of the product of the sequence's q: the ratio of whole responses' probabilities (TRL's RLOO trainer,
    after 2402.14740). It leaves any clip range as responses become longer."""
    log_ratio = batch.per_sequence(logps - _old_logps(logps, batch, cfg))
    advantages = torch.where(batch.loss_mask, batch.advantages, 0)  # a ratio that tokens share is not to see others
    return _clipped(batch.per_token(log_ratio), advantages, cfg)


def cispo(logps: Tensor, batch: MicroBatch, cfg: LossConfig) -> Terms:
    """-w A logps, w = min(q, 1 + high) without gradient: no token loses its gradient (CISPO, MiniMax-M1, 2506.13585,
    eq. 4, 5).

    The paper has no lower bound; ``cispo_clip_low`` adds 1 - low, as verl, NeMo-RL and slime do. TRL's epsilon_high is
    the bound itself: its 5.0 is ``clip_ratio_high=4``.
    """
    log_ratio = (logps - _old_logps(logps, batch, cfg)).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    weights = ratio.clamp(min=1 - cfg.clip_ratio_low if cfg.cispo_clip_low else 0, max=1 + cfg.clip_ratio_high)
    metrics = {"pg_clipfrac": (weights != ratio).float(), "ppo_kl": -log_ratio}
    return -weights * batch.advantages * logps, metrics


def reinforce(logps: Tensor, batch: MicroBatch, cfg: LossConfig) -> Terms:
    """-A logps (Williams, 1992). It takes samples to be the present policy's: one update per rollout."""
    return -batch.advantages * logps, {"ppo_kl": (_old_logps(logps, batch, cfg) - logps).detach()}


POLICY_LOSSES: dict[str, Callable[[Tensor, MicroBatch, LossConfig], Terms]] = {
    "ppo_clip": ppo_clip,
    "gspo": gspo,
    "sequence_clip": sequence_clip,
    "cispo": cispo,
    "reinforce": reinforce,
}


def _old_logps(logps: Tensor, batch: MicroBatch, cfg: LossConfig) -> Tensor:
    """What q divides by; with ``use_rollout_logps`` vLLM's, so that q holds both corrections at once (verl's bypass
    mode)."""
    if cfg.use_rollout_logps:
        assert batch.rollout_logps is not None, "loss.use_rollout_logps is set, so samples have rollout_logps"
        return batch.rollout_logps
    return logps.detach() if batch.old_logps is None else batch.old_logps


def _clipped(log_ratio: Tensor, advantages: Tensor, cfg: LossConfig) -> Terms:
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    whole = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cfg.clip_ratio_low, 1 + cfg.clip_ratio_high)
    return torch.maximum(whole, clipped), {"pg_clipfrac": (clipped > whole).float(), "ppo_kl": -log_ratio}
