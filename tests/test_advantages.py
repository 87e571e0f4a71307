"""Advantages, by hand."""

import math

import pytest
import torch

from megarl.advantages import grpo, keep_between, keep_mixed, reinforce, remax, rloo, zero_variance_fraction

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
    assert zero_variance_fraction(REWARDS, GROUPS) == pytest.approx(2 / 3)
    assert zero_variance_fraction(REWARDS[:0], GROUPS[:0]) == 0


def test_rloo_of_two_samples_is_their_difference():
    got = rloo(torch.tensor([3.0, 1.0, 9.0]), torch.tensor([4, 4, 7]))
    assert got.tolist() == [2.0, -2.0, 0.0]


@pytest.mark.parametrize(
    "baseline, advantages",
    [
        ("none", [1, 5, 2, 5, 3, 7]),
        ("leave_one_out", [1 - 2.5, 0, 2 - 2, 0, 3 - 1.5, 0]),
        ("batch", [r - (23 - r) / 5 for r in (1, 5, 2, 5, 3, 7)]),
    ],
)
def test_reinforce_baselines(baseline, advantages):
    assert reinforce(REWARDS, GROUPS, baseline=baseline).tolist() == pytest.approx(advantages)


def test_reinforce_baselines_can_leave_samples_out():
    """Of 1, 2, 6 the last was truncated: the first is compared with 2, the second with 1, the last with both."""
    rewards, groups = torch.tensor([1.0, 2.0, 6.0, 4.0, 5.0]), torch.tensor([0, 0, 0, 1, 1])
    counted = torch.tensor([True, True, False, False, True])
    got = reinforce(rewards, groups, counted=counted)
    assert got.tolist() == [-1.0, 1.0, 4.5, -1.0, 0.0]  # and the last has nobody to be compared with
    with pytest.raises(ValueError, match="'mean' is none of none, batch, leave_one_out"):
        reinforce(rewards, groups, baseline="mean")


def test_remax_compares_with_the_greedy_response():
    rewards, greedy = torch.tensor([1.0, 0.0, 9.0]), torch.tensor([0.0, 0.0, 1.0])
    assert remax(rewards, greedy).tolist() == [1.0, 0.0, 8.0]
    assert remax(rewards, greedy, max_difference=5.0).tolist() == [1.0, 0.0, 5.0]


def test_dynamic_sampling_keeps_groups_with_both_outcomes():
    correct = torch.tensor([1, 0, 0, 0, 1, 1])
    # Group 0 has 1, 0, 1; group 1 only wrong answers; group 2 one answer.
    assert keep_mixed(correct, GROUPS).tolist() == [True, False, True, False, True, False]
    assert keep_mixed(REWARDS, GROUPS).tolist() == [True, False, True, False, True, False]


def test_pass_rates_within_bounds_are_kept():
    groups = torch.arange(4).repeat_interleave(5)
    correct = torch.tensor([0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1])  # 0, 1/5, 4/5, 1
    assert keep_between(correct, groups)[::5].tolist() == [False, True, True, False]
    assert keep_between(correct, groups, low=0.0, high=0.5)[::5].tolist() == [True, True, False, False]
