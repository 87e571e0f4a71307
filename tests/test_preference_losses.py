"""Losses of preference pairs: against plain arithmetic, by their identities, and packed as the engine sees them."""

import math
from typing import get_args, get_type_hints

import pytest
import torch

from megarl.config import PreferenceConfig
from megarl.data.packing import pack
from megarl.data.records import Sample
from megarl.losses.pairs import Pairs, pairs_of
from megarl.losses.preference import NEEDS_REWARDS, PAIR_LOSSES, REFERENCE_FREE, preference, preference_tokens

LOG2 = math.log(2)
CPU = torch.device("cpu")


def softplus(x):
    return x + math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def binary_kl(p, q):
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def odds(x):
    return math.exp(x) / (1 - math.exp(x))


# The formulas of the papers with numbers: chosen w and rejected r, references, lengths, gap of rewards, NLL of all.
W, L, REF_W, REF_L, N_W, N_L, GAP, WHOLE = -1.5, -2.0, -1.2, -2.6, 3, 4, 0.8, 1.7
BETA, E = 0.7, 0.1
ORACLES = {
    "dpo": lambda w, r: softplus(-BETA * (w - REF_W - r + REF_L)),
    "robust": lambda w, r: (
        ((1 - E) * softplus(-BETA * (w - REF_W - r + REF_L)) - E * softplus(BETA * (w - REF_W - r + REF_L)))
        / (1 - 2 * E)
    ),
    "ipo": lambda w, r: (w - REF_W - r + REF_L - 1 / (2 * BETA)) ** 2,
    "hinge": lambda w, r: max(0, 1 - BETA * (w - REF_W - r + REF_L)),
    "dpop": lambda w, r: softplus(-BETA * (w - REF_W - r + REF_L - 5 * max(0, REF_W - w))),
    "rpo_bwd_kl": lambda w, r: binary_kl(sigmoid(1.5 * GAP), sigmoid(BETA * (w - REF_W - r + REF_L))),
    "rpo_fwd_kl": lambda w, r: binary_kl(sigmoid(BETA * (w - REF_W - r + REF_L)), sigmoid(1.5 * GAP)),
    "rpo_sq": lambda w, r: (BETA * (w - REF_W - r + REF_L) - 1.5 * GAP) ** 2,
    "simpo": lambda w, r: softplus(0.3 - BETA * (w / N_W - r / N_L)),
    "orpo": lambda w, r: -w / N_W + BETA * softplus(math.log(odds(r / N_L)) - math.log(odds(w / N_W))),
    "bco_pair": lambda w, r: softplus(-BETA * (w - REF_W)) + softplus(BETA * (r - REF_L)),
    "longpo": lambda w, r: 0.01 * softplus(-BETA * (w - REF_W - r + REF_L)) + WHOLE,
}
SETTINGS = {"beta": BETA, "dpop_lambda": 5.0, "rpo_eta": 1.5, "simpo_gamma": 0.3}


def config(loss, **changes):
    smoothing = {"label_smoothing": E} if loss == "robust" else {}
    return PreferenceConfig(**({"loss": loss} | SETTINGS | smoothing | changes))


def one(value):
    return torch.tensor([value], dtype=torch.float64)


def pair(w=W, r=L, ref_w=REF_W, ref_l=REF_L, gap=GAP, n_w=N_W, n_l=N_L):
    return Pairs(one(w), one(r), one(ref_w), one(ref_l), one(n_w), one(n_l), one(gap), one(WHOLE))


def value_and_gradient(cfg, w=W, r=L, **rest):
    pairs = pair(w, r, **rest)
    pairs.chosen.requires_grad_()
    pairs.rejected.requires_grad_()
    loss, metrics = preference(pairs, cfg)
    loss.sum().backward()
    return loss.item(), pairs.chosen.grad.item(), pairs.rejected.grad.item(), metrics


def test_config_names_every_loss():
    assert get_args(get_type_hints(PreferenceConfig)["loss"]) == (*PAIR_LOSSES, "kto", "bco")
    assert set(REFERENCE_FREE + NEEDS_REWARDS) <= set(PAIR_LOSSES)


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("w, r", [(W, L), (-0.9, -2.4), (-2.8, -0.7)])
def test_value_and_gradient_against_plain_arithmetic(name, w, r):
    loss, grad_w, grad_l, _ = value_and_gradient(config(name), w, r)
    oracle, h = ORACLES[name], 1e-6
    assert loss == pytest.approx(oracle(w, r), rel=1e-12)
    assert grad_w == pytest.approx((oracle(w + h, r) - oracle(w - h, r)) / (2 * h), rel=1e-6, abs=1e-8)
    assert grad_l == pytest.approx((oracle(w, r + h) - oracle(w, r - h)) / (2 * h), rel=1e-6, abs=1e-8)


