"""From the rewards of a step to the advantages of its samples: which estimator, and what it gets to see.

Rewards and groups of the whole step are on every rank; tokens are where they are trained on. What an estimator needs of
other replicas' tokens are sums, which replicas exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megarl import advantages
from megarl.config import AdvantageConfig, Config, RewardConfig
from megarl.data.records import Sample
from megarl.parallel.collectives import gather_objects, summed_over
from megarl.parallel.mesh import Mesh
from megarl.rollout.table import Rollout


@dataclass(frozen=True)
class Step:
    """One step, as estimators see it: N samples in all, n of them here, L tokens in the longest of these."""

    cfg: AdvantageConfig
    scores: Tensor  # [N] fp32
    groups: Tensor  # [N]
    truncated: Tensor  # [N] bool: responses that reached the limit
    samples: Sequence[Sample]  # this replica's; ``row`` is a sample's place among the N
    mesh: Mesh
    kl_coef: float = 0.0  # of the KL penalty in rewards

    @property
    def here(self) -> Tensor:
        """[n] int64: which of the N are here."""
        return torch.tensor([sample.row for sample in self.samples], dtype=torch.int64)

    @property
    def my_scores(self) -> Tensor:
        """[n]."""
        return self.mine(self.scores)

    @cached_property
    def mask(self) -> Tensor:
        """[n, L] bool: tokens that the policy wrote and that count."""
        return advantages.pad([mask_of(sample) for sample in self.samples]).bool()

    @cached_property
    def kl(self) -> Tensor | None:
        """[n, L] k1 of the policy before the step to the reference; None where rewards have no KL penalty."""
        if not self.kl_coef:
            return None
        return advantages.pad([old_logps(s).cpu() - s.ref_logps.cpu() for s in self.samples])

    @property
    def rewards(self) -> Tensor:
        """[N]: the scores, less the KL penalty of whole responses."""
        if self.kl is None:
            return self.scores
        return self.everywhere(advantages.sequence_rewards(self.my_scores, self.kl, self.mask, self.kl_coef))

    @property
    def token_rewards(self) -> Tensor:
        """[n, L]: the KL penalty of every token, and the score at a response's last."""
        return advantages.token_rewards(self.my_scores, self.mask, self.kl, self.kl_coef)

    def mine(self, x: Tensor) -> Tensor:
        """[N] -> [n]."""
        return x[self.here]

    def everywhere(self, mine: Tensor) -> Tensor:
        """[n] -> [N]: what each replica knows of its samples, on all of them."""
        out = mine.new_zeros(self.scores.shape)
        known = [(sample.row, x) for sample, x in zip(self.samples, mine.tolist(), strict=True)]
        for part in gather_objects(known, self.mesh.dp_group):
            for row, x in part:
                out[row] = x
        return out

    def reduce(self, part: Tensor) -> Tensor:
        """The sum over replicas."""
        return summed_over(self.mesh.dp_group)(part)

    def whiten(self, x: Tensor) -> Tensor:
        """[n, L], over all tokens of the step."""
        return advantages.whiten(x, self.mask, bessel=self.cfg.whiten_with_bessel, reduce=self.reduce)


def grpo(step: Step) -> Tensor:
    cfg = step.cfg
    return step.mine(
        advantages.grpo(
            step.rewards,
            step.groups,
            normalize_by_std=cfg.normalize_by_std,
            use_leave_one_out_baseline=cfg.use_leave_one_out_baseline,
            eps=cfg.eps,
        )
    )


def rloo(step: Step) -> Tensor:
    return step.mine(advantages.rloo(step.rewards, step.groups))


def reinforce(step: Step) -> Tensor:
    counted = None if step.cfg.truncated_in_baseline else ~step.truncated
    return step.mine(advantages.reinforce(step.rewards, step.groups, baseline=step.cfg.baseline, counted=counted))


def reinforce_plus_plus(step: Step) -> Tensor:
    return advantages.reinforce_pp(
        step.token_rewards,
        step.mask,
        gamma=step.cfg.gamma,
        bessel=step.cfg.whiten_with_bessel,
        reduce=step.reduce,
    )


