"""A step's samples as every rank knows them: a small table (lengths, rewards, what went wrong).

Tokens and log-probabilities stay where they were sampled until `Rollout.deal` sends each sample to the replica that
trains on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megarl.advantages import keep_between, keep_mixed, zero_variance_fraction
from megarl.config import Config
from megarl.data.curriculum import Stage, max_response_length_at
from megarl.data.packing import balance
from megarl.data.prompts import Prompt
from megarl.data.records import Sample
from megarl.model.flops import ModelFlops
from megarl.parallel.collectives import exchange_samples, gather_objects
from megarl.parallel.mesh import Mesh
from megarl.rewards import RewardError
from megarl.rewards.runner import RewardInput, RewardResult
from megarl.rollout.conversation import Sampling


class EmptyStepError(RuntimeError):
    """Every group of a step was dropped."""


@dataclass(frozen=True)
class Row:
    """What every rank knows of one sample."""

    prompt: int  # which of the step's prompts: the sample's group
    index: int  # which of the prompt's samples
    prompt_id: str
    prompt_length: int
    response_length: int
    written_length: int  # of these, tokens that the policy wrote
    finish_reason: str
    result: RewardResult
    measures: dict[str, float] = field(default_factory=dict)  # what an environment says of it
    # Of its tokens: updates by which the weights that sampled them were behind. (mean, largest, smallest)
    staleness: tuple[float, int, int] = (0.0, 0, 0)

    @property
    def cut(self) -> bool:
        """Whether a limit ended it: of tokens, or an environment's of turns or time."""
        return self.finish_reason != "stop"


@dataclass
class Rollout:
    """One step's samples. ``rows`` is the same on every rank, in the order of prompts; ``mine`` holds what was sampled
    here."""

    rows: list[Row]  # N, of groups that were scored whole
    errors: list[str]  # what was wrong with the samples of dropped groups
    mine: dict[int, Sample] = field(repr=False)  # row -> sample
    mesh: Mesh = field(repr=False)
    max_response_length: int  # of this step
    flops: ModelFlops = field(repr=False)  # of the model that trains on it
    num_gen_batches: int = 1  # how often prompts were drawn and sampled for it
    beside: dict[str, float] = field(default_factory=dict)  # numbers of the engines that it came from
    ages: bool = False  # whether samples may be of older weights

    @property
    def rewards(self) -> Tensor:
        """[N] fp32."""
        return torch.tensor([row.result.total for row in self.rows], dtype=torch.float32)

    @property
    def groups(self) -> Tensor:
        """[N] int64: samples of one prompt share a number."""
        return torch.tensor([row.prompt for row in self.rows])

    @property
    def lengths(self) -> list[int]:
        """Tokens of every sample, prompt and response."""
        return [row.prompt_length + row.response_length for row in self.rows]

    @property
    def prompts(self) -> list[int]:
        """The numbers of the groups, in order."""
        return list(dict.fromkeys(row.prompt for row in self.rows))

    def only(self, prompts: Collection[int]) -> Rollout:
        """The groups of these prompts."""
        at = [i for i, row in enumerate(self.rows) if row.prompt in prompts]
        mine = {new: self.mine[old] for new, old in enumerate(at) if old in self.mine}
        return replace(self, rows=[self.rows[i] for i in at], mine=mine)

    def mixed(self, low: float | None = None, high: float | None = None) -> Rollout:
        """The groups whose rewards are not all equal (DAPO, 2503.14476, eq. 11), and whose mean is within bounds."""
        kept = mixed(self.rewards, self.groups, low, high).tolist()
        return self.only({row.prompt for row, keep in zip(self.rows, kept, strict=True) if keep})

    @staticmethod
    def joined(parts: Sequence[Rollout]) -> Rollout:
        """All groups of several rollouts, under new numbers."""
        rows: list[Row] = []
        mine: dict[int, Sample] = {}
        number = 0
        for part in parts:
            mine |= {len(rows) + at: sample for at, sample in part.mine.items()}
            new = {prompt: number + i for i, prompt in enumerate(part.prompts)}
            rows += [replace(row, prompt=new[row.prompt]) for row in part.rows]
            number += len(new)
        errors = [error for part in parts for error in part.errors]
        return replace(parts[0], rows=rows, errors=errors, mine=mine, num_gen_batches=len(parts))

    def deal(self, per_update: int, pairs: Sequence[tuple[int, int]] | None = None) -> list[list[Sample]]:
        """Send every sample to the replica that trains on it.

        Whole steps are cut, in order, into updates of ``per_update`` samples (the last may be smaller where groups were
        dropped); each update is dealt over data parallelism in shares of nearly equal cost.

        Args:
            pairs: rows that stay together, as neighbours: then updates are of so many pairs, and other rows go nowhere.

        Returns:
            for every update, this replica's samples. The same on all ranks of a replica.
        """
        owner: dict[int, int] = {}  # row -> data-parallel rank
        units: Sequence[tuple[int, ...]] = [(row,) for row in range(len(self.rows))] if pairs is None else pairs
        updates = [units[i : i + per_update] for i in range(0, len(units), per_update)]
        lengths = self.lengths
        for update in updates:
            costs = [self.flops.forward([lengths[row] for row in unit]) for unit in update]
            for dp_rank, share in enumerate(balance(costs, self.mesh.dp_size)):
                owner |= {row: dp_rank for i in share for row in update[i]}
        outgoing: list[list[Sample]] = [[] for _ in range(self.mesh.world_size)]
        for row, sample in self.mine.items():
            sample.row = row
            for rank in range(self.mesh.world_size):
                if self.mesh.dp_rank_of(rank) == owner.get(row):
                    outgoing[rank].append(sample)
        received = {s.row: s for sent in exchange_samples(outgoing, self.mesh.host_group) for s in sent}
        here = self.mesh.dp_rank
        return [[received[row] for unit in update for row in unit if owner[row] == here] for update in updates]

    def metrics(self) -> dict[str, float]:
        """Rewards and lengths of the step, in verl's names."""
        rewards = self.rewards
        responses = torch.tensor([row.response_length for row in self.rows], dtype=torch.float32)
        out = {
            "reward/mean": rewards.mean().item(),
            "reward/std": rewards.std(correction=0).item(),
            "frac_reward_zero_std": zero_variance_fraction(rewards, self.groups),
            "reward/errors": float(len(self.errors)),
            "response_length/mean": responses.mean().item(),
            "response_length/max": responses.max().item(),
            "response_length/min": responses.min().item(),
            "response_length/clip_ratio": sum(row.cut for row in self.rows) / len(self.rows),
            "prompt_length/mean": sum(row.prompt_length for row in self.rows) / len(self.rows),
        }
        if self.num_gen_batches > 1:
            out["dynamic_sampling/num_gen_batches"] = float(self.num_gen_batches)
        if self.beside or self.ages:
            out |= self.beside | self._staleness()
        parts = means([row.result.parts for row in self.rows])
        return out | {f"reward/{name}": value for name, value in parts.items()} | self._measured()

    def _measured(self) -> dict[str, float]:
        """What environments measured: verl's names for turns and tools, the others as means."""
        measures = [row.measures for row in self.rows]
        out = {f"environment/{name}": value for name, value in means(measures).items()}
        for name in ("num_turns", "tool_calls"):
            if f"environment/{name}" in out:
                metric = "tool_call_counts" if name == "tool_calls" else name
                out[f"{metric}/mean"] = out.pop(f"environment/{name}")
                out[f"{metric}/max"] = max(row[name] for row in measures if name in row)
        if "environment/tool_failures" in out:
            calls = sum(row.get("tool_calls", 0) for row in measures)
            failures = sum(row.get("tool_failures", 0) for row in measures)
            out["tool_call_counts/failure_ratio"] = failures / calls if calls else 0.0
            del out["environment/tool_failures"]
        return out

    def _staleness(self) -> dict[str, float]:
        """Over tokens, and the share of samples that more than one version of the weights wrote."""
        tokens = sum(row.response_length for row in self.rows)
        return {
            "staleness/mean": sum(row.staleness[0] * row.response_length for row in self.rows) / tokens,
            "staleness/max": float(max(row.staleness[1] for row in self.rows)),
            "frac_mixed_version": sum(row.staleness[1] > row.staleness[2] for row in self.rows) / len(self.rows),
        }