# ---- step 0: the policy is its reference ----


@pytest.mark.parametrize(
    "name, loss, gradient",
    [
        ("dpo", LOG2, -BETA / 2),
        ("dpop", LOG2, -BETA / 2),  # at lp = ref the penalty is 0, and so is its gradient
        ("robust", LOG2, -BETA / 2 / (1 - 2 * E)),
        ("ipo", 1 / (4 * BETA**2), -1 / BETA),
        ("hinge", 1.0, -BETA),
        ("rpo_sq", (1.5 * GAP) ** 2, -2 * BETA * 1.5 * GAP),
        ("bco_pair", 2 * LOG2, -BETA / 2),
        ("longpo", 0.01 * LOG2 + WHOLE, -0.01 * BETA / 2),
    ],
)
def test_step_0(name, loss, gradient):
    got, grad_w, grad_l, metrics = value_and_gradient(config(name), REF_W, REF_L)
    assert got == pytest.approx(loss) and grad_w == pytest.approx(gradient) and grad_l == pytest.approx(-gradient)
    assert metrics["rewards/margins"].item() == 0 and metrics["rewards/accuracies"].item() == 0


def test_ipo_at_tau_a_tenth_starts_at_25():
    assert value_and_gradient(config("ipo", beta=0.1), REF_W, REF_L)[0] == pytest.approx(25)


# ---- what each method promises ----


def test_conservative_dpo_stands_still_at_the_log_odds_of_the_noise():
    """Its minimum is at sigmoid(beta delta) = 1 - e, here delta = log 9 / beta."""
    cfg = config("dpo", label_smoothing=E)
    _, grad_w, _, _ = value_and_gradient(cfg, w=math.log(9) / BETA, r=0.0, ref_w=0.0, ref_l=0.0)
    assert grad_w == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("delta", [-3.0, 0.4, 10.0])
def test_robust_dpo_is_dpo_in_expectation_over_flipped_labels(delta):
    def loss(name, delta):
        return value_and_gradient(config(name), w=delta, r=0.0, ref_w=0.0, ref_l=0.0)[0]

    assert (1 - E) * loss("robust", delta) + E * loss("robust", -delta) == pytest.approx(loss("dpo", delta))
    assert delta < 10 or loss("robust", delta) < 0  # which may be negative


def test_dpop_is_dpo_while_the_chosen_response_stays_likely():
    assert value_and_gradient(config("dpop"), w=-1.0)[:3] == pytest.approx(
        value_and_gradient(config("dpo"), w=-1.0)[:3]
    )


def test_rpo_gradients_are_bounded_and_stop_at_the_target():
    """bwd_kl: beta (q - p). At beta delta = eta gap everything is 0."""
    _, grad, _, _ = value_and_gradient(config("rpo_bwd_kl"))
    q, p = sigmoid(BETA * (W - REF_W - L + REF_L)), sigmoid(1.5 * GAP)
    assert grad == pytest.approx(BETA * (q - p))
    at_target = 1.5 * GAP / BETA + REF_W - REF_L + L
    for name in NEEDS_REWARDS:
        assert value_and_gradient(config(name), w=at_target)[:3] == pytest.approx((0, 0, 0), abs=1e-12)


def test_rpo_pushes_the_rejected_response_up_where_the_rewards_disagree():
    _, grad_w, grad_l, _ = value_and_gradient(config("rpo_bwd_kl"), gap=-GAP)
    assert grad_w > 0 > grad_l


def test_dpo_is_backward_rpo_with_an_infinite_gap_and_ipo_is_sq():
    near = value_and_gradient(config("rpo_bwd_kl"), gap=1e6)
    assert near[:3] == pytest.approx(value_and_gradient(config("dpo"))[:3])
    ipo, sq = value_and_gradient(config("ipo")), value_and_gradient(config("rpo_sq", rpo_eta=1.0), gap=0.5)
    assert sq[0] == pytest.approx(BETA**2 * ipo[0]) and sq[1] == pytest.approx(BETA**2 * ipo[1])


