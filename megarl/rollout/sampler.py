"""From prompts to scored groups: each engine samples its share of the step's prompts, its leading rank scores them.

Every rank then knows the whole step as a small table (lengths, rewards, what went wrong); tokens and log-probabilities
stay where they were sampled until `Rollout.deal` sends each sample to the replica that trains on it.
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
from megarl.observe.timers import Phases
from megarl.parallel.collectives import exchange_samples, gather_objects
from megarl.parallel.mesh import Mesh
from megarl.rewards.runner import RewardInput, RewardResult, RewardWorkers
from megarl.rollout.conversation import Completion
from megarl.rollout.vllm_engine import Sampling, VLLMEngine

# How many prompts -> the next so many
Draw = Callable[[int], list[Prompt]]


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
    finish_reason: str
    result: RewardResult


@dataclass
class Rollout:
    """One step's samples. ``rows`` is the same on every rank, in the order of prompts; ``mine`` holds what was sampled
    here."""

    rows: list[Row]  # N, of groups that were scored whole
    errors: list[str]  # what was wrong with the samples of dropped groups
    mine: dict[int, Sample] = field(repr=False)  # row -> sample
    mesh: Mesh = field(repr=False)
    max_response_length: int  # of this step
    num_gen_batches: int = 1  # how often prompts were drawn and sampled for it

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
        keep = keep_mixed(self.rewards, self.groups)
        if low is not None or high is not None:
            bounds = -math.inf if low is None else low, math.inf if high is None else high
            keep &= keep_between(self.rewards, self.groups, *bounds)
        kept = keep.tolist()
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
        dropped); each update is dealt over data parallelism in shares of nearly equal length.

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
            totals = [sum(lengths[row] for row in unit) for unit in update]
            for dp_rank, share in enumerate(balance(totals, self.mesh.dp_size)):
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
        cut = [row.finish_reason == "length" for row in self.rows]
        out = {
            "reward/mean": rewards.mean().item(),
            "reward/std": rewards.std(correction=0).item(),
            "frac_reward_zero_std": zero_variance_fraction(rewards, self.groups),
            "reward/errors": float(len(self.errors)),
            "response_length/mean": responses.mean().item(),
            "response_length/max": responses.max().item(),
            "response_length/min": responses.min().item(),
            "response_length/clip_ratio": sum(cut) / len(cut),
            "prompt_length/mean": sum(row.prompt_length for row in self.rows) / len(self.rows),
        }
        if self.num_gen_batches > 1:
            out["dynamic_sampling/num_gen_batches"] = float(self.num_gen_batches)
        for name in self.rows[0].result.parts:
            out[f"reward/{name}"] = sum(row.result.parts[name] for row in self.rows) / len(self.rows)
        return out


class Sampler:
    """The rollout side of a run: engines and rewards. Every method is a collective over all ranks.

    The engine holds the device's memory from a push to the end of the next rollout, and sleeps while the trainer works.
    """

    def __init__(self, cfg: Config, mesh: Mesh, tokenizer: PreTrainedTokenizerBase, phases: Phases) -> None:
        """Start the engines with the weights of ``cfg.model.path``; they sleep until the first `push`.

        Build the sampler before the trainer: vLLM measures the memory that is free.
        """
        self.cfg = cfg
        self.mesh = mesh
        self.tokenizer = tokenizer
        self.phases = phases
        self.engine = VLLMEngine(
            cfg.model.path,
            cfg.rollout,
            dtype=cfg.rollout.dtype or cfg.model.dtype,
            device_type=mesh.device.type,
            max_model_len=cfg.rollout.max_model_len or cfg.data.max_prompt_length + cfg.rollout.max_response_length,
            seed=cfg.run.seed,
            deadline_s=cfg.run.deadline_s,
        )
        self.engine.sleep()
        self.leads = mesh.rank % cfg.rollout.tensor_parallel_size == 0
        self.rewards = RewardWorkers(cfg.reward) if self.leads else None

    def rollout(self, draw: Draw, step: int) -> Rollout:
        """Sample and score a step's prompts. Raises EmptyStepError if no group could be scored whole.

        With ``rollout.dynamic_sampling`` only groups of different rewards count, and more prompts are drawn, a step's
        number at a time, until there are as many of them as a step has prompts; or fewer, after
        ``dynamic_sampling_max_gen_batches`` draws.
        """
        r = self.cfg.rollout
        wanted, parts, mixed = r.num_prompts_per_step, [], 0
        for attempt in range(r.dynamic_sampling_max_gen_batches if r.dynamic_sampling else 1):
            part = self._sample(draw(wanted), self._training(step), seed=self._seed(step, attempt))
            low, high = r.dynamic_sampling_min_reward, r.dynamic_sampling_max_reward
            parts.append(part.mixed(low, high) if r.dynamic_sampling else part)
            mixed += len(parts[-1].prompts)
            if mixed >= wanted:
                break
        self.engine.sleep()
        rollout = Rollout.joined(parts) if r.dynamic_sampling else parts[0]
        if not rollout.rows:
            text = f"none of {wanted * len(parts)} prompts has samples of different rewards; nothing can be learnt"
            raise EmptyStepError(f"{text} (rollout.dynamic_sampling): are the prompts far too hard, or far too easy?")
        return rollout.only(set(rollout.prompts[:wanted])) if r.dynamic_sampling else rollout

    def rollout_with_greedy(self, draw: Draw, step: int) -> tuple[Rollout, dict[int, float]]:
        """As `rollout`, once, and the reward of the greedy response to each of its prompts, by the prompt's number.
        Where that one could not be scored, the prompt's group is left out."""
        r = self.cfg.rollout
        prompts = draw(r.num_prompts_per_step)
        sampling = self._training(step)
        greedy = self._sample(prompts, replace(sampling, n=1, temperature=0.0), seed=self._seed(step))
        rollout = self._sample(prompts, sampling, seed=self._seed(step))
        self.engine.sleep()
        rewards = {row.prompt: row.result.total for row in greedy.rows}
        kept = rollout.only(rewards)
        if not kept.rows:
            raise EmptyStepError("no prompt of this step has both its samples and its greedy response scored")
        return replace(kept, errors=greedy.errors + kept.errors), rewards

    def _training(self, step: int) -> Sampling:
        r = self.cfg.rollout
        stages = [Stage(stage.first_step, stage.max_response_length) for stage in r.response_length_stages]
        longest = max_response_length_at(stages, step) if stages else r.max_response_length
        return Sampling(r.num_generations_per_prompt, longest, r.temperature, r.top_p, r.top_k, r.stop_token_ids)

    def validate(self, prompts: Sequence[Prompt]) -> tuple[dict[str, float], list[str]]:
        """Sample held-out prompts.

        Returns:
            metrics: ``val/accuracy``, the mean of the reward function ``validation.val_reward`` (pass@1 where it is 0
            or 1), the mean weighted reward and response lengths; and what went wrong with samples that could not be
            scored.
        """
        v, r = self.cfg.validation, self.cfg.rollout
        sampling = Sampling(
            v.val_num_generations_per_prompt,
            r.max_response_length,
            v.val_temperature,
            v.val_top_p,
            stop_token_ids=r.stop_token_ids,
        )
        # The same seed at every validation: a change of accuracy is a change of the model.
        rollout = self._sample(list(prompts), sampling, seed=self._seed(0))
        metrics = rollout.metrics()
        measured = v.val_reward or self.cfg.reward.functions[0].name
        return {
            "val/accuracy": metrics[f"reward/{measured}"],
            "val/reward": metrics["reward/mean"],
            "val/response_length": metrics["response_length/mean"],
            "val/clip_ratio": metrics["response_length/clip_ratio"],
            "val/num_samples": float(len(rollout.rows)),
            "val/errors": float(len(rollout.errors)),
        }, rollout.errors

    def close(self) -> None:
        if self.rewards:
            self.rewards.close()
        self.engine.close()

    def _seed(self, step: int, attempt: int = 0) -> int:
        """One seed a step, draw and engine, in 63 bits: distinct for all that occur in a run."""
        return ((self.cfg.run.seed * 1_000_003 + step) * 10_007 + self.engine.replica + attempt * 2**50) % 2**63

    def _sample(self, prompts: list[Prompt], sampling: Sampling, seed: int) -> Rollout:
        share = range(self.engine.replica, len(prompts), self.engine.num_replicas)
        with self.phases("generate"):
            tokens = [prompts[i].tokens for i in share]
            completions = self.engine.generate(tokens, sampling, seed) if tokens else []
        if not self.leads:
            completions = []
        rows, samples = [], []
        with self.phases("reward"):
            results = self._score([prompts[i] for i in share], completions)
            for i, group, scored in zip(share, completions, results, strict=False):
                for k, (completion, result) in enumerate(zip(group, scored, strict=True)):
                    prompt = prompts[i]
                    length = len(completion.tokens)
                    rows.append(Row(i, k, prompt.id, len(prompt.tokens), length, completion.finish_reason, result))
                    sample = Sample(prompt.id, k, prompt.tokens + completion.tokens, len(prompt.tokens))
                    sample.rollout_logps = torch.tensor(completion.logps)
                    samples.append(sample)
            # Waiting for the slowest engine's rewards is part of the phase.
            everywhere = [row for part in gather_objects(rows, self.mesh.host_group) for row in part]
        here = dict(zip([(r.prompt, r.index) for r in rows], samples, strict=True))
        return self._whole_groups(everywhere, here, sampling.max_tokens)

    def _score(self, prompts: list[Prompt], completions: list[list[Completion]]) -> list[list[RewardResult]]:
        inputs = []
        for prompt, group in zip(prompts, completions, strict=False):
            texts = self.tokenizer.batch_decode([c.tokens for c in group], skip_special_tokens=True)
            for k, (completion, text) in enumerate(zip(group, texts, strict=True)):
                columns = dict(prompt.fields) | {
                    "completions": text,
                    "prompts": prompt.text,
                    "answers": prompt.answer,
                    "completion_ids": completion.tokens,
                    "finish_reasons": completion.finish_reason,
                }
                inputs.append(RewardInput(prompt.id, k, columns))
        results = iter(self.rewards.score(inputs)) if self.rewards and inputs else iter([])
        return [[next(results) for _ in group] for group in completions]

    def _whole_groups(self, rows: list[Row], samples: dict[tuple[int, int], Sample], longest: int) -> Rollout:
        """Drop every group with a sample that could not be scored: a group's advantages need all of it."""
        errors = [row.result.error for row in rows if row.result.error]
        broken = {row.prompt for row in rows if row.result.error}
        kept = sorted((row for row in rows if row.prompt not in broken), key=lambda row: (row.prompt, row.index))
        if not kept:
            raise EmptyStepError(
                f"no group of this step could be scored; the first of {len(errors)} errors: {errors[0]}"
            )
        mine = {at: samples[row.prompt, row.index] for at, row in enumerate(kept) if (row.prompt, row.index) in samples}
        return Rollout(kept, errors, mine, self.mesh, longest)