def mixed(rewards: Tensor, groups: Tensor, low: float | None, high: float | None) -> Tensor:
    """[N] bool: samples of groups whose rewards are not all equal, and whose mean is within bounds."""
    keep = keep_mixed(rewards, groups)
    if low is not None or high is not None:
        keep &= keep_between(rewards, groups, -math.inf if low is None else low, math.inf if high is None else high)
    return keep


def means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each name over those that have it: rewards of some domains, measures of some episodes."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def inputs_of(prompt: Prompt, samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase) -> list[RewardInput]:
    """What reward functions are told of a prompt's samples. What a policy read in between is none of its completion, so
    that no reward takes a tool's words for its own; the whole is in "transcripts"."""
    responses = [sample.tokens[sample.prompt_length :] for sample in samples]
    written = [own(sample, response) for sample, response in zip(samples, responses, strict=True)]
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    transcripts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    inputs = []
    for sample, tokens, text, transcript in zip(samples, written, texts, transcripts, strict=True):
        columns = prompt.fields | sample.measures
        columns |= {
            "completions": text,
            "prompts": prompt.text,
            "answers": prompt.answer,
            "completion_ids": tokens,
            "finish_reasons": sample.finish_reason,
            "transcripts": transcript,
        }
        inputs.append(RewardInput(prompt.id, sample.index, columns))
    return inputs


def own(sample: Sample, response: list[int]) -> list[int]:
    """The tokens of a response that the policy wrote."""
    if sample.loss_mask is None:
        return response
    return [token for token, wrote in zip(response, sample.loss_mask.tolist(), strict=True) if wrote]


def row_of(number: int, sample: Sample, result: RewardResult) -> Row:
    """The row of a sample of the step's prompt ``number``."""
    length, prompt_length = sample.response_length, sample.prompt_length
    written = length if sample.loss_mask is None else int(sample.loss_mask.sum())
    reason, measures = sample.finish_reason, sample.measures
    return Row(number, sample.index, sample.prompt_id, prompt_length, length, written, reason, result, measures)


