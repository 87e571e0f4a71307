"""Losses of single responses with a label, desirable or not: KTO and BCO, one loss a response.

D = log pi(y) - log pi_ref(y), summed over response tokens. Shapes: n responses, everything [n]; ``desirable`` is bool.
A microbatch may hold one class only. The mean over the examples of a whole step is the engine's: as for pairs, each
token carries its response's loss, and ``loss_agg_mode`` is ``seq-mean-token-mean``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megarl.config import PreferenceConfig
from megarl.data.records import MicroBatch


def kto(ratio: Tensor, desirable: Tensor, kl: float | Tensor, cfg: PreferenceConfig) -> Tensor:
    """lambda_D (1 - sigmoid(beta (D - z0))) or lambda_U (1 - sigmoid(beta (z0 - D))) (KTO, 2402.01306, eq. 7, 8).

    Args:
        ratio: D.
        kl: z0, a scalar without gradient: see `kl_baseline`.
    """
    wanted = cfg.kto_desirable_weight * torch.sigmoid(-cfg.beta * (ratio - kl))
    unwanted = cfg.kto_undesirable_weight * torch.sigmoid(-cfg.beta * (kl - ratio))
    return torch.where(desirable, wanted, unwanted)


def kl_baseline(mismatched_ratio: Tensor) -> Tensor:
    """z0 of `kto`: max(0, mean of D over mismatched responses), over the whole step, under the present policy.

    Args:
        mismatched_ratio: [m] D of `mismatched` responses of the *whole* step: clamping a rank's mean before the mean
            over ranks would bias it upwards. None at all is 0.
    """
    return (mismatched_ratio.detach().sum() / max(len(mismatched_ratio), 1)).clamp(min=0)


def mismatched(prompts: Sequence[str]) -> list[int]:
    """For each prompt of a step, whose response it is paired with for `kl_baseline`: y'_i = y_{i+s}, cyclic.

    The smallest shift s that gives no prompt a response of its own: several responses to one prompt may be neighbours.
    If none does, the one with the fewest. Raises ValueError for a single prompt, where z0 would be the label's own D.
    """
    n = len(prompts)
    if len(set(prompts)) < 2:
        raise ValueError(f"KTO's baseline needs responses to other prompts, but all {n} of the step have the same")
    best, fewest = 0, n
    for shift in range(1, n):
        own = sum(prompts[i] == prompts[(i + shift) % n] for i in range(n))
        if own < fewest:
            best, fewest = shift, own
        if own == 0:
            break
    return [(i + best) % n for i in range(n)]


def bco(
    ratio: Tensor, desirable: Tensor, shift: float | Tensor, cfg: PreferenceConfig, weights: Tensor | None = None
) -> Tensor:
    """-log sigmoid(r - shift) of desirable responses, -w log sigmoid(shift - r) of others, r = beta D (BCO,
    2404.04656).

    Args:
        shift: a scalar without gradient: see `RewardShift`.
        weights: [n] of undesirable responses, see `density_ratio`; None is 1.
    """
    reward = cfg.beta * ratio
    loss = -F.logsigmoid(torch.where(desirable, reward - shift, shift - reward))
    return loss if weights is None else torch.where(desirable, loss, weights * loss)


def density_ratio(p: Tensor, low: float = 0.5, high: float = 10.0) -> Tensor:
    """[n] p / (1 - p) within bounds, p = P(desirable | prompt) of a classifier (BCO's underlying distribution matching,
    2404.04656; bounds: TRL): undesirable responses count as though their prompts were those of desirable ones."""
    return (p / (1 - p + 1e-8)).clamp(low, high)


class RewardShift:
    """The running shift of `bco`, from every step's rewards so far, this one's included. Part of a checkpoint.

    ``classes``: half the sum of the two classes' means (2404.04656), so that it does not lean to the larger class.
    ``examples``: the mean of all examples, which is TRL's. ``none``: 0.
    """

    def __init__(self, kind: str = "classes") -> None:
        self._kind = kind
        self._sums = {True: 0.0, False: 0.0}
        self._counts = {True: 0, False: 0}

    def update(self, rewards: Tensor, desirable: Tensor) -> None:
        """Take in one *whole* step's rewards beta D [n], before its loss; not in evaluation."""
        for label in (True, False):
            of_class = rewards[desirable == label].detach()
            self._sums[label] += of_class.double().sum().item()
            self._counts[label] += len(of_class)

    @property
    def value(self) -> float:
        """A class that was not seen yet does not count."""
        if self._kind == "none":
            return 0.0
        if self._kind == "examples":
            return sum(self._sums.values()) / max(sum(self._counts.values()), 1)
        means = [self._sums[label] / count for label, count in self._counts.items() if count]
        return sum(means) / max(len(means), 1)

    def state_dict(self) -> dict[str, float]:
        return {
            "desirable_sum": self._sums[True],
            "desirable_count": self._counts[True],
            "undesirable_sum": self._sums[False],
            "undesirable_count": self._counts[False],
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._sums = {True: state["desirable_sum"], False: state["undesirable_sum"]}
        self._counts = {True: int(state["desirable_count"]), False: int(state["undesirable_count"])}


def unpaired_tokens(
    logps: Tensor,
    batch: MicroBatch,
    cfg: PreferenceConfig,
    baseline: float | Tensor,
    density: Mapping[str, float] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """kto or bco of a microbatch, as a loss of the engine: [T], each token carrying its response's.

    Metrics: the reward beta D where the response is desirable, where it is not (each 0 elsewhere, so that
    ``desirable``, the share of desirable ones, is what to divide by).

    Args:
        baseline: z0 of kto, the shift of bco.
        density: of bco, the `density_ratio` of each prompt_id; None is 1.
    """
    assert batch.ref_logps is not None, "kto and bco compare with a reference"
    ratio = batch.per_sequence(logps - batch.ref_logps)
    desirable = torch.tensor([bool(sample.desirable) for sample in batch.samples], device=logps.device)
    if cfg.loss == "kto":
        loss = kto(ratio, desirable, baseline, cfg)
    else:
        weights = None if density is None else ratio.new_tensor([density.get(s.prompt_id, 1) for s in batch.samples])
        loss = bco(ratio, desirable, baseline, cfg, weights)
    reward, share = cfg.beta * ratio.detach(), desirable.to(loss.dtype)
    metrics = {"rewards/desirable": share * reward, "rewards/undesirable": (1 - share) * reward, "desirable": share}
    return batch.per_token(loss), {name: batch.per_token(values) for name, values in metrics.items()}
