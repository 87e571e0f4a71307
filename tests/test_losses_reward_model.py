"""Losses of models that score responses, by hand."""

import math

import pytest
import torch

from megarl.config import PreferenceConfig
from megarl.data.packing import pack
from megarl.data.records import Sample
from megarl.losses.reward_model import (
    bradley_terry,
    bradley_terry_tokens,
    implicit_process_reward,
    implicit_process_reward_tokens,
)

LOG2 = math.log(2)


def float64(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def test_equal_scores_cost_log_2_and_pull_apart_by_a_half():
    chosen, rejected = float64(0.7), float64(0.7)
    loss, metrics = bradley_terry(chosen, rejected, PreferenceConfig())
    loss.sum().backward()
    assert loss.item() == pytest.approx(LOG2)
    assert (chosen.grad.item(), rejected.grad.item()) == pytest.approx((-0.5, 0.5))
    assert metrics["rewards/accuracies"].tolist() == [0.0]  # a tie is not right


def test_a_margin_is_taken_off_the_gap():
    """Gap log 3 + 1, margin 1: sigmoid(log 3) = 3/4."""
    chosen, rejected = float64(1 + math.log(3)), float64(0.0)
    loss, _ = bradley_terry(chosen, rejected, PreferenceConfig(), margin=torch.ones(1, dtype=torch.float64))
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log(4 / 3)) and chosen.grad.item() == pytest.approx(-1 / 4)


def test_centring_holds_the_sum_of_scores_at_zero():
    chosen, rejected = float64(3.0), float64(3.0)
    loss, _ = bradley_terry(chosen, rejected, PreferenceConfig(center_rewards_coef=0.01))
    loss.sum().backward()
    assert loss.item() == pytest.approx(LOG2 + 0.01 * 36)
    assert chosen.grad.item() == pytest.approx(-0.5 + 0.01 * 2 * 6)


@pytest.mark.parametrize("gap", [80.0, 1000.0, -80.0, -1000.0])
def test_huge_gaps_are_finite_in_fp32(gap):
    chosen = torch.tensor([gap], requires_grad=True)
    loss, _ = bradley_terry(chosen, torch.zeros(1), PreferenceConfig())
    loss.sum().backward()
    assert loss.item() == pytest.approx(max(-gap, 0)) and chosen.grad.item() == pytest.approx(-float(gap < 0))
    ratio = torch.tensor([gap], requires_grad=True)
    loss, _ = implicit_process_reward(ratio, torch.zeros(1), beta=1.0)
    loss.sum().backward()
    assert loss.item() == pytest.approx(max(gap, 0)) and ratio.grad.item() == pytest.approx(float(gap > 0))


def test_implicit_process_reward_is_cross_entropy():
    """beta D = log 3: sigmoid 3/4. The gradient is beta (sigmoid - outcome)."""
    ratio = float64(*[math.log(3) / 0.05] * 3)
    loss, metrics = implicit_process_reward(ratio, torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64), beta=0.05)
    loss.sum().backward()
    right, wrong = math.log(4 / 3), math.log(4)
    assert loss.tolist() == pytest.approx([right, wrong, (right + wrong) / 2])
    assert ratio.grad.tolist() == pytest.approx([0.05 * (0.75 - o) for o in (1, 0, 0.5)])
    assert metrics["prm_accuracy"].tolist()[:2] == [1, 0]


def packed(*samples):
    return pack(list(samples), torch.device("cpu"), loss_agg_mode="seq-mean-token-mean")


def test_the_score_of_a_response_is_the_value_behind_its_last_token():
    """Two tokens and EOS, then one token more in place of a response: position 2 is the state behind EOS."""
    batch = packed(
        *(Sample("p", i, [5, 6, 1, 0], 3, score=score) for i, score in enumerate((2.0, 1.5))),
    )
    values = torch.tensor([9.0, 9.0, 1.2, 9.0, 9.0, 0.7], requires_grad=True)
    loss, metrics = bradley_terry_tokens(values, batch, PreferenceConfig(margin_from_scores=True))
    total = (batch.weights * torch.where(batch.loss_mask, loss, 0)).sum() / batch.count
    total.backward()
    assert total.item() == pytest.approx(LOG2)  # the gap of 0.5 is the margin
    assert values.grad.tolist() == pytest.approx([0, 0, -0.5, 0, 0, 0.5])
    assert metrics["rewards/margins"][2].item() == pytest.approx(0.5)


def test_a_margin_needs_scores():
    batch = packed(*(Sample("p", i, [5, 1, 0], 2) for i in range(2)))
    with pytest.raises(ValueError, match="needs a score of both responses"):
        bradley_terry_tokens(torch.zeros(4), batch, PreferenceConfig(margin_from_scores=True))


def test_implicit_process_rewards_of_a_pack_are_those_of_its_responses():
    """Ratios 2 x 0.5 and 1 x -1: beta = 1 gives softplus(-1), and softplus(-1) for a wrong one."""
    samples = [
        Sample("p", 0, [3, 4, 5], 1, ref_logps=torch.tensor([-1.0, -1.0]), score=1.0),
        Sample("p", 1, [3, 4], 1, ref_logps=torch.tensor([-1.0]), score=0.0),
    ]
    logps = torch.tensor([-0.5, -0.5, -2.0])
    loss, metrics = implicit_process_reward_tokens(logps, packed(*samples), beta=1.0)
    assert loss.tolist() == pytest.approx([math.log1p(math.exp(-1))] * 3)
    assert metrics["prm_accuracy"].tolist() == [1.0] * 3
