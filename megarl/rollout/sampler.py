"""From prompts to scored groups: each engine samples its share of the step's prompts, its leading rank scores them.
What comes of it is a `megarl.rollout.table.Rollout`."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from megarl.config import Config
from megarl.data.prompts import Prompt
from megarl.data.records import Sample
from megarl.environments import SINGLE_TURN
from megarl.environments.making import conversation_of
from megarl.model.family import read_spec
from megarl.model.flops import ModelFlops
from megarl.observe.timers import Phases
from megarl.parallel.mesh import Mesh
from megarl.rewards.runner import RewardWorkers
from megarl.rollout.conversation import Completion, Transcript, single_turn
from megarl.rollout.local import Batch, Talks
from megarl.rollout.scoring import Scorer
from megarl.rollout.surplus import Surplus
from megarl.rollout.table import (
    Rollout,
    Row,
    enough_groups,
    inputs_of,
    row_of,
    tabulate,
    training_sampling,
    validation_metrics,
    validation_sampling,
    with_greedy,
)
from megarl.rollout.vllm_engine import Sampling, VLLMEngine
from megarl.weights.stream import WeightStream
from megarl.weights.sync import push

# A number of prompts -> the next so many
Draw = Callable[[int], list[Prompt]]


class Sampler:
    """The rollout side of a run, engines and rewards, where engines are in the trainer's processes. Every method is a
    collective over all ranks.

    The engine holds the device's memory from a push to the end of the next rollout, and sleeps while the trainer works.
    """

    def __init__(
        self,
        cfg: Config,
        mesh: Mesh,
        tokenizer: PreTrainedTokenizerBase,
        phases: Phases,
        prompts: Sequence[Prompt] = (),
    ) -> None:
        """Start the engines with the weights of ``cfg.model.path``; they sleep until the first `push`.

        Build the sampler before the trainer: vLLM measures the memory that is free.

        Args:
            prompts: all that are drawn from, where groups may go on from step to step.
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
            trust_remote_code=cfg.model.trust_remote_code,
        )
        self.engine.sleep()
        self.flops = ModelFlops.of(read_spec(cfg.model.path))
        self.leads = mesh.rank % cfg.rollout.tensor_parallel_size == 0
        self.rewards: RewardWorkers | None = None
        self.scorer: Scorer | None = None
        self.talks: list[Talks] = []  # those that end with their step, and, with a surplus, those that go on
        self.surplus: Surplus | None = None
        goes_on = cfg.rollout.oversample > 0 or cfg.rollout.dynamic_sampling_refill
        if cfg.rollout.environment == SINGLE_TURN and not goes_on:
            self.rewards = RewardWorkers(cfg.reward) if self.leads else None
        else:
            self.scorer = Scorer(cfg.reward, tokenizer) if self.leads else None
            self.talks = [self._new_talks() for _ in range(1 + goes_on)]
            self.surplus = Surplus(cfg, mesh, self.talks[1], prompts) if goes_on else None

    def _new_talks(self) -> Talks:
        """With a conversation, locks and clients included, and a clock of their own: a validation neither waits for
        what the surplus holds nor lets its clocks run."""
        conversation = conversation_of(self.cfg, self.tokenizer) if self.leads else single_turn
        abort = self.cfg.reward.on_error == "abort"
        return Talks(self.engine, conversation, self.scorer, abort, self.cfg.rollout.seed_per_request)

    def rollout(self, draw: Draw, step: int) -> Rollout:
        """Sample and score a step's prompts. Raises EmptyStepError if no group could be scored whole, or
        (`enough_groups`) none can be learnt from."""
        sampling = training_sampling(self.cfg, step)

        def batch(attempt: int) -> Rollout:
            prompts = draw(self.cfg.rollout.num_prompts_per_step)
            return self._sample(prompts, sampling, step, attempt)

        if self.surplus:
            with self.phases("generate"):
                seed = seed_of(self.cfg.run.seed, step, 0, "talks", self._seeded_by)
                rollout = self.surplus.rollout(draw, sampling, seed, self.flops)
        else:
            rollout = enough_groups(self.cfg, batch)
        self.engine.sleep()
        return rollout

    def rollout_with_greedy(self, draw: Draw, step: int) -> tuple[Rollout, Rollout]:
        """As `rollout`, once; and one greedy response to each of its prompts, under the prompt's number, by the same
        engines. Where either could not be scored, the prompt is left out."""
        prompts = draw(self.cfg.rollout.num_prompts_per_step)
        sampling = training_sampling(self.cfg, step)
        greedy = self._sample(prompts, sampling.greedy(), step)
        rollout = self._sample(prompts, sampling, step)
        self.engine.sleep()
        return with_greedy(rollout, greedy)

    def validate(self, prompts: Sequence[Prompt]) -> tuple[dict[str, float], list[str]]:
        """Sample held-out prompts. Returns metrics (`validation_metrics`), and what went wrong with samples that could
        not be scored."""
        # The same seeds at every validation: a change of accuracy is a change of the model.
        rollout = self._sample(list(prompts), validation_sampling(self.cfg), step=0)
        return validation_metrics(self.cfg, rollout), rollout.errors

    def update(self, weights: WeightStream, version: int) -> None:
        """Give the engines the policy's weights, which have had ``version`` updates."""
        push(weights, self.engine, verify=self.cfg.weight_sync.verify)
        for talks in self.talks:
            talks.version = version

    def make_room(self) -> None:
        """Let the engine sleep, until the next `update`."""
        self.engine.sleep()

    def close(self) -> None:
        if self.rewards:
            self.rewards.close()
        for talks in self.talks:
            talks.close()
        if self.scorer:
            self.scorer.close()
        self.engine.close()

    @property
    def _seeded_by(self) -> int:
        """The engine, where samples have no generators of their own."""
        return 0 if self.cfg.rollout.seed_per_request else self.engine.replica

    def _sample(self, prompts: list[Prompt], sampling: Sampling, step: int, attempt: int = 0) -> Rollout:
        share = range(self.engine.replica, len(prompts), self.engine.num_replicas)
        seed = self.cfg.run.seed, step, attempt
        if self.talks:
            with self.phases("generate"):  # rewards too, meanwhile
                mine = deque((i, prompts[i]) for i in share)
                own = seed_of(*seed, "talks", self._seeded_by)
                scored = Batch(self.talks[0]).run(mine, sampling, own, want=len(mine)) if mine else []
                return tabulate(scored, self.mesh, sampling.max_tokens, self.flops)
        with self.phases("generate"):
            tokens = [prompts[i].tokens for i in share]
            seeds: int | list[int] = seed_of(*seed, "engine", self.engine.replica)
            if self.cfg.rollout.seed_per_request:
                seeds = [seed_of(*seed, prompts[i].id, i) for i in share]
            completions = self.engine.generate(tokens, sampling, seeds) if tokens else []
        groups = [single_turns(prompts[i], group) for i, group in zip(share, completions, strict=True)]
        with self.phases("reward"):
            scored = self._scored(prompts, dict(zip(share, groups, strict=True))) if self.leads else []
            # Waiting for the slowest engine's rewards is part of the phase.
            return tabulate(scored, self.mesh, sampling.max_tokens, self.flops)

    def _scored(self, prompts: list[Prompt], groups: dict[int, list[Sample]]) -> list[tuple[Row, Sample]]:
        assert self.rewards is not None
        inputs = [entry for i, group in groups.items() for entry in inputs_of(prompts[i], group, self.tokenizer)]
        results = iter(self.rewards.score(inputs) if inputs else [])
        return [(row_of(i, sample, next(results)), sample) for i, group in groups.items() for sample in group]


def seed_of(seed: int, step: int, attempt: int, name: str, number: int) -> int:
    """Of a step's draw, a prompt and its place among the step's prompts (the same prompt may come twice); in 62 bits,
    far apart from one another."""
    said = f"{seed}/{step}/{attempt}/{name}/{number}".encode()
    return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest()) >> 2


def single_turns(prompt: Prompt, completions: Sequence[Completion]) -> list[Sample]:
    """A group, of one turn each."""
    group = []
    for index, completion in enumerate(completions):
        transcript = Transcript(prompt)
        transcript.wrote(completion)
        group.append(replace(transcript.sample(), index=index))
    return group
