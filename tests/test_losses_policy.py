"""Policy losses by hand, in float64, as the engine reduces them: sum of weight x loss over the batch's count."""

import math
from typing import get_args, get_type_hints

import pytest
import torch

from megarl.config import LossConfig
from megarl.data.packing import pack
from megarl.data.records import Sample
from megarl.losses.correction import CORRECTIONS, rollout_weights
from megarl.losses.kl import kl
from megarl.losses.policy import POLICY_LOSSES, grpo

LOG2, NAN = math.log(2), math.nan
FIELDS = ("advantages", "old_logps", "rollout_logps", "ref_logps")


def batch_of(lengths, holes=(), mode="seq-mean-token-mean", **fields):
    """Responses after prompts of one token, so that every position is a response's; ``holes`` are masked."""
    mask = torch.ones(sum(lengths), dtype=torch.bool)
    mask[list(holes)] = False
    samples = [
        Sample(str(i), 0, [0] * (n + 1), 1, loss_mask=part)
        for i, (n, part) in enumerate(zip(lengths, mask.split(list(lengths)), strict=True))
    ]
    batch = pack(samples, torch.device("cpu"), loss_agg_mode=mode)
    batch.weights = batch.weights.double()
    batch.entropy = torch.zeros(sum(lengths), dtype=torch.float64)
    for name, values in fields.items():
        setattr(batch, name, torch.tensor(values, dtype=torch.float64))
    return batch


def reduced(batch, logps, cfg, loss=grpo):
    """(the step's loss, its gradient, metrics), as engine.py reduces."""
    logps = torch.tensor(logps, dtype=torch.float64, requires_grad=True)
    per_token, metrics = loss(logps, batch, cfg)
    total = torch.where(batch.loss_mask, per_token * batch.weights, 0).sum() / max(batch.count, 1)
    total.backward()
    return total.item(), logps.grad.tolist(), metrics


def test_config_names_every_function():
    hints = get_type_hints(LossConfig)
    assert get_args(hints["policy_loss"]) == tuple(POLICY_LOSSES)
    assert set(get_args(hints["truncated_importance_sampling_type"])) == {"none", *CORRECTIONS}


# ---- sequences ----


def test_gspo_by_hand():
    """Mean log-ratios 0.2 and -0.2: s = e^0.2, e^-0.2. Unclipped, a token's gradient is -A s / |y| / B."""
    batch = batch_of([2, 1], advantages=[1, 1, -1], old_logps=[-1.1, -1.3, -1.0])
    cfg = LossConfig(policy_loss="gspo", clip_ratio_low=0.5, clip_ratio_high=0.5)
    total, grad, _ = reduced(batch, [-1.0, -1.0, -1.2], cfg)
    up, down = math.exp(0.2), math.exp(-0.2)
    assert total == pytest.approx((-up + down) / 2)
    assert grad == pytest.approx([-up / 2 / 2, -up / 2 / 2, down / 2])


def test_gspo_clips_whole_sequences():
    batch = batch_of([2, 1], advantages=[1, 1, -1], old_logps=[-1.1, -1.3, -1.0])
    cfg = LossConfig(policy_loss="gspo", clip_ratio_low=0.1, clip_ratio_high=0.1)
    total, grad, metrics = reduced(batch, [-1.0, -1.0, -1.2], cfg)
    assert total == pytest.approx((-1.1 + 0.9) / 2) and grad == [0, 0, 0]
    assert metrics["pg_clipfrac"].tolist() == [1, 1, 1]


