"""Every loss that the engine calls, where losses go wrong: rows without a token that counts, garbage where nothing
counts, holes, responses of one token, log-ratios of 80 and 1000, one class alone in a microbatch.

Values and gradients are the engine's, sum of weight x loss over the count, in float64. What they should be is computed
with 60 digits, or is that of the same microbatch without what should not matter.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import mpmath
import pytest
import torch
from mpmath import mp

from megarl.config import LossConfig, PreferenceConfig
from megarl.data.packing import pack
from megarl.data.records import Sample
from megarl.losses.policy import POLICY_LOSSES, grpo
from megarl.losses.preference import PAIR_LOSSES, longpo_tokens, preference_tokens
from megarl.losses.reward_model import bradley_terry_tokens, implicit_process_reward_tokens
from megarl.losses.sft import sft
from megarl.losses.unpaired import unpaired_tokens
from megarl.losses.value import value

mp.dps = 60
NAN = math.nan
PROMPT = 3  # tokens: two positions before a response's first
FIELDS = {"ref": "ref_logps", "old": "old_logps", "values": "values", "returns": "returns"}


@dataclass
class Row:
    """A response; all numbers are exact in fp32, which microbatches hold."""

    logps: list[float]  # or values
    ref: float = -1.0
    old: float = -1.0
    advantage: float = 1.0
    values: float = 0.25
    returns: float = 0.5
    score: float = 0.0
    desirable: bool = True
    holes: tuple[int, ...] = ()
    garbage: float = 0.0  # in holes, and in front of the response
    prompt: int = PROMPT


@dataclass
class Case:
    loss: Callable
    rows: list[Row]
    unit: int = 1  # rows that belong together
    mode: str = "seq-mean-token-mean"


def outcome(case, rows):
    """(loss, one list of gradients a row: of its response)."""
    samples, logps = [], []
    for i, row in enumerate(rows):
        mask = torch.tensor([k not in row.holes for k in range(len(row.logps))], dtype=torch.bool)
        kept = {name: torch.where(mask, vars(row)[short], row.garbage).float() for short, name in FIELDS.items()}
        sample = Sample(f"p{i // case.unit}", i % case.unit, [0] * (row.prompt + len(row.logps)), row.prompt, **kept)
        sample.loss_mask, sample.advantage = mask, row.advantage
        sample.score, sample.desirable = row.score, row.desirable
        samples.append(sample)
        before = [row.garbage] * (row.prompt - 1)
        logps += [*before, *(x if m else row.garbage for x, m in zip(row.logps, mask.tolist(), strict=True))]
    batch = pack(samples, torch.device("cpu"), loss_agg_mode=case.mode)
    for name in ("weights", "advantages", "ref_logps", "old_logps", "old_values", "returns"):
        setattr(batch, name, vars(batch)[name].double())
    logps = torch.tensor(logps, dtype=torch.float64, requires_grad=True)
    batch.entropy = torch.zeros_like(logps.detach())
    per_token, _ = case.loss(logps, batch)
    total = torch.where(batch.loss_mask, per_token * batch.weights, 0).sum() / max(batch.count, 1)
    total.backward()
    parts = logps.grad.split([row.prompt - 1 + len(row.logps) for row in rows])
    assert all((part[: row.prompt - 1] == 0).all() for part, row in zip(parts, rows, strict=True))
    return total.item(), [part[row.prompt - 1 :].tolist() for part, row in zip(parts, rows, strict=True)]


# ---- the losses ----

TOKENS = [Row([-0.5, -1.5, -0.25]), Row([-2.0, -1.125], advantage=-0.5, score=1.0, desirable=False)]
PAIRS = [
    Row([-0.5, -1.5], score=2.0),
    Row([-0.75, -1.25, -3.0], score=1.0),
    Row([-2.5], score=1.0),
    Row([-0.25, -0.5], score=3.0),
]
# Of a chosen row all but the first token is response.
LONG = [Row([-0.25, -0.75, *row.logps], prompt=1) if i % 2 == 0 else row for i, row in enumerate(PAIRS)]
BETA, SMOOTHING = 0.5, 0.125


def preference_config(name):
    smoothing = SMOOTHING if name in ("dpo", "robust") else 0.0
    return PreferenceConfig(loss=name, beta=BETA, label_smoothing=smoothing, dpop_lambda=2.0)


CASES = {
    name: Case(
        partial(grpo, cfg=LossConfig(policy_loss=name, clip_ratio_c=1.5 if name == "ppo_clip" else None)), TOKENS
    )
    for name in POLICY_LOSSES
}
CASES |= {f"{name}, token-mean": Case(CASES[name].loss, TOKENS, mode="token-mean") for name in ("ppo_clip", "cispo")}
CASES |= {
    f"kl {kl}, {gradient}": Case(
        partial(grpo, cfg=LossConfig(policy_loss="reinforce", kl_loss_coef=0.5, kl_type=kl, kl_gradient=gradient)),
        TOKENS,
    )
    for kl in ("k1", "k2", "k3")
    for gradient in ("estimator", "importance")
}
CASES |= {"value": Case(partial(value, cfg=LossConfig(value_clip=0.25)), TOKENS), "sft": Case(sft, TOKENS)}
CASES |= {
    name: Case(partial(preference_tokens, cfg=preference_config(name)), PAIRS, unit=2)
    for name in PAIR_LOSSES
    if name != "longpo"
}
CASES["longpo"] = Case(
    partial(longpo_tokens, cfg=preference_config("longpo"), prompt_lengths={f"p{i}": PROMPT for i in range(9)}),
    LONG,
    unit=2,
)
CASES["bradley_terry"] = Case(partial(bradley_terry_tokens, cfg=PreferenceConfig(center_rewards_coef=0.5)), PAIRS, 2)
CASES["implicit_process_reward"] = Case(partial(implicit_process_reward_tokens, beta=BETA), TOKENS)
CASES |= {
    name: Case(partial(unpaired_tokens, cfg=preference_config(name), baseline=0.25), TOKENS) for name in ("kto", "bco")
}


# ---- what should not matter ----


@pytest.mark.parametrize("garbage", [0.0, 1e30, NAN, math.inf])
@pytest.mark.parametrize("name", CASES)
def test_rows_without_a_token_that_counts_count_for_nothing(name, garbage):
    """Two of them, a pair where pairs are, behind the others: no change, and no gradient."""
    case = CASES[name]
    masked = [Row([-1.0, -2.0], holes=(0, 1), garbage=garbage, prompt=row.prompt) for row in case.rows[:2]]
    total, grads = outcome(case, case.rows)
    with_masked, theirs = outcome(case, [*case.rows, *masked])
    assert with_masked == total and theirs == [*grads, [0, 0], [0, 0]]
    assert outcome(case, masked) == (0, [[0, 0], [0, 0]])


@pytest.mark.parametrize("garbage", [1e30, -1e30, NAN, math.inf])
@pytest.mark.parametrize("name", CASES)
def test_garbage_in_holes_and_before_responses_changes_nothing(name, garbage):
    case = CASES[name]
    total, grads = outcome(case, case.rows)
    holed = [
        Row(**vars(row) | {"logps": [row.logps[0], 7.0, *row.logps[1:]], "holes": (1,), "garbage": garbage})
        if name != "longpo" or i % 2 == 1  # the likelihood of a chosen row's prompt is learnt as well
        else Row(**vars(row) | {"logps": [*row.logps, 7.0], "holes": (len(row.logps),), "garbage": garbage})
        for i, row in enumerate(case.rows)
    ]
    with_holes, theirs = outcome(case, holed)
    assert with_holes == pytest.approx(total, rel=1e-12)
    for row, got, expected in zip(holed, theirs, grads, strict=True):
        (hole,) = row.holes
        assert got[hole] == 0 and got[:hole] + got[hole + 1 :] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_a_microbatch_of_one_class_is_its_part_of_both(name):
    """Each class alone is a mean over its own examples: together they are the mean over all, by their numbers."""
    case = CASES[name]
    rows = [*case.rows, Row([-3.0], desirable=True)]
    total, grads = outcome(case, rows)
    parts = {label: outcome(case, [row for row in rows if row.desirable is label]) for label in (True, False)}
    assert 2 / 3 * parts[True][0] + 1 / 3 * parts[False][0] == pytest.approx(total)
    assert [g * 2 / 3 for g in parts[True][1][0]] == pytest.approx(grads[0])
    assert [g / 3 for g in parts[False][1][0]] == pytest.approx(grads[1])


# ---- responses of one token, near and far ----


def softplus(x):
    return mpmath.log1p(mpmath.exp(x)) if x < 0 else x + mpmath.log1p(mpmath.exp(-x))


def sigmoid(x):
    return mpmath.exp(-softplus(-x))


def bernoulli_kl(a, b):
    """KL(sigmoid(a) || sigmoid(b))."""
    return sigmoid(a) * (softplus(-b) - softplus(-a)) + sigmoid(-a) * (softplus(b) - softplus(a))


def log_odds(x):
    return x - mpmath.log(-mpmath.expm1(x))


def far_pair(gap):
    """Log-probabilities of both sides, `gap` apart, of which the likelier one is at the reference's -1."""
    return (-1.0, -1.0 - gap) if gap > 0 else (-1.0 + gap, -1.0)