def test_average_log_probs_divides_by_the_lengths():
    """D_w / 3 - D_l / 4 = -0.1 - 0.15."""
    for name, oracle in (("ipo", (-0.25 - 1 / (2 * BETA)) ** 2), ("dpo", softplus(BETA * 0.25))):
        assert value_and_gradient(config(name, average_log_probs=True))[0] == pytest.approx(oracle)


def test_bco_pair_with_a_shift():
    """beta D_w = -0.21, beta D_l = 0.42, shift 0.1."""
    loss, _ = preference(pair(), config("bco_pair"), shift=0.1)
    assert loss.item() == pytest.approx(softplus(0.1 + 0.21) + softplus(0.42 - 0.1))


def test_sft_loss_adds_the_mean_negative_log_likelihood():
    without, with_sft = value_and_gradient(config("dpo")), value_and_gradient(config("dpo", sft_loss_coef=0.5))
    assert with_sft[0] - without[0] == pytest.approx(0.5 * 1.5 / 3)
    assert with_sft[1] - without[1] == pytest.approx(-0.5 / 3) and with_sft[2] == without[2]


def test_metrics_are_of_rewards():
    metrics = value_and_gradient(config("dpo"))[3]
    assert metrics["rewards/chosen"].item() == pytest.approx(-0.3 * BETA)
    assert metrics["rewards/rejected"].item() == pytest.approx(0.6 * BETA)
    assert metrics["rewards/margins"].item() == pytest.approx(-0.9 * BETA)
    assert value_and_gradient(config("simpo"))[3]["rewards/chosen"].item() == pytest.approx(BETA * -0.5)


# ---- extremes, in fp32 ----


