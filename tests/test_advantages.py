"""Advantages, by hand."""

import math

import torch

from megarl.advantages import grpo, zero_variance_fraction

GROUPS = torch.tensor([0, 1, 0, 1, 0, 2])
REWARDS = torch.tensor([1.0, 5.0, 2.0, 5.0, 3.0, 7.0])


def test_grpo_normalises_within_groups():
    # Group 0 holds 1, 2, 3: mean 2, std over n - 1 is 1. Group 1 is constant, group 2 has one sample: exactly zero.
    got = grpo(REWARDS, GROUPS, eps=0.0)
    assert got.tolist()[1::2] == [0.0, 0.0, 0.0]
    torch.testing.assert_close(got[::2], torch.tensor([-1.0, 0.0, 1.0]))


def test_eps_is_added_to_the_standard_deviation():
    got = grpo(torch.tensor([0.0, 1.0]), torch.tensor([0, 0]), eps=0.5)
    torch.testing.assert_close(got[1], torch.tensor(0.5 / (math.sqrt(0.5) + 0.5)))


def test_dr_grpo_only_centres():
    got = grpo(REWARDS, GROUPS, normalize_by_std=False)
    assert got.tolist() == [-1.0, 0.0, 0.0, 0.0, 1.0, 0.0]


def test_leave_one_out_subtracts_the_mean_of_the_others():
    got = grpo(REWARDS, GROUPS, normalize_by_std=False, use_leave_one_out_baseline=True)
    assert got.tolist() == [1 - 2.5, 0.0, 2 - 2.0, 0.0, 3 - 1.5, 0.0]


def test_equal_rewards_that_do_not_add_up_exactly_are_still_zero():
    # 0.1 added ten times is not 1.0 in binary: mean - reward is 1e-17, and eps 0 would divide 0 by 0.
    got = grpo(torch.full((10,), 0.1), torch.zeros(10, dtype=torch.int64), eps=0.0)
    assert got.tolist() == [0.0] * 10


def test_zero_variance_fraction():
    assert zero_variance_fraction(REWARDS, GROUPS) == 2 / 3
