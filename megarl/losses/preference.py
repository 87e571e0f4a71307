"""Losses of preference pairs: one function a method, from a batch of pairs to one loss a pair.

Notation: w is the chosen response, l the rejected one; D = log pi(y) - log pi_ref(y), summed over response tokens
(their mean with ``average_log_probs``: NeMo's preference_average_log_probs, TRL's sigmoid_norm); delta = D_w - D_l.
Shapes: P pairs, everything [P]. The mean over the pairs of a whole step is the engine's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from megarl.config import PreferenceConfig
from megarl.data.records import MicroBatch
from megarl.losses.pairs import Pairs, pairs_of, per_token


def dpo(pairs: Pairs, cfg: PreferenceConfig) -> Tensor:
    """-log sigmoid(beta delta) (DPO, 2305.18290, eq. 7).

    ``label_smoothing`` e > 0 is the conservative form, for labels that are wrong with probability e:
    -(1 - e) log sigmoid(beta delta) - e log sigmoid(-beta delta) (cDPO, ericmitchell.ai/cdpo.pdf, eq. 3).
    """
    logits, e = cfg.beta * _delta(pairs, cfg), cfg.label_smoothing
    return -(1 - e) * F.logsigmoid(logits) - e * F.logsigmoid(-logits)


def robust(pairs: Pairs, cfg: PreferenceConfig) -> Tensor:
    """[-(1 - e) log sigmoid(beta delta) + e log sigmoid(-beta delta)] / (1 - 2e) (robust DPO, 2403.00409).

    An unbiased estimate of the loss without label noise, so it can be negative.
    """
    logits, e = cfg.beta * _delta(pairs, cfg), cfg.label_smoothing
    return (-(1 - e) * F.logsigmoid(logits) + e * F.logsigmoid(-logits)) / (1 - 2 * e)


def ipo(pairs: Pairs, cfg: PreferenceConfig) -> Tensor:
    """(delta - 1 / (2 tau))^2 with tau = ``beta`` (IPO, 2310.12036, eq. 17).

    D is a sum, as with OpenRLHF, NeMo-Aligner, oat and verl. ``average_log_probs`` is what the authors told TRL they
    meant, and TRL's only form. The two are not interchangeable, since 1 / (2 tau) stays what it is.
    """
    return (_delta(pairs, cfg) - 1 / (2 * cfg.beta)).square()


def hinge(pairs: Pairs, cfg: PreferenceConfig) -> Tensor:
    """max(0, 1 - beta delta) (SLiC, 2305.10425; RSO, 2309.06657)."""
    return F.relu(1 - cfg.beta * _delta(pairs, cfg))


def dpop(pairs: Pairs, cfg: PreferenceConfig) -> Tensor:
    """-log sigmoid(beta (delta - lambda max(0, -D_w))) (DPO-Positive, 2402.13228, eq. 3).

    The penalty holds the chosen response's likelihood up; it is inside the sigmoid, and scaled by beta.
    """
    chosen, rejected = _ratios(pairs, cfg)
    return -F.logsigmoid(cfg.beta * (chosen - rejected - cfg.dpop_lambda * F.relu(-chosen)))


def rpo_bwd_kl(pairs: Pairs, cfg: PreferenceConfig) -> Tensor:
    """KL(p || q): p = sigmoid(eta gap of rewards), q = sigmoid(beta delta) (Nemotron-4 340B, 2406.11704).

    The policy is to prefer the chosen response by as much as the rewards say, and no more. Where the reward model
    disagrees with the label, this pushes the rejected response up: that is intended.
    """
    return _bernoulli_kl(cfg.rpo_eta * _gap(pairs), cfg.beta * _delta(pairs, cfg))


def rpo_fwd_kl(pairs: Pairs, cfg: PreferenceConfig) -> Tensor:
    """KL(q || p), p and q as in `rpo_bwd_kl` (2502.00203)."""
    return _bernoulli_kl(cfg.beta * _delta(pairs, cfg), cfg.rpo_eta * _gap(pairs))


def rpo_sq(pairs: Pairs, cfg: PreferenceConfig) -> Tensor:
    """(beta delta - eta gap of rewards)^2 (2502.00203; NeMo-Aligner's rpo_sq)."""
    return (cfg.beta * _delta(pairs, cfg) - cfg.rpo_eta * _gap(pairs)).square()


def simpo(pairs: Pairs, cfg: PreferenceConfig) -> Tensor:
    """-log sigmoid(beta (avg_w - avg_l) - gamma), avg = log pi(y) / |y|, no reference (SimPO, 2405.14734, eq. 6).

    gamma = ``simpo_gamma`` itself, not gamma / beta as in the authors' configuration files. There is no likelihood
    term: TRL's CPO trainer adds one by default, cpo_alpha.
    """
    margin = pairs.chosen_average - pairs.rejected_average
    return -F.logsigmoid(cfg.beta * margin - cfg.simpo_gamma)


def orpo(pairs: Pairs, cfg: PreferenceConfig) -> Tensor:
    """-avg_w - lambda log sigmoid(log odds_w - log odds_l), lambda = ``beta``, no reference (ORPO, 2403.07691, eq. 6,
    7).

    odds = P / (1 - P) with P = exp(avg) and avg = log pi(y) / |y|; the likelihood term is over response tokens only
    (the authors' code and TRL have the prompt's in it too).
    """
    chosen, rejected = pairs.chosen_average, pairs.rejected_average
    return -chosen - cfg.beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def bco_pair(pairs: Pairs, cfg: PreferenceConfig, shift: float = 0.0) -> Tensor:
    """-log sigmoid(beta D_w - shift) - log sigmoid(shift - beta D_l) (BCO, 2404.04656, on pairs).

    ``shift`` is that of `unpaired.RewardShift`; 0 is TRL's bco_pair since 2025.
    """
    chosen, rejected = _ratios(pairs, cfg)
    return -F.logsigmoid(cfg.beta * chosen - shift) - F.logsigmoid(shift - cfg.beta * rejected)


def longpo(pairs: Pairs, cfg: PreferenceConfig) -> Tensor:
    """-lambda log sigmoid(beta delta) + the mean negative log-likelihood of the whole chosen sequence (LongPO,
    2502.13922, eq. 10 to 14), lambda = ``longpo_lambda``.

    The policy reads the long context, the reference the short chunk that the chosen response was written from: its
    log-probs are of other prompts and the same response tokens. The likelihood is over prompt and response.
    """
    assert pairs.whole_nll is not None, "longpo needs log-probs of the long prompt too"
    return -cfg.longpo_lambda * F.logsigmoid(cfg.beta * _delta(pairs, cfg)) + pairs.whole_nll


PAIR_LOSSES: dict[str, Callable[..., Tensor]] = {
    "dpo": dpo,
    "robust": robust,
    "ipo": ipo,
    "hinge": hinge,
    "dpop": dpop,
    "rpo_bwd_kl": rpo_bwd_kl,
    "rpo_fwd_kl": rpo_fwd_kl,
    "rpo_sq": rpo_sq,
    "simpo": simpo,
    "orpo": orpo,
    "bco_pair": bco_pair,
    "longpo": longpo,
}
REFERENCE_FREE = ("simpo", "orpo")
NEEDS_REWARDS = ("rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq")


def preference(pairs: Pairs, cfg: PreferenceConfig, **statistics: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The configured loss, plus ``sft_loss_coef`` times the chosen response's mean negative log-likelihood (NeMo's
    sft_loss_weight; 2404.19733 with dpo).

    ``statistics`` are arguments of the loss that come from more than this batch: `bco_pair`'s shift. Metrics are TRL's:
    ``rewards/chosen`` is beta D_w, of a reference-free loss beta times the mean log-probability.
    """
    loss = PAIR_LOSSES[cfg.loss](pairs, cfg, **statistics)
    nll = -pairs.chosen_average
    if cfg.sft_loss_coef:
        loss = loss + cfg.sft_loss_coef * nll
    chosen, rejected = _ratios(pairs, cfg)
    if cfg.loss in REFERENCE_FREE:
        chosen, rejected = pairs.chosen_average, pairs.rejected_average
    chosen, rejected = cfg.beta * chosen.detach(), cfg.beta * rejected.detach()
    return loss, {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).to(loss.dtype),
        "nll_loss": nll.detach(),
        "logps/chosen": pairs.chosen.detach(),
        "logps/rejected": pairs.rejected.detach(),
    }


def preference_tokens(
    logps: Tensor, batch: MicroBatch, cfg: PreferenceConfig, whole_nll: Tensor | None = None, **statistics: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """`preference` of a microbatch of pairs, as a loss of the engine: [T], each token carrying its pair's."""
    loss, metrics = preference(pairs_of(logps, batch, whole_nll), cfg, **statistics)
    return per_token(loss, batch), {name: per_token(values, batch) for name, values in metrics.items()}


def longpo_tokens(
    logps: Tensor, batch: MicroBatch, cfg: PreferenceConfig, prompt_lengths: Mapping[str, int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """`longpo` of a microbatch of pairs, as a loss of the engine: [T], each token carrying its pair's.

    All but the first token of a chosen sequence counts as response, so that the prompt has log-probabilities too.

    Args:
        prompt_lengths: of each prompt_id, where the pair's responses begin.
    """
    assert batch.ref_logps is not None, "longpo compares with a reference"
    first = torch.tensor([prompt_lengths.get(sample.prompt_id, 1) - 1 for sample in batch.samples], device=logps.device)
    response = batch.loss_mask & (batch.positions >= batch.per_token(first))

    def total(x: Tensor) -> Tensor:
        return batch.per_sequence(torch.where(response, x, 0))

    sums, ref, lengths = total(logps), total(batch.ref_logps), total(torch.ones_like(logps))
    pairs = Pairs(
        chosen=sums[::2],
        rejected=sums[1::2],
        ref_chosen=ref[::2],
        ref_rejected=ref[1::2],
        chosen_length=lengths[::2],
        rejected_length=lengths[1::2],
        whole_nll=-(batch.per_sequence(logps) / batch.lengths.clamp(min=1))[::2],
    )
    loss, metrics = preference(pairs, cfg)
    return per_token(loss, batch), {name: per_token(values, batch) for name, values in metrics.items()}


def _ratios(pairs: Pairs, cfg: PreferenceConfig) -> tuple[Tensor, Tensor]:
    """D_w and D_l."""
    if not cfg.average_log_probs:
        return pairs.chosen_ratio, pairs.rejected_ratio
    lengths = pairs.chosen_length.clamp(min=1), pairs.rejected_length.clamp(min=1)
    return pairs.chosen_ratio / lengths[0], pairs.rejected_ratio / lengths[1]


def _delta(pairs: Pairs, cfg: PreferenceConfig) -> Tensor:
    chosen, rejected = _ratios(pairs, cfg)
    return chosen - rejected


def _gap(pairs: Pairs) -> Tensor:
    if pairs.reward_gap is None:
        raise ValueError("the rpo losses need a score of both responses of every pair")
    return pairs.reward_gap


def _bernoulli_kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(sigmoid(a) || sigmoid(b)), in log space: finite at any logits."""
    positive = F.logsigmoid(a).exp() * (F.logsigmoid(a) - F.logsigmoid(b))
    negative = F.logsigmoid(-a).exp() * (F.logsigmoid(-a) - F.logsigmoid(-b))
    return positive + negative


def _log_odds(avg: Tensor) -> Tensor:
    """log(P / (1 - P)) of P = exp(avg). 1 - P is at least the smallest step below 1 that fp32 has: P = 1 is finite."""
    smallest = math.log1p(-torch.finfo(torch.float32).eps)  # about -1.2e-7
    avg = avg.clamp(max=smallest)
    return avg - torch.log(-torch.expm1(avg))
