"""One advantage a token: returns to go, GAE, REINFORCE++, PRIME, distillation; and whitening over a whole step.

Shapes: N samples, L the longest response; everything [N, L] with a bool ``mask`` of the tokens that the policy wrote.
Time goes over these tokens only: what a tool wrote in between neither takes a step of discount nor cuts off what came
before it, as with verl's and NeMo-RL's GAE. (OpenRLHF, NeMo-Aligner and slime take such tokens for steps of reward and
value 0; verl's REINFORCE++ loses everything before them.) Masked positions may hold anything; results are 0 there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megarl.advantages.groups import Grouping, grpo

Reduce = Callable[[Tensor], Tensor]


def pad(parts: Sequence[Tensor]) -> Tensor:
    """One [response] tensor a sample -> [N, L], zeros behind (False of a mask); [0, 0] without any."""
    if not parts:
        return torch.zeros(0, 0)
    return pad_sequence(list(parts), batch_first=True)


# ---- rewards of tokens ----


def token_rewards(scores: Tensor, mask: Tensor, kl: Tensor | None = None, kl_coef: float = 0.0) -> Tensor:
    """[N, L]: -kl_coef kl_t, plus the score at the last token that the policy wrote (1909.08593, eq. 2).

    Args:
        scores: [N]. Of a response without any token it goes nowhere.
        kl: [N, L] k1 = old_logps - ref_logps of the *sampling* policy, without gradient.
    """
    rewards = torch.zeros(mask.shape, dtype=scores.dtype) if kl is None else -kl_coef * torch.where(mask, kl, 0)
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return rewards + last * scores[:, None]


# ---- credit ----


def reward_to_go(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """[N, L]: G_t = r_t + gamma G of the next token that the policy wrote."""
    returns, ahead = torch.zeros_like(rewards), rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        ahead = torch.where(mask[:, t], rewards[:, t] + gamma * ahead, ahead)
        returns[:, t] = ahead
    return torch.where(mask, returns, 0)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, gae_lambda: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (1506.02438, eq. 16): delta_t = r_t + gamma V_{t+1} - V_t,
    A_t = delta_t + gamma lambda A_{t+1}; returns A_t + V_t, from the advantages as they are before whitening.

    V of the state after the last token is 0, also where a response was cut off at the limit, as in every peer: running
    into the limit is as bad as ending with the same reward.

    Args:
        values: V_t, of the state before token t.

    Returns:
        advantages, returns.
    """
    advantages = torch.zeros_like(values)
    advantage = values.new_zeros(len(values))
    following = advantage
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * gae_lambda * advantage, advantage)
        following = torch.where(mask[:, t], values[:, t], following)
        advantages[:, t] = advantage
    return torch.where(mask, advantages, 0), torch.where(mask, advantages + values, 0)


def reinforce_pp(
    rewards: Tensor, mask: Tensor, *, gamma: float = 1.0, bessel: bool = True, reduce: Reduce | None = None
) -> Tensor:
    """REINFORCE++ (2501.03262): rewards to go, whitened over all tokens of the step.

    Args:
        rewards: `token_rewards` with the KL penalty in them.
        bessel, reduce: see `whiten`.
    """
    return whiten(reward_to_go(rewards, mask, gamma), mask, bessel=bessel, reduce=reduce)


def reinforce_pp_baseline(
    scores: Tensor,
    groups: Tensor,
    mask: Tensor,
    *,
    here: Tensor | None = None,
    bessel: bool = True,
    reduce: Reduce | None = None,
) -> Tensor:
    """REINFORCE++ with a baseline (2501.03262): R - the group's mean, for every token, whitened over the step.

    Args:
        scores: [N], without KL, which is a k2 loss here.
        here: where only n of the N samples' tokens are here, their numbers [n] (``mask`` is then [n, L], and so is the
            result). None: all are here.
        bessel, reduce: see `whiten`.
    """
    centred = grpo(scores, groups, normalize_by_std=False)
    centred = centred if here is None else centred[here]
    return whiten(centred[:, None] * mask, mask, bessel=bessel, reduce=reduce)


