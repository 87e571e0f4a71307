"""One advantage a sample, from comparing it with others: GRPO, RLOO, REINFORCE, ReMax; and which groups to keep.

Shapes: N samples, ``groups`` [N] in any order. A group whose rewards are all equal, and a group of one, has advantage
exactly 0 wherever samples are compared within their group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grouping:
    """G groups in the order of their numbers."""

    member: Tensor  # [N], which of the G groups
    size: Tensor  # [G]

    @staticmethod
    def of(groups: Tensor) -> Grouping:
        _, member, size = torch.unique(groups, return_inverse=True, return_counts=True)
        return Grouping(member, size)

    def sum(self, x: Tensor) -> Tensor:
        """[N] -> [G]."""
        return x.new_zeros(self.size.shape).index_add(0, self.member, x)

    def constant(self, x: Tensor) -> Tensor:
        """[G] bool: all values of the group are equal, which rounding in a sum would hide."""
        x = x.double()
        lowest = x.new_full(self.size.shape, torch.inf).scatter_reduce(0, self.member, x, "amin")
        highest = x.new_full(self.size.shape, -torch.inf).scatter_reduce(0, self.member, x, "amax")
        return lowest == highest

    def centred(self, x: Tensor) -> Tensor:
        """[N] x - its group's mean."""
        return x - (self.sum(x) / self.size)[self.member]

    def leave_one_out(self, x: Tensor) -> Tensor:
        """[N] x - the mean of the others in its group: n / (n - 1) (x - mean); 0 in a group of one."""
        return self.centred(x) * (self.size / (self.size - 1).clamp(min=1))[self.member]

    def others(self, x: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """[N] mean of x over the other samples of the group that are ``counted``; [N] bool, whether there are any."""
        weight = counted.to(x.dtype)
        number = self.sum(weight)[self.member] - weight
        x = torch.where(counted, x, 0)
        return (self.sum(x)[self.member] - x) / number.clamp(min=1), number > 0


def grpo(
    rewards: Tensor,
    groups: Tensor,
    *,
    normalize_by_std: bool = True,
    use_leave_one_out_baseline: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """Group-relative advantage (GRPO, 2402.03300, section 4.1.2): (R - mean) / (std + eps), std over n - 1.

    Args:
        rewards: [N] fp32.
        groups: [N] int64.
        normalize_by_std: False for Dr. GRPO (2503.20783): R - mean only.
        use_leave_one_out_baseline: subtract the mean of the *other* samples, see `rloo`.
        eps: keeps a nearly constant group finite.

    Returns:
        [N].
    """
    grouping, rewards = Grouping.of(groups), rewards.double()
    centred = grouping.centred(rewards)
    advantages = grouping.leave_one_out(rewards) if use_leave_one_out_baseline else centred
    if normalize_by_std:
        others = (grouping.size - 1).clamp(min=1)
        std = (grouping.sum(centred.square()) / others).sqrt()
        advantages = advantages / (std[grouping.member] + eps)
    # Equal rewards may leave rounding noise, which a tiny std would blow up: such a group is exactly zero.
    return torch.where(grouping.constant(rewards)[grouping.member], 0.0, advantages).float()


def rloo(rewards: Tensor, groups: Tensor) -> Tensor:
    """[N] R - the mean of the other samples' R (RLOO, 2402.14740). Of two samples: R1 - R2.

    KL to the reference belongs into the rewards: `shaping.sequence_rewards`.
    """
    return grpo(rewards, groups, normalize_by_std=False, use_leave_one_out_baseline=True)


def reinforce(
    rewards: Tensor, groups: Tensor, *, baseline: str = "leave_one_out", counted: Tensor | None = None
) -> Tensor:
    """[N] R - b (Williams, 1992).

    Args:
        baseline: ``none`` (b = 0), ``batch`` (the mean of all other samples), ``leave_one_out`` (of the others in the
            group). A sample without any other has advantage 0, but for ``none``.
        counted: [N] bool, samples that baselines are made from: NeMo-Aligner leaves truncated ones out. None: all.

    Raises ValueError for another baseline.
    """
    if baseline == "none":
        return rewards.float()
    if baseline not in ("batch", "leave_one_out"):
        raise ValueError(f"baseline {baseline!r} is none of none, batch, leave_one_out")
    grouping = Grouping.of(groups if baseline == "leave_one_out" else torch.zeros_like(groups))
    rewards = rewards.double()
    counted = torch.ones_like(rewards, dtype=torch.bool) if counted is None else counted
    mean, any_others = grouping.others(rewards, counted)
    compared = any_others & ~grouping.constant(rewards)[grouping.member]
    return torch.where(compared, rewards - mean, 0.0).float()


def remax(rewards: Tensor, greedy_rewards: Tensor, *, max_difference: float | None = None) -> Tensor:
    """[N] R(y) - R(greedy response to the same prompt) (ReMax, 2310.10505, algorithm 1).

    The greedy response is the *present* policy's; it gives a baseline only, and is not trained on.

    Args:
        rewards, greedy_rewards: [N], the latter of each sample's prompt.
        max_difference: clip the difference, which the authors' code does at 5; the paper does not.
    """
    difference = rewards - greedy_rewards
    return difference if max_difference is None else difference.clamp(-max_difference, max_difference)


# ---- which groups to keep ----


def keep_mixed(scores: Tensor, groups: Tensor) -> Tensor:
    """[N] bool: samples of groups whose scores are not all equal (DAPO's dynamic sampling, 2503.14476, eq. 11: 0 <
    right answers < group size, for any score). The others teach nothing; so does a group of one, which verl keeps."""
    grouping = Grouping.of(groups)
    return ~grouping.constant(scores)[grouping.member]


def keep_between(correct: Tensor, groups: Tensor, low: float = 0.2, high: float = 0.8) -> Tensor:
    """[N] bool: samples of groups whose pass rate is within [low, high]: neither too easy nor too hard (PRIME,
    2502.01456; its bounds are the defaults)."""
    grouping = Grouping.of(groups)
    rate = grouping.sum(correct.double()) / grouping.size
    tiny = 1e-9  # 1/5 of a group of five is 0.2
    return ((rate >= low - tiny) & (rate <= high + tiny))[grouping.member]


def zero_variance_fraction(rewards: Tensor, groups: Tensor) -> float:
    """Fraction of groups whose rewards are all equal: they teach nothing (TRL's ``frac_reward_zero_std``)."""
    constant = Grouping.of(groups).constant(rewards)
    return constant.double().mean().item() if len(constant) else 0.0
