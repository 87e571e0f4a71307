"""KTO and BCO, by hand."""

import math

import pytest
import torch

from megarl.config import PreferenceConfig
from megarl.data.packing import pack
from megarl.data.records import Sample
from megarl.losses.unpaired import RewardShift, bco, density_ratio, kl_baseline, kto, mismatched, unpaired_tokens

BETA, LOG2, LOG3 = 0.5, math.log(2), math.log(3)
KTO = PreferenceConfig(loss="kto", beta=BETA, kto_desirable_weight=1.25, kto_undesirable_weight=2.0)
BCO = PreferenceConfig(loss="bco", beta=BETA)
BOTH = torch.tensor([True, False])


def float64(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


# ---- KTO ----


def test_kto_starts_at_half_the_weights():
    ratio = float64(0.0, 0.0)
    loss = kto(ratio, BOTH, 0.0, KTO)
    loss.sum().backward()
    assert loss.tolist() == [1.25 / 2, 2.0 / 2]
    assert ratio.grad.tolist() == [-1.25 * BETA / 4, 2.0 * BETA / 4]
    assert kto(ratio, BOTH, 0.0, PreferenceConfig(loss="kto")).tolist() == [0.5, 0.5]


def test_kto_compares_with_the_baseline():
    """beta (D - z0) = log 3: sigmoid 3/4, whose slope is 3/16."""
    ratio = float64(LOG3 / BETA + 0.7, LOG3 / BETA + 0.7)
    loss = kto(ratio, BOTH, torch.tensor(0.7), KTO)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([1.25 / 4, 2.0 * 3 / 4])
    assert ratio.grad.tolist() == pytest.approx([-1.25 * BETA * 3 / 16, 2.0 * BETA * 3 / 16])


@pytest.mark.parametrize("loss", [kto, bco])
@pytest.mark.parametrize("label", [True, False])
def test_a_batch_of_one_class_is_that_part_of_a_batch_of_both(loss, label):
    cfg = KTO if loss is kto else BCO
    values = torch.tensor([0.3, -0.8], dtype=torch.float64)
    both = loss(values, BOTH, 0.2, cfg)[BOTH == label]
    assert loss(values[BOTH == label], BOTH[BOTH == label], 0.2, cfg).tolist() == both.tolist()
    assert loss(values[:0], BOTH[:0], 0.2, cfg).tolist() == []


@pytest.mark.parametrize("gap", [80.0, 1000.0, -80.0, -1000.0])
@pytest.mark.parametrize("loss, cfg", [(kto, KTO), (bco, BCO)])
def test_huge_gaps_stay_finite_in_fp32(loss, cfg, gap):
    ratio = torch.tensor([gap, gap], requires_grad=True)
    values = loss(ratio, BOTH, 0.0, cfg)
    values.sum().backward()
    assert torch.isfinite(values).all() and torch.isfinite(ratio.grad).all()
    if loss is bco:  # softplus far from 0
        assert values.tolist() == pytest.approx([max(-BETA * gap, 0), max(BETA * gap, 0)], abs=1e-6)
    else:  # all of a weight, or nothing
        assert values.tolist() == pytest.approx([1.25 * (gap < 0), 2.0 * (gap > 0)], abs=1e-6)


def test_the_baseline_is_clamped_after_the_mean_and_has_no_gradient():
    assert kl_baseline(torch.tensor([1.0, -4.0])).item() == 0  # clamping first would give 1/2
    ratio = float64(1.0, 4.0)
    assert kl_baseline(ratio).item() == 2.5 and not kl_baseline(ratio).requires_grad
    assert kl_baseline(torch.zeros(0)).item() == 0


def test_mismatched_responses_are_the_next_ones():
    assert mismatched(["a", "b", "c"]) == [1, 2, 0]
    # Two responses to each prompt are neighbours: by one, a would get its own; by two, none does.
    assert mismatched(["a", "a", "b", "b"]) == [2, 3, 0, 1]
    # a has three of four: any shift gives it two of its own, and the first is taken.
    assert mismatched(["a", "a", "a", "b"]) == [1, 2, 3, 0]


@pytest.mark.parametrize("prompts", [["a"], ["a", "a"]])
def test_a_step_of_one_prompt_has_no_baseline(prompts):
    with pytest.raises(ValueError, match=f"all {len(prompts)} of the step have the same"):
        mismatched(prompts)


# ---- BCO ----


def test_bco_at_its_shift_is_log_2():
    ratio = float64(0.4, 0.4)
    loss = bco(ratio, BOTH, 0.2, BCO)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([LOG2, LOG2]) and ratio.grad.tolist() == pytest.approx([-BETA / 2, BETA / 2])


def test_bco_by_hand():
    """r - shift = log 3: sigmoid 3/4 wanted, 1/4 not."""
    ratio = float64(LOG3 / BETA + 0.4, LOG3 / BETA + 0.4)
    loss = bco(ratio, BOTH, 0.2, BCO)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([math.log(4 / 3), math.log(4)])
    assert ratio.grad.tolist() == pytest.approx([-BETA / 4, BETA * 3 / 4])


def test_density_ratios_weigh_undesirable_responses_only():
    """Odds 3, odds 1/9 cut at 1/2, and a sure classifier cut at 10."""
    weights = density_ratio(torch.tensor([0.75, 0.1, 1.0], dtype=torch.float64))
    assert weights.tolist() == pytest.approx([3, 0.5, 10])
    loss = bco(float64(0.0, 0.0), BOTH, 0.0, BCO, weights[:2])
    assert loss.tolist() == pytest.approx([LOG2, LOG2 / 2])


def test_the_shift_by_classes_and_by_examples():
    """Desirable 4, 2; undesirable -2: class means 3 and -2, mean of all 4/3."""
    expected = {"classes": 0.5, "examples": 4 / 3, "none": 0.0}
    for kind, value in expected.items():
        shift = RewardShift(kind)
        assert shift.value == 0
        shift.update(torch.tensor([4.0]), torch.tensor([True]))
        assert shift.value == (0 if kind == "none" else 4)  # a class that was not seen does not count
        shift.update(torch.tensor([-2.0, 2.0]), torch.tensor([False, True]))
        assert shift.value == pytest.approx(value)
        copy = RewardShift(kind)
        copy.load_state_dict(shift.state_dict())
        assert copy.value == shift.value


# ---- packed ----


def packed(responses, holes=()):
    """``responses``: (label, log-probs), references a half lower."""
    samples, logps = [], []
    for i, (label, values) in enumerate(responses):
        mask = torch.tensor([(len(logps) + t) not in holes for t in range(len(values))])
        ref = torch.tensor(values) - 0.5
        samples.append(Sample(f"p{i}", 0, [0] * (len(values) + 1), 1, ref_logps=ref, loss_mask=mask, desirable=label))
        logps += values
    batch = pack(samples, torch.device("cpu"), loss_agg_mode="seq-mean-token-mean")
    return torch.tensor(logps, dtype=torch.float64, requires_grad=True), batch


def reduce(parts, cfg, **more):
    totals = [
        torch.where(batch.loss_mask, unpaired_tokens(logps, batch, cfg, 0.1, **more)[0] * batch.weights, 0).sum()
        for logps, batch in parts
    ]
    loss = sum(totals) / sum(batch.count for _, batch in parts)
    loss.backward()
    return loss.item(), [x for logps, _ in parts for x in logps.grad.tolist()]


RESPONSES = [(True, [-1.0, -2.0]), (True, [-0.5]), (False, [-0.1, -0.2, -0.3])]  # D = 1, 1/2, 3/2


@pytest.mark.parametrize("cfg", [KTO, BCO], ids=["kto", "bco"])
def test_packed_responses_are_a_mean_over_responses_however_they_are_cut(cfg):
    ratio = float64(1.0, 0.5, 1.5)
    loss = (kto if cfg is KTO else bco)(ratio, torch.tensor([True, True, False]), 0.1, cfg).mean()
    loss.backward()
    spread = [g for g, (_, values) in zip(ratio.grad.tolist(), RESPONSES, strict=True) for _ in values]
    for parts in ([RESPONSES], [RESPONSES[:2], RESPONSES[2:]]):  # the second: one class in each microbatch
        total, grad = reduce([packed(part) for part in parts], cfg)
        assert total == pytest.approx(loss.item()) and grad == pytest.approx(spread)


@pytest.mark.parametrize("cfg", [KTO, BCO], ids=["kto", "bco"])
@pytest.mark.parametrize("garbage", [1e30, math.nan])
def test_garbage_in_a_hole_changes_nothing(cfg, garbage):
    total, grad = reduce([packed([(True, [-1.0, -2.0])])], cfg)
    holed, got = reduce([packed([(True, [-1.0, garbage, -2.0])], holes=[1])], cfg)
    assert holed == pytest.approx(total) and got == pytest.approx([grad[0], 0, grad[1]])


def test_density_goes_by_prompt():
    plain, _ = reduce([packed(RESPONSES)], BCO)
    doubled, _ = reduce([packed(RESPONSES)], BCO, density={"p0": 2, "p1": 2, "p2": 2})
    undesirable = math.log1p(math.exp(BETA * 1.5 - 0.1))
    assert doubled - plain == pytest.approx(undesirable / 3)


def test_metrics_keep_the_classes_apart():
    logps, batch = packed(RESPONSES)
    _, metrics = unpaired_tokens(logps, batch, KTO, 0.1)
    assert metrics["rewards/desirable"].tolist() == pytest.approx([0.5, 0.5, 0.25, 0, 0, 0])
    assert metrics["rewards/undesirable"].tolist() == pytest.approx([0, 0, 0, 0.75, 0.75, 0.75])
    assert metrics["desirable"].tolist() == [1, 1, 1, 0, 0, 0]