def process_means(process_rewards: Tensor, mask: Tensor) -> Tensor:
    """[N] rbar of `prime`; NaN of a response without tokens."""
    return torch.where(mask, process_rewards, 0).double().sum(1) / mask.sum(1)


def prime(
    process_rewards: Tensor,
    outcomes: Tensor,
    groups: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    process_coef: float = 1.0,
    outcome_coef: float = 1.0,
    here: Tensor | None = None,
    means: Tensor | None = None,
) -> Tensor:
    """[N, L]: sum over s >= t of gamma^(s - t) (r_s - mean of the others' rbar), plus o - mean of the others' o (PRIME,
    2502.01456, section 3; rbar is the mean process reward of a response).

    verl's recipe differs: it drops the last token's r, scales r_t by n / (n - 1), weighs both terms by 5, divides the
    first by its largest absolute value, and whitens the sum. A response without tokens has no rbar, and one that
    there is no other rbar for has no first term.

    Args:
        process_rewards: r_t = beta log(pi / pi_ref) of the implicit process reward model.
        outcomes: [N] o.
        here, means: where only n of the N samples' tokens are here, their numbers [n] (tokens are then [n, L], and so
            is the result) and `process_means` [N] of all. None: all are here.
    """
    grouping = Grouping.of(groups)
    rewards, outcomes = torch.where(mask, process_rewards, 0).double(), outcomes.double()
    if here is None or means is None:
        here, means = torch.arange(len(mask)), process_means(process_rewards, mask)
    baseline, compared = (x[here] for x in grouping.others(means.nan_to_num(), ~means.isnan()))
    process = reward_to_go(torch.where(compared[:, None], rewards - baseline[:, None], 0), mask, gamma)
    outcome = torch.where(grouping.constant(outcomes)[grouping.member], 0, grouping.leave_one_out(outcomes))
    advantages = process_coef * process + outcome_coef * outcome[here, None]
    return torch.where(mask, advantages, 0).to(process_rewards.dtype)


def distillation(old_logps: Tensor, teacher_logps: Tensor, mask: Tensor) -> Tensor:
    """[N, L]: log pi_teacher - log pi_old, token by token without anything to go: with it as advantage, the policy
    gradient is that of KL(policy || teacher) on the policy's own samples (MiniLLM, 2306.08543; GKD, 2306.13649)."""
    return torch.where(mask, teacher_logps - old_logps, 0)


# ---- whitening ----


def moments(x: Tensor, mask: Tensor) -> Tensor:
    """[3] float64: count, sum and sum of squares over the tokens. Moments of parts add up to those of the whole."""
    x = torch.where(mask, x, 0).double()
    return torch.stack([mask.sum().double(), x.sum(), x.square().sum()])


def whiten(
    x: Tensor,
    mask: Tensor,
    *,
    bessel: bool = True,
    eps: float = 1e-8,
    reduce: Reduce | None = None,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) over all tokens of the step: a long response has more weight than a short one.

    A single token becomes 0; without any, everything is 0.

    Args:
        bessel: variance over n - 1 (verl, TRL, slime, NeMo-RL's GAE), not n (OpenRLHF, NeMo-Aligner, NeMo-RL's
            REINFORCE++).
        reduce: adds up `moments` over the ranks that hold parts of the step. None: all of it is here.
    """
    part = moments(x, mask)
    count, total, squares = (part if reduce is None else reduce(part)).unbind()
    mean = total / count.clamp(min=1)
    variance = (squares - count * mean.square()).clamp(min=0) / (count - int(bessel)).clamp(min=1)
    return torch.where(mask, (x.double() - mean) * (variance + eps).rsqrt(), 0).to(x.dtype)
