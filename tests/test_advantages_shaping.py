"""Rewards before they become advantages, and pairs from scored samples, by hand."""

import math

import pytest
import torch

from megarl.advantages import (
    AdaptiveKL,
    choose_pairs,
    missing_eos_penalty,
    sequence_rewards,
    soft_overlong_penalty,
)


def test_soft_overlong_penalty():
    """Limit 100, buffer 20: none up to 80, half of it at 90, all of it from 100 on."""
    lengths = torch.tensor([1, 80, 85, 90, 100, 150])
    got = soft_overlong_penalty(lengths, max_length=100, buffer=20)
    assert got.tolist() == pytest.approx([0, 0, -0.25, -0.5, -1, -1])


def test_missing_eos_penalty():
    got = missing_eos_penalty(torch.tensor([1.0, 1.0]), torch.tensor([True, False]), 0.5)
    assert got.tolist() == [1.0, 0.5]


def test_kl_of_whole_responses_is_taken_off_their_scores():
    kl, mask = torch.tensor([[1.0, math.nan, 3.0], [5.0, 5.0, 5.0]]), torch.tensor([[1, 0, 1], [0, 0, 0]]).bool()
    assert sequence_rewards(torch.tensor([10.0, 7.0]), kl, mask, kl_coef=0.5).tolist() == [8.0, 7.0]


def test_adaptive_kl_moves_by_at_most_a_fifth():
    """1 + 0.2 x 256 / 1024 = 1.05; within the band, 1 + 0.1 x 1/4."""
    controller = AdaptiveKL(0.1, target_kl=6.0, horizon=1024)
    controller.update(60.0, samples=256)
    assert controller.kl_coef == pytest.approx(0.1 * 1.05)
    controller.update(6.6, samples=256)
    assert controller.kl_coef == pytest.approx(0.1 * 1.05 * 1.025)
    controller.update(0.0, samples=256)
    assert controller.kl_coef == pytest.approx(0.1 * 1.05 * 1.025 * 0.95)
    copy = AdaptiveKL(0.5, target_kl=6.0, horizon=1024)
    copy.load_state_dict(controller.state_dict())
    assert copy.kl_coef == controller.kl_coef


GROUPS = torch.tensor([7, 3, 7, 3, 7, 5])


def test_pairs_are_the_best_and_the_worst_of_each_group():
    rewards = torch.tensor([1.0, 0.0, 3.0, 2.0, -1.0, 9.0])
    assert choose_pairs(rewards, GROUPS) == [(2, 4), (3, 1)]  # a group of one has no pair


def test_ties_take_the_first_or_are_dropped():
    rewards = torch.tensor([1.0, 4.0, 1.0, 4.0, 0.0, 9.0])  # 7: 1, 1, 0; 3: 4, 4
    assert choose_pairs(rewards, GROUPS) == [(0, 4), (1, 3)]
    assert choose_pairs(rewards, GROUPS, ties="drop") == [(0, 4)]
    with pytest.raises(ValueError, match="'random' is none of first, drop"):
        choose_pairs(rewards, GROUPS, ties="random")