# Of c and r, both against a reference of -1: D_w = c + 1, D_l = r + 1. The gap of scores is 1.
ORACLES = {
    "dpo": lambda c, r: (1 - SMOOTHING) * softplus(-BETA * (c - r)) + SMOOTHING * softplus(BETA * (c - r)),
    "robust": lambda c, r: (
        ((1 - SMOOTHING) * softplus(-BETA * (c - r)) - SMOOTHING * softplus(BETA * (c - r))) / (1 - 2 * SMOOTHING)
    ),
    "ipo": lambda c, r: (c - r - 1 / (2 * BETA)) ** 2,
    "hinge": lambda c, r: max(1 - BETA * (c - r), mpmath.mpf(0)),
    "dpop": lambda c, r: softplus(-BETA * (c - r - 2 * max(-(c + 1), 0))),
    "rpo_bwd_kl": lambda c, r: bernoulli_kl(1, BETA * (c - r)),
    "rpo_fwd_kl": lambda c, r: bernoulli_kl(BETA * (c - r), 1),
    "rpo_sq": lambda c, r: (BETA * (c - r) - 1) ** 2,
    "simpo": lambda c, r: softplus(0.5 - BETA * (c - r)),
    "orpo": lambda c, r: -c + BETA * softplus(log_odds(r) - log_odds(c)),
    "bco_pair": lambda c, r: softplus(-BETA * (c + 1)) + softplus(BETA * (r + 1)),
    "longpo": lambda c, r: 0.01 * softplus(-BETA * (c - r)) - (c - 0.5) / 2,
    "bradley_terry": lambda c, r: softplus(r - c) + 0.5 * (c + r) ** 2,
}
GAPS = [0.5, -0.5, 80.0, -80.0, 1000.0, -1000.0]