def reinforce_plus_plus_baseline(step: Step) -> Tensor:
    return advantages.reinforce_pp_baseline(
        step.scores,
        step.groups,
        step.mask,
        here=step.here,
        bessel=step.cfg.whiten_with_bessel,
        reduce=step.reduce,
    )


# Each gives [n], or one a token as [n, L].
ESTIMATORS: dict[str, Callable[[Step], Tensor]] = {
    "grpo": grpo,
    "rloo": rloo,
    "reinforce": reinforce,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
}


def scores_of(cfg: RewardConfig, rollout: Rollout) -> Tensor:
    """[N] the step's rewards, less the configured penalties: for responses that come near the limit, that reached it,
    and for every token. What a policy read is not held against it: only tokens that it wrote count."""
    scores = rollout.rewards
    lengths = torch.tensor([row.written_length for row in rollout.rows])
    if cfg.overlong_buffer_len:
        penalty = advantages.soft_overlong_penalty(lengths, rollout.max_response_length, cfg.overlong_buffer_len)
        scores = scores + cfg.overlong_buffer_penalty * penalty
    scores = advantages.missing_eos_penalty(scores, ~truncated(rollout), cfg.missing_eos_penalty)
    return scores - cfg.length_penalty * lengths


def truncated(rollout: Rollout) -> Tensor:
    """[N] bool: responses that reached a limit instead of ending by themselves."""
    return torch.tensor([row.cut for row in rollout.rows], dtype=torch.bool)


def step_of(cfg: Config, rollout: Rollout, samples: Sequence[Sample], mesh: Mesh, kl_coef: float = 0.0) -> Step:
    """The step as an estimator sees it. ``reward.overlong_filtering`` masks responses that reached the limit."""
    scores, too_long = scores_of(cfg.reward, rollout), truncated(rollout)
    if cfg.reward.overlong_filtering:
        for sample in samples:
            if too_long[sample.row]:
                sample.loss_mask = torch.zeros(sample.response_length, dtype=torch.bool)
    return Step(cfg.advantage, scores, rollout.groups, too_long, samples, mesh, kl_coef)


def give(step: Step, advantage: Tensor) -> dict[str, float]:
    """Put advantages, [n] or [n, L], on the samples. Returns their mean, largest and smallest over the whole step."""
    for sample, value in zip(step.samples, advantage.cpu(), strict=True):
        if advantage.dim() == 1:
            sample.advantage = float(value)
        else:
            sample.advantages = value[: sample.response_length]
    values = advantage.cpu() if advantage.dim() == 1 else advantage.cpu()[step.mask]
    return spread("critic/advantages", values, step)


def spread(name: str, values: Tensor, step: Step) -> dict[str, float]:
    """Mean, largest and smallest of values that every replica has some of."""
    parts = [x for x in gather_objects(values.float(), step.mesh.dp_group) if x.numel()]
    together = torch.cat(parts) if parts else torch.zeros(1)
    return {f"{name}/{what}": getattr(together, what)().item() for what in ("mean", "max", "min")}


def mean_kl(step: Step) -> float:
    """The KL to the reference, a mean over tokens of the step."""
    assert step.kl is not None, "without a penalty there is no reference"
    count, total, _ = step.reduce(advantages.moments(step.kl, step.mask)).tolist()
    return total / max(count, 1)


def mask_of(sample: Sample) -> Tensor:
    """[response] bool."""
    if sample.loss_mask is None:
        return torch.ones(sample.response_length, dtype=torch.bool)
    return sample.loss_mask.cpu().bool()


def old_logps(sample: Sample) -> Tensor:
    """[response]: the policy's before this step's updates; vLLM's, with ``loss.use_rollout_logps``."""
    found = sample.rollout_logps if sample.old_logps is None else sample.old_logps
    assert found is not None, f"{sample.name} has no log-probabilities of the policy that sampled it"
    return found
