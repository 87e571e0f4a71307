"""Advantages from rewards: pure functions over whole groups, before anything is split over ranks.

Shapes: N samples. ``groups [N]`` says which prompt a sample belongs to, in any order.
"""

from __future__ import annotations

import torch
from torch import Tensor


def grpo(
    rewards: Tensor,
    groups: Tensor,
    *,
    normalize_by_std: bool = True,
    use_leave_one_out_baseline: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """Group-relative advantage (GRPO, 2402.03300, section 4.1.2): (R - mean) / (std + eps), std over n - 1.

    A group of equal rewards, and a group of one, has advantage exactly 0.

    Args:
        rewards: [N] fp32.
        groups: [N] int64.
        normalize_by_std: False for Dr. GRPO (2503.20783): R - mean only.
        use_leave_one_out_baseline: subtract the mean of the *other* samples (RLOO, 2402.14740), which is
            n / (n - 1) times R - mean.
        eps: keeps a nearly constant group finite.

    Returns:
        [N].
    """
    _, member, size = torch.unique(groups, return_inverse=True, return_counts=True)
    rewards = rewards.double()
    mean = _group_sum(rewards, member, size) / size
    centred = rewards - mean[member]
    others = (size - 1).clamp(min=1)
    advantages = centred * (size / others)[member] if use_leave_one_out_baseline else centred
    if normalize_by_std:
        std = (_group_sum(centred.square(), member, size) / others).sqrt()
        advantages = advantages / (std[member] + eps)
    # Equal rewards may leave rounding noise, which a tiny std would blow up: such a group is exactly zero.
    lowest = rewards.new_full(size.shape, torch.inf).scatter_reduce(0, member, rewards, "amin")
    highest = rewards.new_full(size.shape, -torch.inf).scatter_reduce(0, member, rewards, "amax")
    return torch.where((lowest == highest)[member], 0.0, advantages).float()


def zero_variance_fraction(rewards: Tensor, groups: Tensor) -> float:
    """Fraction of groups whose rewards are all equal: they teach nothing (TRL's ``frac_reward_zero_std``)."""
    ids = groups.unique()
    return sum(bool((rewards[groups == i] == rewards[groups == i][0]).all()) for i in ids) / max(len(ids), 1)


def _group_sum(x: Tensor, member: Tensor, size: Tensor) -> Tensor:
    return x.new_zeros(size.shape).index_add(0, member, x)
