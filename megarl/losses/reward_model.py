"""Losses of models that score whole responses: reward models, and PRIME's implicit process rewards."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from megarl.config import PreferenceConfig
from megarl.data.records import MicroBatch
from megarl.losses.pairs import pairs_of, per_token


def bradley_terry(
    chosen: Tensor, rejected: Tensor, cfg: PreferenceConfig, margin: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """-log sigmoid(r_w - r_l - margin) + c (r_w + r_l)^2, one a pair (2203.02155, eq. 1; the margin: Llama 2,
    2307.09288, eq. 2; centring: 2312.09244, as TRL has it).

    Args:
        chosen, rejected: [P] scores, of the last token (EOS).
        cfg: c is ``center_rewards_coef``; 0.01 is usual.
        margin: [P], larger where the labels are surer.
    """
    gap = chosen - rejected
    loss = -F.logsigmoid(gap if margin is None else gap - margin)
    if cfg.center_rewards_coef:
        loss = loss + cfg.center_rewards_coef * (chosen + rejected).square()
    return loss, {
        "rewards/chosen": chosen.detach(),
        "rewards/rejected": rejected.detach(),
        "rewards/margins": gap.detach(),
        "rewards/accuracies": (gap > 0).to(loss.dtype),
    }


def bradley_terry_tokens(values: Tensor, batch: MicroBatch, cfg: PreferenceConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """`bradley_terry` of a microbatch of pairs, as a loss of the engine: [T], each token carrying its pair's.

    A sample's response is the one position behind its last token, whose value is the score. With
    ``margin_from_scores`` the margin is the gap of the pair's scores in the data.
    """
    pairs = pairs_of(values, batch)
    margin = pairs.reward_gap if cfg.margin_from_scores else None
    if cfg.margin_from_scores and margin is None:
        raise ValueError("preference.margin_from_scores needs a score of both responses of every pair")
    loss, metrics = bradley_terry(pairs.chosen, pairs.rejected, cfg, margin)
    return per_token(loss, batch), {name: per_token(x, batch) for name, x in metrics.items()}


def implicit_process_reward(ratio: Tensor, outcome: Tensor, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross entropy of sigmoid(beta D) with the outcome, one a response (PRIME, 2502.01456, section 3).

    Trained on outcomes alone, beta log(pi / pi_ref) of a token becomes its process reward; `advantages.prime` uses it.

    Args:
        ratio: [n] D = log pi(y) - log pi_ref(y) of the model that is trained, summed over response tokens.
        outcome: [n] 1 for a right response, 0 for a wrong one, or between.
        beta: 0.05.
    """
    reward = beta * ratio
    loss = -outcome * F.logsigmoid(reward) - (1 - outcome) * F.logsigmoid(-reward)
    right = (reward > 0) == (outcome > 0.5)
    return loss, {"prm_reward": reward.detach(), "prm_accuracy": right.to(loss.dtype)}


def implicit_process_reward_tokens(logps: Tensor, batch: MicroBatch, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
    """`implicit_process_reward` of a microbatch, as a loss of the engine: [T], each token carrying its response's. The
    outcome is the samples' ``score``."""
    assert batch.ref_logps is not None, "the loop computes the reference's log-probabilities"
    ratio = batch.per_sequence(logps - batch.ref_logps)
    outcome = ratio.new_tensor([sample.score or 0.0 for sample in batch.samples])
    loss, metrics = implicit_process_reward(ratio, outcome, beta)
    return batch.per_token(loss), {name: batch.per_token(x) for name, x in metrics.items()}