def test_sequence_clip_takes_the_ratio_of_whole_responses():
    """Log-ratios 0.1 + 0.3: q = e^0.4, and each token's gradient is -A q / B, not divided by the length."""
    batch = batch_of([2, 1], advantages=[1, 1, -1], old_logps=[-1.1, -1.3, -1.0])
    cfg = LossConfig(policy_loss="sequence_clip", clip_ratio_low=0.9, clip_ratio_high=0.9)
    total, grad, _ = reduced(batch, [-1.0, -1.0, -1.2], cfg)
    assert total == pytest.approx((-math.exp(0.4) + math.exp(-0.2)) / 2)
    assert grad == pytest.approx([-math.exp(0.4) / 2, -math.exp(0.4) / 2, math.exp(-0.2) / 2])


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_on_policy_all_have_the_gradient_of_reinforce(name):
    """One update a rollout: q is 1, and every token's gradient is -A / count; of a whole-response ratio -A."""
    batch = batch_of([2, 1], advantages=[2, 2, -3])
    _, grad, _ = reduced(batch, [-1.0, -2.0, -3.0], LossConfig(policy_loss=name))
    share = 1 if name == "sequence_clip" else 2
    assert grad == pytest.approx([-2 / share / 2, -2 / share / 2, 3 / 2])


# ---- tokens ----


def test_cispo_caps_the_weight_and_keeps_every_gradient():
    ratios = [2.0, 0.1, 1.0]
    batch = batch_of([3], mode="token-mean", advantages=[1, -2, 3], old_logps=[-5 - math.log(q) for q in ratios])
    cfg = LossConfig(policy_loss="cispo", clip_ratio_high=0.28)
    total, grad, metrics = reduced(batch, [-5.0] * 3, cfg)
    assert total == pytest.approx((1.28 * 1 * 5 - 0.1 * 2 * 5 + 3 * 5) / 3)
    assert grad == pytest.approx([-1.28 / 3, 0.1 * 2 / 3, -3 / 3])
    assert metrics["pg_clipfrac"].tolist() == [1, 0, 0]


def test_cispo_may_clip_from_below_too():
    batch = batch_of([1], advantages=[-2], old_logps=[-5 - math.log(0.1)])
    _, grad, _ = reduced(batch, [-5.0], LossConfig(policy_loss="cispo", cispo_clip_low=True))
    assert grad == pytest.approx([0.8 * 2])


def test_reinforce_is_minus_advantage_times_log_probability():
    batch = batch_of([2], mode="token-mean", advantages=[2, -1])
    total, grad, _ = reduced(batch, [-3.0, -0.5], LossConfig(policy_loss="reinforce"))
    assert total == pytest.approx((2 * 3 - 0.5) / 2) and grad == pytest.approx([-1, 0.5])