def tabulate(scored: Sequence[tuple[Row, Sample]], mesh: Mesh, longest: int, flops: ModelFlops) -> Rollout:
    """A rollout from what every rank sampled. A collective over all ranks.

    A group with a sample that could not be scored is dropped, since a group's advantages need all of it. None may be
    left: `not_empty`.
    """
    everywhere = [row for part in gather_objects([row for row, _ in scored], mesh.host_group) for row in part]
    here = {(row.prompt, row.index): sample for row, sample in scored}
    errors = [row.result.error for row in everywhere if row.result.error]
    broken = {row.prompt for row in everywhere if row.result.error}
    kept = sorted((row for row in everywhere if row.prompt not in broken), key=lambda row: (row.prompt, row.index))
    mine = {at: here[row.prompt, row.index] for at, row in enumerate(kept) if (row.prompt, row.index) in here}
    return Rollout(kept, errors, mine, mesh, longest, flops)


def not_empty(rollout: Rollout) -> Rollout:
    """The rollout. Raises EmptyStepError where none of its groups could be scored whole."""
    if rollout.rows:
        return rollout
    errors = rollout.errors
    raise EmptyStepError(f"no group of this step could be scored; the first of {len(errors)} errors: {errors[0]}")


def training_sampling(cfg: Config, step: int) -> Sampling:
    """How a step's prompts are sampled."""
    r = cfg.rollout
    stages = [Stage(stage.first_step, stage.max_response_length) for stage in r.response_length_stages]
    longest = max_response_length_at(stages, step) if stages else r.max_response_length
    return Sampling(r.num_generations_per_prompt, longest, r.temperature, r.top_p, r.top_k, r.stop_token_ids)


def validation_sampling(cfg: Config) -> Sampling:
    """How held-out prompts are sampled."""
    v, r = cfg.validation, cfg.rollout
    n, longest = v.val_num_generations_per_prompt, r.max_response_length
    return Sampling(n, longest, v.val_temperature, v.val_top_p, stop_token_ids=r.stop_token_ids)


def enough_groups(cfg: Config, batch: Callable[[int], Rollout]) -> Rollout:
    """A step's rollout from ``batch(attempt)``, which samples and scores the next step's number of prompts.

    With ``rollout.dynamic_sampling`` only groups of different rewards count, and further batches are sampled until
    there are as many of them as a step has prompts; or fewer, after ``dynamic_sampling_max_gen_batches``. Raises
    EmptyStepError if there is none.
    """
    r = cfg.rollout
    if not r.dynamic_sampling:
        return not_empty(batch(0))
    parts: list[Rollout] = []
    for attempt in range(r.dynamic_sampling_max_gen_batches):
        parts.append(batch(attempt).mixed(r.dynamic_sampling_min_reward, r.dynamic_sampling_max_reward))
        if sum(len(part.prompts) for part in parts) >= r.num_prompts_per_step:
            break
    rollout = Rollout.joined(parts)
    rollout = learnable(rollout, r.num_prompts_per_step * len(parts))
    return rollout.only(set(rollout.prompts[: r.num_prompts_per_step]))


def learnable(rollout: Rollout, sampled: int) -> Rollout:
    """The rollout of `rollout.dynamic_sampling`. Raises EmptyStepError where none of the groups of ``sampled`` prompts
    is left."""
    if rollout.rows:
        return rollout
    text = f"none of {sampled} prompts has samples of different rewards; nothing can be learnt"
    failed = f" {len(rollout.errors)} rewards failed, first: {rollout.errors[0]}" if rollout.errors else ""
    why = f"are the prompts far too hard, or far too easy?{failed}"
    raise EmptyStepError(f"{text} (rollout.dynamic_sampling): {why}")


def with_greedy(rollout: Rollout, greedy: Rollout) -> tuple[Rollout, Rollout]:
    """The groups whose prompt also has a scored greedy response, and those responses, under the prompt's number."""
    both = set(rollout.prompts) & set(greedy.prompts)
    kept = replace(rollout.only(both), errors=greedy.errors + rollout.errors)
    return not_empty(kept), greedy.only(both)


def validation_metrics(cfg: Config, rollout: Rollout) -> dict[str, float]:
    """``val/accuracy``, the mean of the reward function ``validation.val_reward`` (pass@1 where it is 0 or 1), the mean
    weighted reward, and response lengths."""
    metrics = not_empty(rollout).metrics()
    measured = cfg.validation.val_reward or cfg.reward.functions[0].name
    if f"reward/{measured}" not in metrics:
        raise RewardError(f"no held-out sample is scored by {measured!r}: name a reward of its domains as val_reward")
    return {
        "val/accuracy": metrics[f"reward/{measured}"],
        "val/reward": metrics["reward/mean"],
        "val/response_length": metrics["response_length/mean"],
        "val/clip_ratio": metrics["response_length/clip_ratio"],
        "val/num_samples": float(len(rollout.rows)),
        "val/errors": float(len(rollout.errors)),
    }
