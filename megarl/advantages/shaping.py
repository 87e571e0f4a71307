"""What is done to rewards before they become advantages, which samples count, and pairs from scored samples.

Shapes: N samples; ``groups`` [N] in any order.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """[N]: scores - kl_coef x the sum of k1 over the response: KL in the reward of methods that credit whole responses
    (RLOO, 2402.14740).

    Args:
        kl: [N, L] old_logps - ref_logps of the sampling policy.
    """
    return scores - kl_coef * torch.where(mask, kl, 0).sum(1)


def soft_overlong_penalty(lengths: Tensor, max_length: int, buffer: int) -> Tensor:
    """[N], to be added to rewards: 0 up to max_length - buffer, then falling linearly to -1 at max_length, -1 beyond
    (DAPO, 2503.14476, eq. 13).

    Args:
        lengths: [N] response tokens.
        max_length: DAPO's 20480.
        buffer: the last so many tokens of it: DAPO's 4096.
    """
    return ((max_length - buffer - lengths.double()) / buffer).clamp(-1, 0).float()


def missing_eos_penalty(scores: Tensor, finished: Tensor, penalty: float) -> Tensor:
    """[N]: scores less ``penalty`` where the response did not end by itself (TRL's missing_eos_penalty)."""
    return torch.where(finished, scores, scores - penalty)


def choose_pairs(rewards: Tensor, groups: Tensor, *, ties: str = "first") -> list[tuple[int, int]]:
    """(chosen, rejected) rows, the best and the worst sample of each group (online DPO, 2402.04792), in the order of
    the groups' first rows.

    Args:
        ties: of a group of equal rewards, ``first`` takes its first sample for the chosen one and its last for the
            other, so that the pair still trains, on noise (TRL, verl); ``drop`` leaves the group out.

    A group of one has no pair. Raises ValueError for other ``ties``.
    """
    if ties not in ("first", "drop"):
        raise ValueError(f"ties {ties!r} is none of first, drop")
    rows: dict[int, list[int]] = {}
    for row, group in enumerate(groups.tolist()):
        rows.setdefault(group, []).append(row)
    pairs = []
    for members in rows.values():
        scores = rewards[members].tolist()
        chosen = scores.index(max(scores))
        rejected = len(scores) - 1 - scores[::-1].index(min(scores))
        if len(members) > 1 and (ties == "first" or max(scores) > min(scores)):
            pairs.append((members[chosen], members[rejected]))
    return pairs


class AdaptiveKL:
    """The coefficient of the KL penalty in rewards, held near a target KL (1909.08593, section 2.2):
    e = clip(KL / target - 1, -0.2, 0.2); coef *= 1 + e x samples / horizon. Without a target it stays. Part of a
    checkpoint."""

    def __init__(self, kl_coef: float, target_kl: float | None, horizon: int) -> None:
        self.kl_coef = kl_coef
        self.target_kl = target_kl
        self.horizon = horizon

    def update(self, kl: float, samples: int) -> None:
        """After a step of ``samples`` responses, of the whole job, whose KL to the reference was ``kl`` on average:
        sums over responses with a target for responses, means over tokens with one for tokens."""
        if self.target_kl is None:
            return
        error = min(max(kl / self.target_kl - 1, -0.2), 0.2)
        self.kl_coef *= 1 + error * samples / self.horizon

    def state_dict(self) -> dict[str, float]:
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.kl_coef = state["kl_coef"]