@pytest.mark.parametrize("gap", [80.0, 1000.0, -80.0, -1000.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_huge_ratios_stay_finite_in_fp32(name, advantage, gap):
    batch = batch_of([1])
    for field, value in zip(FIELDS, (advantage, 0.0, 0.0, 0.0), strict=True):
        setattr(batch, field, torch.tensor([value]))
    for kl_gradient in ("estimator", "score_function", "importance"):
        cfg = LossConfig(
            policy_loss=name,
            kl_loss_coef=0.1,
            kl_gradient=kl_gradient,
            truncated_importance_sampling_type="tis",
        )
        logps = torch.tensor([gap], requires_grad=True)
        loss, _ = grpo(logps, batch, cfg)
        loss.sum().backward()
        assert torch.isfinite(loss).all() and torch.isfinite(logps.grad).all()


# ---- masks ----


def settings():
    for name in POLICY_LOSSES:
        for correction in ("none", *CORRECTIONS):
            yield LossConfig(policy_loss=name, truncated_importance_sampling_type=correction, kl_loss_coef=0.1)


@pytest.mark.parametrize("cfg", settings(), ids=lambda c: f"{c.policy_loss}-{c.truncated_importance_sampling_type}")
@pytest.mark.parametrize("garbage", [1e30, NAN, math.inf])
def test_garbage_in_a_hole_changes_nothing(cfg, garbage):
    """Two tokens around a hole are the same as two tokens, whatever the hole holds; it gets no gradient."""
    values = {"advantages": [1, -2], "old_logps": [-1.1, -0.9], "rollout_logps": [-1.2, -0.8], "ref_logps": [-1, -2]}
    whole = reduced(batch_of([2], **values), [-1.0, -1.0], cfg)
    holed = {name: [a, garbage, b] for name, (a, b) in values.items()}
    total, grad, _ = reduced(batch_of([3], holes=[1], **holed), [-1.0, garbage, -1.0], cfg)
    assert total == pytest.approx(whole[0]) and grad == pytest.approx([whole[1][0], 0, whole[1][1]])


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_a_fully_masked_response_counts_nowhere(name):
    fields = {"advantages": [1, 1, 5], "old_logps": [-1.1, -1.2, -9.0], "rollout_logps": [-1.0, -1.0, -1.0]}
    cfg = LossConfig(policy_loss=name, truncated_importance_sampling_type="seq-mask-tis")
    alone = reduced(batch_of([2], **{key: value[:2] for key, value in fields.items()}), [-1.0, -1.0], cfg)
    total, grad, _ = reduced(batch_of([2, 1], holes=[2], **fields), [-1.0, -1.0, -1.0], cfg)
    assert total == pytest.approx(alone[0]) and grad == pytest.approx([*alone[1], 0])
    total, grad, _ = reduced(batch_of([2, 1], holes=[0, 1, 2], **fields), [-1.0, -1.0, -1.0], cfg)
    assert (total, grad) == (0, [0, 0, 0])


# ---- the sampling engine ----


def test_truncated_importance_sampling_weighs_and_caps():
    cfg = LossConfig(truncated_importance_sampling_type="tis", truncated_importance_sampling_ratio=2.0)
    rollout = [0.0, LOG2, -5.0]
    batch = batch_of([3], mode="token-mean", advantages=[1] * 3, old_logps=[0] * 3, rollout_logps=rollout)
    total, grad, metrics = reduced(batch, [0.0] * 3, cfg)
    assert metrics["tis_weight"].tolist() == pytest.approx([1.0, 0.5, 2.0])
    assert total == pytest.approx(-3.5 / 3) and grad == pytest.approx([-1 / 3, -0.5 / 3, -2 / 3])


@pytest.mark.parametrize(
    "kind, weights",
    [
        ("tis", [2, 0.25, 0.5, 2, 1]),
        ("seq-tis", [0.5, 0.5, 0.5, 2, 2]),  # products 4 x 1/4 x 1/2, and 8 x 1 cut at 2
        ("icepop", [0, 0, 0.5, 0, 1]),  # kept from 1/2 to 2
        ("seq-mask-tis", [4, 0.25, 0.5, 0, 0]),  # geometric means 2^(-1/3), kept, and 2^1.5, not
    ],
)
def test_corrections_by_hand(kind, weights):
    """Two responses whose tokens have ratios 4, 1/4, 1/2 and 8, 1."""
    cfg = LossConfig(truncated_importance_sampling_type=kind)
    rollout = [-math.log(q) for q in (4, 0.25, 0.5, 8, 1)]
    batch = batch_of([3, 2], rollout_logps=rollout)
    got = rollout_weights(torch.zeros(5, dtype=torch.float64), batch, cfg)
    assert got.tolist() == pytest.approx(weights)


def test_what_is_masked_by_the_correction_stays_in_the_denominator():
    cfg = LossConfig(truncated_importance_sampling_type="icepop")
    rollout = [0.0, -math.log(3)]
    batch = batch_of([2], mode="token-mean", advantages=[1, 1], old_logps=[0, 0], rollout_logps=rollout)
    total, grad, _ = reduced(batch, [0.0, 0.0], cfg)
    assert total == pytest.approx(-1 / 2) and grad == pytest.approx([-1 / 2, 0])


def test_a_correction_weighs_the_policy_loss_but_not_its_kl():
    cfg = LossConfig(truncated_importance_sampling_type="tis", kl_loss_coef=0.5, kl_type="k2")
    batch = batch_of([1], advantages=[1], old_logps=[0], rollout_logps=[LOG2], ref_logps=[-2])
    total, grad, _ = reduced(batch, [0.0], cfg)
    assert total == pytest.approx(-0.5 + 0.5 * 2) and grad == pytest.approx([-0.5 + 0.5 * 2])


def test_rollout_logps_can_be_the_old_policy():
    cfg = LossConfig(use_rollout_logps=True, clip_ratio_high=2.0)
    batch = batch_of([1], advantages=[1], old_logps=[-7], rollout_logps=[-LOG2])
    total, grad, metrics = reduced(batch, [0.0], cfg)
    assert total == pytest.approx(-2) and grad == pytest.approx([-2])
    assert metrics["token_mult_prob_error"].item() == pytest.approx(math.exp(7 - LOG2))  # the trainer's own, still


# ---- gradients of KL ----

P = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()  # the policy's logits, and log-probabilities
REFERENCE = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()
OLD = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64).log()


def expected_gradient(kl_type, gradient, sampled_from):
    """Of the estimate, over all three tokens that ``sampled_from`` may sample, with respect to the logits."""
    logits = P.clone().requires_grad_()
    estimates = kl(logits.log_softmax(0), REFERENCE, kl_type, gradient, sampled_from)
    (sampled_from.exp() * estimates).sum().backward()
    return logits.grad


def true_gradient():
    logits = P.clone().requires_grad_()
    logps = logits.log_softmax(0)
    (logps.exp() * (logps - REFERENCE)).sum().backward()
    return logits.grad


@pytest.mark.parametrize(
    "kl_type, gradient, sampled_from",
    [
        ("k2", "estimator", P),
        ("k1", "score_function", P),
        ("k3", "score_function", P),
        ("k1", "importance", OLD),
        ("k3", "importance", OLD),
    ],
)
def test_kl_options_with_the_right_gradient_in_expectation(kl_type, gradient, sampled_from):
    torch.testing.assert_close(expected_gradient(kl_type, gradient, sampled_from), true_gradient())


def test_kl_estimators_with_another_gradient():
    torch.testing.assert_close(expected_gradient("k1", "estimator", P), torch.zeros(3, dtype=torch.float64))
    # k3's own: E[(1 - ref/policy) grad logp], which is policy - reference for a softmax.
    torch.testing.assert_close(expected_gradient("k3", "estimator", P), P.exp() - REFERENCE.exp())


@pytest.mark.parametrize("kl_type", ["k1", "k2", "k3"])
@pytest.mark.parametrize("old", [None, -0.5])
def test_kl_gradients_are_those_of_the_weighted_estimate(kl_type, old):
    """estimate x exp(logps - logps') is NeMo-RL's form, estimate x policy / old policy is DeepSeek-V3.2's."""
    logps = torch.tensor([-0.7, -1.9], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-1.2, -1.0], dtype=torch.float64)
    old_logps = logps.detach() if old is None else torch.full((2,), old, dtype=torch.float64)
    plain = kl(logps, ref, kl_type) * (logps - old_logps).exp()
    (expected,) = torch.autograd.grad(plain.sum(), logps)
    ours = kl(logps, ref, kl_type, "score_function" if old is None else "importance", old_logps)
    (got,) = torch.autograd.grad(ours.sum(), logps)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(got, expected)


def test_a_capped_k3_keeps_the_gradient_of_the_divergence():
    logps = torch.tensor([-1000.0], requires_grad=True)
    kl(logps, torch.zeros(1), "k3", "score_function").sum().backward()
    assert logps.grad.tolist() == [-1000.0]


def test_unknown_kl_names_are_refused():
    with pytest.raises(ValueError, match="'k4' is none of k1, k2, k3"):
        kl(P, REFERENCE, "k4")
    with pytest.raises(ValueError, match="kl_gradient 'exact' is none of estimator, score_function, importance"):
        kl(P, REFERENCE, "k3", "exact")
