"""Losses: values and gradients a person can derive, in float64."""

import math

import pytest
import torch

from megarl.config import LossConfig, WeightSyncConfig
from megarl.data.packing import pack
from megarl.data.records import Sample
from megarl.losses.kl import kl
from megarl.losses.mismatch import MismatchError, check_mismatch, mismatch, of_fresh
from megarl.losses.policy import grpo, ppo_clip
from megarl.losses.sft import sft


def batch_of(n=1, **fields):
    """One sequence of ``n`` response tokens after a prompt of one."""
    batch = pack([Sample("p", 0, [0] * (n + 1), 1)], torch.device("cpu"))
    batch.entropy = torch.zeros(n, dtype=torch.float64)
    for name, values in fields.items():
        setattr(batch, name, torch.tensor(values, dtype=torch.float64))
    return batch


def value_and_gradient(loss, logps, batch, cfg):
    logps = torch.tensor(logps, dtype=torch.float64, requires_grad=True)
    values, metrics = loss(logps, batch, cfg)
    values.sum().backward()
    return values.tolist(), logps.grad.tolist(), metrics


LOG2 = math.log(2)


@pytest.mark.parametrize(
    "log_ratio, advantage, value, gradient",
    [
        (0.0, 3.0, -3.0, -3.0),  # q = 1: loss -A, gradient -A
        (LOG2, 1.0, -1.2, 0.0),  # q = 2, A > 0: clipped at 1.2
        (LOG2, -1.0, 2.0, 2.0),  # q = 2, A < 0: not clipped, A q
        (-LOG2, 1.0, -0.5, -0.5),  # q = 1/2, A > 0: not clipped
        (-LOG2, -1.0, 0.8, 0.0),  # q = 1/2, A < 0: clipped at 0.8
    ],
)
def test_ppo_clip(log_ratio, advantage, value, gradient):
    values, grads, _ = value_and_gradient(
        ppo_clip, [-1.0 + log_ratio], batch_of(advantages=[advantage], old_logps=[-1.0]), LossConfig()
    )
    assert values == pytest.approx([value]) and grads == pytest.approx([gradient])


def test_clip_higher():
    cfg = LossConfig(clip_ratio_high=0.28)
    values, _, metrics = value_and_gradient(ppo_clip, [LOG2], batch_of(advantages=[1.0], old_logps=[0.0]), cfg)
    assert values == pytest.approx([-1.28])
    assert metrics["pg_clipfrac"].tolist() == [1.0] and metrics["ppo_kl"].tolist() == pytest.approx([-LOG2])


def test_dual_clip_bounds_the_loss_of_negative_advantages():
    batch = batch_of(2, advantages=[-1.0, 1.0], old_logps=[0.0, 0.0])
    values, grads, metrics = value_and_gradient(ppo_clip, [math.log(10), 0.0], batch, LossConfig(clip_ratio_c=3.0))
    assert values == pytest.approx([3.0, -1.0]) and grads == pytest.approx([0.0, -1.0])
    assert metrics["pg_clipfrac_lower"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("gap", [80.0, 1000.0, -80.0, -1000.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_huge_ratios_stay_finite(gap, advantage):
    values, grads, _ = value_and_gradient(
        ppo_clip, [gap], batch_of(advantages=[advantage], old_logps=[0.0]), LossConfig()
    )
    assert math.isfinite(values[0]) and grads == [0.0]


def test_without_old_logps_the_gradient_is_that_of_reinforce():
    values, grads, _ = value_and_gradient(ppo_clip, [-3.0], batch_of(advantages=[2.0]), LossConfig())
    assert values == [-2.0] and grads == [-2.0]


@pytest.mark.parametrize(
    "kl_type, value, gradient",
    [("k1", LOG2, 1.0), ("k2", LOG2**2 / 2, LOG2), ("k3", 0.5 - 1 + LOG2, 1 - 0.5)],
)
def test_kl_estimators(kl_type, value, gradient):
    logps = torch.tensor([0.0], dtype=torch.float64, requires_grad=True)
    out = kl(logps, torch.tensor([-LOG2], dtype=torch.float64), kl_type)  # d = log 2
    out.sum().backward()
    assert out.item() == pytest.approx(value) and logps.grad.item() == pytest.approx(gradient)


@pytest.mark.parametrize("gap", [80.0, 1000.0, -80.0, -1000.0])
@pytest.mark.parametrize("kl_type", ["k1", "k2", "k3"])
def test_kl_of_huge_gaps_is_finite(gap, kl_type):
    logps = torch.tensor([gap], requires_grad=True)
    out = kl(logps, torch.zeros(1), kl_type)
    out.sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(logps.grad).all()


def test_grpo_adds_kl_and_takes_off_entropy():
    cfg = LossConfig(kl_loss_coef=0.1, kl_type="k2", entropy_coef=0.01)
    batch = batch_of(advantages=[1.0], ref_logps=[-2.0], entropy=[3.0])
    values, grads, metrics = value_and_gradient(grpo, [0.0], batch, cfg)
    assert values == pytest.approx([-1.0 + 0.1 * 2.0 - 0.01 * 3.0]) and grads == pytest.approx([-1.0 + 0.1 * 2.0])
    assert metrics["kl_loss"].tolist() == [2.0] and metrics["entropy"].tolist() == [3.0]


def test_sft_is_the_negative_log_likelihood():
    values, _ = sft(torch.tensor([-1.5]), batch_of())
    assert values.tolist() == [1.5]


def test_mismatch_measures():
    out = mismatch(torch.tensor([0.0]), torch.tensor([-LOG2]), torch.tensor([True]))  # d = log 2
    assert out["gen_kl_error"].item() == pytest.approx(2 - 1 - LOG2, rel=1e-6)
    assert out["token_mult_prob_error"].item() == pytest.approx(2.0)
    assert out["rollout_probs_diff_mean"].item() == pytest.approx(0.5)


def test_the_mismatch_is_of_tokens_that_the_present_weights_sampled():
    """Three tokens with d = log 2, 0 and 5, the last one stale: the mean over the first two is (1 - log 2) / 2."""
    out = mismatch(torch.tensor([0.0, 0.0, 0.0]), torch.tensor([-LOG2, 0.0, -5.0]), torch.tensor([True, True, False]))
    means = of_fresh({name: x.mean().item() for name, x in out.items()} | {"loss": 1.0})
    assert means["gen_kl_error"] == pytest.approx((1 - LOG2) / 2, rel=1e-6)
    assert means["token_mult_prob_error"] == pytest.approx((2 + 1) / 2, rel=1e-6) and means["loss"] == 1.0
    assert of_fresh({"gen_kl_error": 0.0, "fresh_fraction": 0.0, "loss": 1.0}) == {"loss": 1.0}


def test_a_mismatch_over_the_threshold_is_an_error_that_says_what_to_look_at():
    metrics = {"gen_kl_error": 0.02, "token_mult_prob_error": 1.0}
    check_mismatch(metrics, WeightSyncConfig())
    check_mismatch(metrics, WeightSyncConfig(max_gen_kl_error=0.1))
    with pytest.raises(
        MismatchError, match=r"gen_kl_error is 2.000e-02, over weight_sync.max_gen_kl_error=0.01.*top_p"
    ):
        check_mismatch(metrics, WeightSyncConfig(max_gen_kl_error=0.01))
    with pytest.raises(MismatchError):  # NaN is over every threshold
        check_mismatch(metrics | {"gen_kl_error": math.nan}, WeightSyncConfig(max_gen_kl_error=0.01))
