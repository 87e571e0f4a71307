"""Losses of models that score whole responses: reward models, and PRIME's implicit process rewards."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from megarl.config import PreferenceConfig


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