def test_every_pair_loss_has_its_oracle():
    assert set(ORACLES) == {*PAIR_LOSSES, "bradley_terry"}


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("name", ORACLES)
def test_pairs_of_one_token_near_and_far(name, gap):
    # Away from dpop's kink, where the chosen response is as likely as with the reference.
    chosen, rejected = (x - 0.125 for x in far_pair(gap))
    rows = [Row([chosen], score=1.0), Row([rejected], score=0.0)]
    if name == "longpo":
        rows[0] = Row([-0.5, chosen], prompt=1)
        case = Case(partial(CASES[name].loss, prompt_lengths={"p0": 2}), rows, 2)
    else:
        case = Case(CASES[name].loss, rows, 2)
    total, grads = outcome(case, rows)
    exact = ORACLES[name]
    assert total == pytest.approx(float(exact(mp.mpf(chosen), mp.mpf(rejected))), rel=1e-9, abs=1e-12)
    slopes = [mpmath.diff(exact, (chosen, rejected), order) for order in ((1, 0), (0, 1))]
    assert [grads[0][-1], grads[1][-1]] == pytest.approx([float(slope) for slope in slopes], rel=1e-9, abs=1e-12)


def policy_oracle(name, d, advantage, logp):
    """(loss, gradient) of one token whose log-ratio to the old policy is d. Beyond e^20 ratios are flat."""
    q, moves = mpmath.exp(min(max(d, -20), 20)), abs(d) < 20
    if name == "reinforce":
        return -advantage * logp, -advantage
    if name == "cispo":
        weight = min(q, mp.mpf("1.2"))
        return -weight * advantage * logp, -weight * advantage
    unclipped, clipped = -advantage * q, -advantage * min(max(q, mp.mpf("0.8")), mp.mpf("1.2"))
    loss, slope = (unclipped, unclipped if moves else 0) if unclipped >= clipped else (clipped, 0)
    if name == "ppo_clip" and advantage < 0 and loss > -1.5 * advantage:
        return -1.5 * advantage, 0
    return loss, slope


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("advantage", [1.0, -0.5])
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_policy_losses_of_one_token_near_and_far(name, advantage, gap):
    logp = far_pair(gap)[0] if gap < 0 else -1.0
    row = Row([logp], old=logp - gap, advantage=advantage)
    total, ((grad,),) = outcome(CASES[name], [row])
    loss, slope = policy_oracle(name, gap, advantage, logp)
    assert total == pytest.approx(float(loss), rel=1e-9) and grad == pytest.approx(float(slope), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_kl_of_one_token_near_and_far(kl, gap):
    """Beside -A logp with A = 1; coefficient 1/2. k3 is capped where the reference is e^20 times likelier."""
    total, ((grad,),) = outcome(CASES[f"kl {kl}, estimator"], [Row([-1.0], ref=-1.0 - gap)])
    low = mp.mpf(max(gap, -20))
    estimate = {"k1": gap, "k2": gap**2 / 2, "k3": mpmath.exp(-low) - 1 + low}[kl]
    slope = {"k1": 1, "k2": gap, "k3": 1 - mpmath.exp(-low) if gap > -20 else 0}[kl]
    assert total == pytest.approx(float(1 + estimate / 2), rel=1e-9)
    assert grad == pytest.approx(float(-1 + mp.mpf(slope) / 2), rel=1e-9)


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("desirable", [True, False])
@pytest.mark.parametrize("name", ["kto", "bco"])
def test_labelled_responses_of_one_token_near_and_far(name, desirable, gap):
    """z0 and shift 1/4; the other sign for undesirable ones."""
    total, ((grad,),) = outcome(CASES[name], [Row([-1.0 + gap], desirable=desirable)])
    sign = 1 if desirable else -1
    exact = {
        "kto": lambda x: 1 - sigmoid(sign * BETA * (x + 1 - 0.25)),
        "bco": lambda x: softplus(-sign * (BETA * (x + 1) - 0.25)),
    }[name]
    assert total == pytest.approx(float(exact(mp.mpf(-1.0 + gap))), rel=1e-9, abs=1e-12)
    assert grad == pytest.approx(float(mpmath.diff(exact, -1.0 + gap)), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("gap", GAPS)
def test_outcomes_values_and_likelihoods_of_one_token_near_and_far(gap):
    total, ((grad,),) = outcome(CASES["implicit_process_reward"], [Row([-1.0 + gap], score=1.0)])
    assert total == pytest.approx(float(softplus(mp.mpf(-BETA * gap))), rel=1e-9, abs=1e-12)
    assert grad == pytest.approx(float(-BETA * sigmoid(mp.mpf(-BETA * gap))), rel=1e-9, abs=1e-12)
    total, ((grad,),) = outcome(CASES["value"], [Row([gap])])  # R = 1/2, V_old = 1/4, clipped a quarter away from it
    clipped = min(max(gap, 0.0), 0.5)
    error, moves = max((gap - 0.5) ** 2, (clipped - 0.5) ** 2), abs(gap - 0.5) > abs(clipped - 0.5)
    assert total == error / 2 and grad == (gap - 0.5 if moves else 0)
    total, ((grad,),) = outcome(CASES["sft"], [Row([-abs(gap)])])
    assert (total, grad) == (abs(gap), -1)
