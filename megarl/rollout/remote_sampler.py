"""The rollout side of a run whose engines are servers of their own (``rollout.mode: remote``).

It has the methods of `megarl.rollout.sampler.Sampler`, and loops do not see the difference. On each replica of the
policy one rank, the first of its tensor, context and pipeline groups, drives a share of the groups
(`megarl.rollout.stream`); samples are born on the replica that most likely trains on them. `update` gives the servers
new weights, and lets the next groups begin.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYetError
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megarl.config import Config
from megarl.data.prompts import Prompt, PromptStream
from megarl.data.records import Sample
from megarl.environments.making import conversation_of
from megarl.model.family import read_spec
from megarl.model.flops import ModelFlops
from megarl.observe.timers import Phases
from megarl.parallel.collectives import gather_objects
from megarl.parallel.mesh import Mesh
from megarl.rewards.runner import RewardResult
from megarl.rollout.answers import RemoteError
from megarl.rollout.auth import token_of
from megarl.rollout.client import Bound, Client
from megarl.rollout.conversation import Sampling, converse
from megarl.rollout.remote import RemoteEngines, Sender, Senders
from megarl.rollout.sampler import Draw
from megarl.rollout.scoring import Scorer
from megarl.rollout.serve import discover, engines_folder
from megarl.rollout.stream import Loop, Stream, StreamError
from megarl.rollout.table import (
    Rollout,
    Row,
    enough_groups,
    row_of,
    tabulate,
    training_sampling,
    validation_metrics,
    validation_sampling,
    with_greedy,
)
from megarl.rollout.vllm_engine import RolloutError
from megarl.weights.stream import WeightStream
from megarl.weights.sync import push

_POLL_S = 0.5  # how long ranks wait before they ask one another whether something has happened
_DONE, _WAITING, _STARVED, _FAILED = range(4)
T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """What a conversation with every sample of a prompt came to."""

    prompt: Prompt
    samples: Sequence[Sample]
    results: Sequence[RewardResult]


@dataclass(frozen=True)
class Made:
    """A prompt's group and, for ReMax, its greedy response."""

    group: Group
    greedy: Group | None