@pytest.mark.parametrize("gap", [80.0, 1000.0, 1e5, -80.0, -1000.0, -1e5])
@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_huge_gaps_stay_finite(name, side, gap):
    """As references' doing, so that log-probabilities themselves stay possible."""
    refs = {"chosen": (-gap - 1.5, -2.0), "rejected": (-1.5, gap - 2.0)}[side]
    values = [torch.tensor([v], requires_grad=True) for v in (W, L)]
    pairs = Pairs(*values, *(torch.tensor([v]) for v in (*refs, N_W, N_L, GAP, WHOLE)))
    loss, metrics = preference(pairs, config(name))
    loss.sum().backward()
    for tensor in (loss, *(v.grad for v in values), *metrics.values()):
        assert torch.isfinite(tensor).all()
    if name == "dpo":  # softplus(-beta delta), with |delta| far from 0
        assert loss.item() == pytest.approx(max(0.0, -BETA * gap), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("average", [0.0, 1e-7, -1e-9, -1e-7, -1e-3, -50.0, -1000.0])
def test_orpo_of_certain_and_impossible_responses_is_finite(average):
    values = [torch.tensor([average * n], requires_grad=True) for n in (N_W, N_L)]
    zeros = torch.zeros(1)
    loss, _ = preference(Pairs(*values, zeros, zeros, torch.tensor([N_W]), torch.tensor([N_L])), config("orpo"))
    loss.sum().backward()
    assert all(torch.isfinite(x).all() for x in (loss, *(v.grad for v in values)))
    assert loss.item() == pytest.approx(-average + BETA * LOG2, rel=1e-4, abs=1e-5)  # odds are equal


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_length_1_responses(name):
    """Mean and sum are the same: what averages, averages over 1."""
    cfg = config(name)
    same = value_and_gradient(cfg, n_w=1, n_l=1)
    if name not in ("simpo", "orpo", "longpo"):
        averaged = value_and_gradient(config(name, average_log_probs=True), n_w=1, n_l=1)
        assert averaged[:3] == pytest.approx(same[:3])
    assert all(math.isfinite(x) for x in same[:3])


# ---- packed ----


def packed(pairs, holes=()):
    """``pairs``: (chosen log-probs, rejected log-probs), each with references a half lower. Returns (logps, batch)."""
    samples, logps = [], []
    for i, sides in enumerate(pairs):
        for k, values in enumerate(sides):
            mask = torch.tensor([(len(logps) + t) not in holes for t in range(len(values))])
            ref = torch.tensor(values) - 0.5
            samples.append(Sample(f"p{i}", k, [0] * (len(values) + 1), 1, ref_logps=ref, loss_mask=mask, score=1.0 - k))
            logps += values
    batch = pack(samples, CPU, loss_agg_mode="seq-mean-token-mean")
    return torch.tensor(logps, dtype=torch.float64, requires_grad=True), batch


def reduce(parts, cfg):
    """Sum and count over microbatches, as the engine does. (loss, gradients of each part)"""
    totals = [
        torch.where(batch.loss_mask, preference_tokens(logps, batch, cfg)[0] * batch.weights, 0).sum()
        for logps, batch in parts
    ]
    loss = sum(totals) / sum(batch.count for _, batch in parts)
    loss.backward()
    return loss.item(), [logps.grad.tolist() for logps, _ in parts]


A = ([-1.0, -2.0], [-0.5])  # D = 2 x 0.5 and 0.5: delta 0.5
B = ([-1.0], [-0.3, -0.2, -0.1])  # D = 0.5 and 1.5: delta -1


def test_packed_pairs_are_a_mean_over_pairs():
    loss, (grad,) = reduce([packed([A, B])], config("dpo"))
    assert loss == pytest.approx((softplus(-BETA * 0.5) + softplus(BETA)) / 2)
    a, b = BETA * sigmoid(-BETA * 0.5) / 2, BETA * sigmoid(BETA) / 2
    assert grad == pytest.approx([-a, -a, a, -b, b, b, b])


@pytest.mark.parametrize("name", [name for name in PAIR_LOSSES if name != "longpo"])
def test_how_pairs_are_cut_into_microbatches_does_not_matter(name):
    whole, (grad,) = reduce([packed([A, B])], config(name))
    parts, grads = reduce([packed([A]), packed([B])], config(name))
    assert parts == pytest.approx(whole) and grads[0] + grads[1] == pytest.approx(grad)


@pytest.mark.parametrize("name", [name for name in PAIR_LOSSES if name != "longpo"])
def test_garbage_in_a_hole_changes_nothing(name):
    whole, (grad,) = reduce([packed([A])], config(name))
    for garbage in (1e30, math.nan):
        holed, (got,) = reduce([packed([([-1.0, garbage, -2.0], [-0.5])], holes=[1])], config(name))
        assert holed == pytest.approx(whole) and got == pytest.approx([grad[0], 0, *grad[1:]])


def test_pairs_take_scores_and_lengths_from_the_samples():
    logps, batch = packed([A, B])
    pairs = pairs_of(logps, batch)
    assert pairs.reward_gap.tolist() == [1, 1]
    assert pairs.chosen_length.tolist() == [2, 1] and pairs.rejected_length.tolist() == [1, 3]
    assert pairs.chosen.tolist() == [-3, -1] and pairs.rejected_ratio.tolist() == pytest.approx([0.5, 1.5])
    batch.samples[0].score = None
    assert pairs_of(logps, batch).reward_gap is None
    with pytest.raises(ValueError, match="need a score of both responses of every pair"):
        preference_tokens(logps, batch, config("rpo_sq"))
    batch.ref_logps = None
    assert pairs_of(logps, batch).ref_chosen.tolist() == [0, 0]


def test_half_a_pair_and_a_pair_of_two_prompts_are_refused():
    logps, batch = packed([A, B])
    batch.samples[1], batch.samples[2] = batch.samples[2], batch.samples[1]
    with pytest.raises(ValueError, match="chosen of prompt p0, sample 0, rejected of prompt p1, sample 0"):
        pairs_of(logps, batch)
    with pytest.raises(ValueError, match="1 responses in a microbatch of pairs, the last of prompt p, sample 0"):
        pairs_of(torch.zeros(1), pack([Sample("p", 0, [1, 2], 1)], CPU))


def test_a_pair_with_one_masked_response_is_refused():
    """It would count as one sequence, half a pair. With both masked it is no pair, and counts for nothing."""
    masked = [torch.zeros(1, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)]
    samples = [Sample("p", 0, [1, 2], 1), Sample("p", 1, [1, 2, 3], 1, loss_mask=masked[1])]
    with pytest.raises(ValueError, match="one response has no token that counts: prompt p, sample 1"):
        pairs_of(torch.zeros(3), pack(samples, CPU))
    samples[0].loss_mask = masked[0]
    batch = pack(samples, CPU, loss_agg_mode="seq-mean-token-mean")
    loss, _ = preference_tokens(torch.ones(3), batch, config("dpo"))
    assert batch.count == 0 and (loss * batch.weights).tolist() == [0, 0, 0]