class Driver:
    """What the leading rank of a replica has: the thread, the clients, the rewards."""

    def __init__(self, cfg: Config, mesh: Mesh, tokenizer: PreTrainedTokenizerBase) -> None:
        r = cfg.rollout
        self.cfg = cfg
        self.share = (mesh.dp_rank, mesh.dp_size)
        self.conversation = conversation_of(cfg, tokenizer)
        self.scorer = Scorer(cfg.reward, tokenizer)
        self.loop = Loop("megarl-rollout")
        token = token_of(engines_folder(cfg))
        salted = r.on_update == "keep_kv"
        self.client = self.loop.call(partial(Client, token=token, salted=salted))
        self.room = asyncio.Semaphore(r.max_concurrent or 10**9)
        self.first_step = 1  # the one that group 0 is for
        self.stream = Stream[Made](
            self.loop, self._make, batch=r.num_prompts_per_step, max_staleness=r.max_staleness, share=self.share
        )

    async def _make(self, index: int, prompt: Prompt) -> Made:
        sampling = training_sampling(self.cfg, self.first_step + index // self.cfg.rollout.num_prompts_per_step)
        if self.cfg.algorithm != "remax":
            return Made(await self.group(prompt, sampling), None)
        group, greedy = await asyncio.gather(self.group(prompt, sampling), self.group(prompt, sampling.greedy()))
        return Made(group, greedy)

    async def group(self, prompt: Prompt, sampling: Sampling) -> Group:
        """Converse, and score."""
        engine = Bound(self.client, sampling)

        async def one(index: int) -> Sample:
            async with self.room:
                return replace(await converse(self.conversation, engine, prompt), index=index)

        outcomes = await asyncio.gather(*(one(index) for index in range(sampling.n)), return_exceptions=True)
        if errors := [(k, error) for k, error in enumerate(outcomes) if isinstance(error, BaseException)]:
            return Group(prompt, *zip(*(self._failed(prompt, k, error) for k, error in errors), strict=True))
        return Group(prompt, outcomes, await self.scorer.score(prompt, outcomes))

    def _failed(self, prompt: Prompt, index: int, error: BaseException) -> tuple[Sample, RewardResult]:
        """Of a conversation that raised: an error of its group alone, unless ``reward.on_error`` or what it is says
        that the run is to end."""
        told = f"prompt {prompt.id}, sample {index}: its conversation raised {type(error).__name__}: {error}"
        if not isinstance(error, Exception) or isinstance(error, RolloutError):
            raise error
        if self.cfg.reward.on_error == "abort":
            raise RolloutError(told) from error
        return Sample(prompt.id, index, prompt.tokens, len(prompt.tokens)), RewardResult(None, {}, told)

    async def groups(self, prompts: Sequence[Prompt], sampling: Sampling) -> dict[int, Group]:
        """This replica's share of these prompts, by their place."""
        mine = range(self.share[0], len(prompts), self.share[1])
        return dict(zip(mine, await asyncio.gather(*(self.group(prompts[i], sampling) for i in mine)), strict=True))

    def close(self) -> None:
        self.stream.stop()
        self.loop.run(self.client.close()).result()
        self.loop.close()
        self.scorer.close()


class RemoteSampler:
    """Every method is a collective over all ranks."""

    def __init__(
        self,
        cfg: Config,
        mesh: Mesh,
        tokenizer: PreTrainedTokenizerBase,
        phases: Phases,
        prompts: PromptStream[Prompt],
        *,
        steps: int,
    ) -> None:
        """
        Args:
            prompts: the run's. Groups are drawn ahead from a copy of it; it moves on when steps are taken.
            steps: of the run, beyond which no group is sampled.
        """
        self.cfg, self.mesh, self.phases = cfg, mesh, phases
        self._prompts, self._steps = prompts, steps
        self._flops = ModelFlops.of(read_spec(cfg.model.path))
        leads = mesh.tp_rank == mesh.cp_rank == mesh.pp_rank == 0
        self._driver = Driver(cfg, mesh, tokenizer) if leads else None
        self._engines: RemoteEngines | None = None  # from the first update on, which says what weights there are
        self._weights: WeightStream | None = None
        self._version: int | None = None

    # ---- weights -----------------------------------------------------------------------------------------------------

    def update(self, weights: WeightStream, version: int) -> None:
        """Give the servers the policy's weights, which have had ``version`` updates, and let the groups begin that may.

        The next version goes on with what is in work. Any other (the first; a checkpoint that the run goes back to)
        begins anew at the data's present place. The same version again is for servers that have joined.
        """
        goes_on = self._version is not None and version in (self._version, self._version + 1)
        if self._driver is not None:
            self._driver.loop.call(self._driver.client.hold)
            if not goes_on:
                self._driver.stream.stop()
        dist.barrier(group=self.mesh.host_group)  # from here on nobody sends a request with the old version's name
        self._push(weights, version)
        if self._driver is not None:
            assert self._engines is not None
            self._driver.loop.call(self._driver.client.use, self._engines.urls, version)
            if not goes_on:
                self._begin(version)
            elif version != self._version:
                self._driver.stream.advance()
        self._version, self._weights = version, weights

    def _push(self, weights: WeightStream, version: int) -> None:
        if self._engines is None:
            senders = Senders.of_stream(weights)
            self._engines = RemoteEngines(self.mesh, partial(self._sender, weights, senders), senders.ranks)
        self._engines.announce(version)
        try:
            push(weights, self._engines, verify=self.cfg.weight_sync.verify)
        except RemoteError as error:
            raise RolloutError(str(error)) from error

    def _sender(self, weights: WeightStream, senders: Senders) -> Sender:
        r, sync = self.cfg.rollout, self.cfg.weight_sync
        folder = engines_folder(self.cfg)
        return Sender(
            partial(discover, folder),
            weights.metadata,
            sync.bucket_size_mb << 20,
            self.mesh.device,
            senders=senders,
            rank=self.mesh.rank,
            token=token_of(folder),
            on_update=r.on_update,
            min_engines=r.min_engines,
            wait_s=r.engine_timeout_s,
            timeout_s=self.cfg.run.deadline_s,
            verify=sync.verify,
        )

    def _begin(self, version: int) -> None:
        assert self._driver is not None
        ahead = PromptStream(self._prompts.items, self._prompts.seed, self._prompts.shuffle)
        ahead.load_state_dict(self._prompts.state_dict())
        self._driver.first_step = version + 1
        self._driver.stream.begin(ahead.next, self._steps - version)

    # ---- rollouts ----------------------------------------------------------------------------------------------------

    def rollout(self, draw: Draw, step: int) -> Rollout:
        """A step's groups, as `Sampler.rollout`. Raises RolloutError where a conversation failed, with the prompt's
        id."""
        rollout = enough_groups(self.cfg, lambda attempt: self._take(draw, step)[0])
        return self._measured(rollout)

    def rollout_with_greedy(self, draw: Draw, step: int) -> tuple[Rollout, Rollout]:
        """As `Sampler.rollout_with_greedy`."""
        rollout, greedy = self._take(draw, step)
        assert greedy is not None, "only remax has greedy responses"
        rollout, greedy = with_greedy(rollout, greedy)
        return self._measured(rollout), greedy

    def validate(self, prompts: Sequence[Prompt]) -> tuple[dict[str, float], list[str]]:
        """As `Sampler.validate`, beside the groups that are in work."""
        sampling = validation_sampling(self.cfg)
        asked = None
        if self._driver is not None:
            asked = self._driver.loop.run(self._driver.groups(prompts, sampling))
        with self.phases("generate"):
            groups = self._wait(asked)
        scored = [pair for i, group in groups.items() for pair in _rows(i, group)]
        rollout = tabulate(scored, self.mesh, sampling.max_tokens, self._flops)
        return validation_metrics(self.cfg, rollout), rollout.errors

    def make_room(self) -> None:
        """Servers take no memory of the trainer's."""

    def close(self) -> None:
        if self._driver is not None:
            self._driver.close()
        if self._engines is not None:
            self._engines.close()

    def _take(self, draw: Draw, step: int) -> tuple[Rollout, Rollout | None]:
        """The next batch of groups, and with ReMax their greedy responses."""
        count = self.cfg.rollout.num_prompts_per_step
        asked = None if self._driver is None else self._driver.stream.want(count)
        with self.phases("generate"):
            made = self._wait(asked)
        prompts = draw(count)  # only now: what a checkpoint keeps is how many prompts steps have taken
        for i, each in made.items():
            if each.group.prompt.id != prompts[i].id:
                raise RolloutError(f"step {step} has {each.group.prompt.id} where the data has {prompts[i].id}")
        longest = training_sampling(self.cfg, step).max_tokens
        scored = [pair for i, each in made.items() for pair in _rows(i, each.group)]
        greedy = [pair for i, each in made.items() if each.greedy for pair in _rows(i, each.greedy)]
        scored = [self._aged(row, sample, step) for row, sample in scored]
        rollout = tabulate(scored, self.mesh, longest, self._flops)
        if self.cfg.algorithm != "remax":
            return rollout, None
        return rollout, tabulate(greedy, self.mesh, longest, self._flops)

    def _aged(self, row: Row, sample: Sample, step: int) -> tuple[Row, Sample]:
        """How many updates the weights that sampled each token are behind those that ``step`` trains."""
        if row.result.error is not None and sample.versions is None:  # its conversation raised: nothing of it trains
            return row, sample
        assert sample.versions is not None, "every token of a server's has a version"
        sample.staleness = step - 1 - sample.versions
        oldest, newest = int(sample.staleness.max()), int(sample.staleness.min())
        bound = self.cfg.rollout.max_staleness
        if not 0 <= newest <= oldest <= bound:
            raise RolloutError(
                f"{sample.name}: step {step} would train on tokens that are {newest} to {oldest} updates old, with "
                f"rollout.max_staleness={bound}"
            )
        mean = sample.staleness.float().mean().item()
        return replace(row, staleness=(mean, oldest, newest)), sample

    def _measured(self, rollout: Rollout) -> Rollout:
        """With the numbers of the engines."""
        assert self._engines is not None
        mine = {} if self._driver is None else self._driver.loop.call(self._driver.client.counts.metrics)
        everywhere = gather_objects(mine, self.mesh.host_group)
        names = {name for counts in everywhere for name in counts}
        sums = {name: sum(counts.get(name, 0.0) for counts in everywhere) for name in sorted(names)}
        engines = {"engines/number": float(len(self._engines.urls))} | self._engines.seconds
        return replace(rollout, beside=sums | engines)

    def _wait(self, asked: Future[dict[int, T]] | None) -> dict[int, T]:
        """What a driver's thread was asked for; nothing on the ranks without one.

        Ranks agree twice a second on how it stands. Where some replica has had no server for a while, all give those
        that can be found the weights again.
        """
        while True:
            state, words = self._state(asked)
            worst = torch.tensor([state])
            dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=self.mesh.host_group)
            if worst.item() == _DONE:
                return {} if asked is None else asked.result()
            if worst.item() == _FAILED:
                said = next(filter(None, gather_objects(words, self.mesh.host_group)))
                raise RolloutError(said)
            if worst.item() == _STARVED:
                assert self._weights is not None and self._version is not None
                with self.phases("sync"):  # which has a deadline of its own
                    self.update(self._weights, self._version)

    def _state(self, asked: Future[Any] | None) -> tuple[int, str | None]:
        if asked is None or self._driver is None:
            return _DONE, None
        try:
            asked.result(timeout=_POLL_S)
        except NotYetError:
            if asked.done():  # the work timed out, or ended just now
                error = asked.exception()
                return (_DONE, None) if error is None else (_FAILED, f"{type(error).__name__}: {error}")
            return (_STARVED if self._driver.client.starved else _WAITING), None
        except StreamError as error:
            return _FAILED, str(error)
        except Exception as error:  # whatever it is, all ranks have to hear of it
            return _FAILED, f"{type(error).__name__}: {error}"
        return _DONE, None


def _rows(number: int, group: Group) -> list[tuple[Row, Sample]]:
    pairs = zip(group.samples, group.results, strict=True)
    return [(row_of(number, sample, result), sample) for sample, result in pairs]
