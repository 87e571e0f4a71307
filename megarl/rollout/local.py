"""Conversations with the engine in this process.

    the engine's first rank                                   its other ranks
      an asyncio loop with all conversations                    follow
      ── let them run until each waits                          │
      ── what they ask for and have given up  ───── agree ────► the same
      ── one step of the engine               ◄─── together ──► one step
      └─ hand out what is finished, and again                   └─ and again

Between two steps of the engine conversations run; while it computes, tools that are awaited go on in their threads and
processes. A group of samples is scored when its last conversation ends, also meanwhile.

A `Batch` outlives a step of training. `run` ends as soon as enough groups are done; those that are not stay as they
are, in the middle of a turn if need be, and go on in the next `run`: what was sampled keeps its log-probabilities and
its version, what follows is sampled with the new weights. Their clocks stand still while the policy trains.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from megarl.data.prompts import Prompt
from megarl.data.records import Sample
from megarl.rewards.runner import RewardResult
from megarl.rollout.conversation import AsyncEngine, Completion, Conversation, Sampling, converse
from megarl.rollout.scoring import Scorer
from megarl.rollout.table import Row, row_of
from megarl.rollout.vllm_engine import RolloutError, VLLMEngine
from megarl.rollout.vllm_session import ABORTED, Request, Session

HEARTBEAT_S = 1.0  # between messages to the engine's other ranks while all conversations wait for tools
SETTLES = 4  # rounds of the loop in which conversations come to wait again: of a future, a gather, a timeout, a task
Scored = list[tuple[Row, Sample]]
T = TypeVar("T")


class PausableLoop(asyncio.SelectorEventLoop):
    """Its time stands still while it does not run, so that no deadline passes while the trainer works."""

    def __init__(self) -> None:
        self._stood_still, self._stopped = 0.0, time.monotonic()
        super().__init__()

    def time(self) -> float:
        return super().time() - self._stood_still

    def run_until_complete(self, future: Awaitable[T]) -> T:
        self._stood_still += time.monotonic() - self._stopped
        try:
            return super().run_until_complete(future)
        finally:
            self._stopped = time.monotonic()


@dataclass(frozen=True)
class _Command:
    """What all ranks of the engine do next."""

    requests: list[Request]
    given_up: list[str]
    over: bool


class _Asked:
    """A request, what it has so far, and who waits for it."""

    def __init__(self, tokens: list[int], sampling: Sampling, said_by: str, waiter: asyncio.Future[Completion]) -> None:
        self.tokens, self.sampling, self.said_by, self.waiter = tokens, sampling, said_by, waiter
        self.so_far = Completion([], [], ABORTED)

    def left(self, name: str, seed: int | None) -> Request:
        """What is still to be generated; ``seed`` is the run's, of which this request makes its own."""
        done = self.so_far.tokens
        if seed is not None:
            said = f"{seed}/{self.said_by}/{len(done)}".encode()
            seed = int.from_bytes(hashlib.blake2b(said, digest_size=8).digest()) >> 2
        sampling = replace(self.sampling, n=1, max_tokens=self.sampling.max_tokens - len(done))
        return Request(name, self.tokens + done, sampling, seed)

    def take(self, more: Completion, version: int) -> None:
        so_far = self.so_far
        versions = [*so_far.versions, *[version] * len(more.tokens)]
        self.so_far = Completion(
            so_far.tokens + more.tokens, so_far.logps + more.logps, more.finish_reason, versions=versions
        )


class _Engine:
    """The engine as one conversation sees it."""

    def __init__(self, batch: Batch, sampling: Sampling, name: str) -> None:
        self.max_tokens = sampling.max_tokens
        self._batch, self._sampling, self._name = batch, sampling, name
        self._turns = itertools.count()

    async def generate(self, tokens: list[int], max_tokens: int, *, stop_token_ids: Sequence[int] = ()) -> Completion:
        stops = (*self._sampling.stop_token_ids, *stop_token_ids)
        sampling = replace(self._sampling, max_tokens=max_tokens, stop_token_ids=stops)
        return await self._batch.ask(tokens, sampling, f"{self._name}/{next(self._turns)}")

    async def ready(self) -> None:
        """It is: conversations run only while it is awake."""


@dataclass
class Talks:
    """What conversations of one engine have in common, with the clock that all of them go by: it stands still between
    runs, whichever batch they belong to. The engine's other ranks have no scorer, and only follow."""

    engine: VLLMEngine
    conversation: Conversation
    scorer: Scorer | None
    abort_on_error: bool  # whether a conversation that raises ends the run, and not its group alone
    seed_per_request: bool = True  # so that what is sampled does not depend on how long tools take
    version: int = 0  # of the engine's weights
    loop: PausableLoop = field(default_factory=PausableLoop)

    def close(self) -> None:
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()


class Batch:
    """Groups under way on one engine."""

    def __init__(self, talks: Talks, *, goes_on: bool = False) -> None:
        """
        Args:
            goes_on: whether samples may be of older weights, and are to say so.
        """
        self._talks, self._loop, self._goes_on = talks, talks.loop, goes_on
        self._groups: dict[asyncio.Task[Scored], tuple[int, Prompt]] = {}
        self._names = map(str, itertools.count())
        self._asked: dict[str, _Asked] = {}
        self._new: list[str] = []
        self._given_up: list[str] = []
        self._news = asyncio.Event()
        self._seed = 0

    @property
    def under_way(self) -> list[tuple[int, Prompt]]:
        """Number and prompt of the groups that are not done, oldest first; on the engine's first rank."""
        return [self._groups[task] for task in self._oldest_first()]

    def _oldest_first(self) -> list[asyncio.Task[Scored]]:
        return sorted(self._groups, key=lambda task: self._groups[task][0])

    def run(
        self,
        prompts: deque[tuple[int, Prompt]],
        sampling: Sampling,
        seed: int,
        *,
        want: int,
        more: int = 0,
        accept: Callable[[Scored], bool] | None = None,
    ) -> Scored:
        """Go on with what is under way, and with ``prompts`` from the left.

        Args:
            want: groups to finish.
            more: groups to have under way beside those that are still wanted.
            accept: which groups count; another prompt is begun for one that does not. None: all.

        Returns:
            on the engine's first rank, the rows and samples of the groups that count, and of those that could not be
            scored.
        """
        self._seed = seed
        with self._talks.engine.session(seed) as session:
            if self._talks.scorer is None:
                _follow(session)
                return []
            return self._loop.run_until_complete(self._lead(session, prompts, sampling, want, more, accept))

    def discard(self) -> None:
        """Forget what is under way."""
        for task in self._groups:
            task.cancel()
        if self._groups:
            self._loop.run_until_complete(asyncio.wait(self._groups))
        self._groups, self._asked, self._new, self._given_up = {}, {}, [], []

    async def ask(self, tokens: list[int], sampling: Sampling, said_by: str) -> Completion:
        """A completion, by whichever runs it takes. ``said_by`` is the turn's name."""
        self._talks.engine.refuse_bad_prompts([tokens])
        name = next(self._names)
        waiter = asyncio.get_running_loop().create_future()
        asked = self._asked[name] = _Asked(list(tokens), sampling, said_by, waiter)
        self._new.append(name)
        self._news.set()
        try:
            return await asked.waiter
        except asyncio.CancelledError:
            self._given_up.append(name)
            self._news.set()
            raise
        finally:
            del self._asked[name]

    async def _lead(
        self,
        session: Session,
        prompts: deque[tuple[int, Prompt]],
        sampling: Sampling,
        want: int,
        more: int,
        accept: Callable[[Scored], bool] | None,
    ) -> Scored:
        self._new, self._given_up = list(self._asked), []  # what was asked before goes on
        finished: Scored = []
        count = 0
        while True:
            while prompts and len(self._groups) < want - count + more:
                self._begin(*prompts.popleft(), sampling)
            for _ in range(SETTLES):
                await asyncio.sleep(0)
            for task in [task for task in self._oldest_first() if task.done()]:
                if count == want:  # as many as were wanted ended together with it: they wait for the next run
                    break
                del self._groups[task]
                group = self._aged(task.result())
                whole = all(row.result.error is None for row, _ in group)
                counts = accept is None or (whole and accept(group))
                count += counts
                finished += group if counts or not whole else []
            over = count == want or not (self._groups or prompts)
            if not over and prompts and len(self._groups) < want - count + more:
                continue
            self._pass_on(session, over)
            if over:
                return finished
            if not session.busy:
                self._news.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), HEARTBEAT_S)

    def _begin(self, number: int, prompt: Prompt, sampling: Sampling) -> None:
        task = self._loop.create_task(self._group(number, prompt, sampling))
        task.add_done_callback(lambda _: self._news.set())
        self._groups[task] = (number, prompt)

    def _pass_on(self, session: Session, over: bool) -> None:
        """Say to all ranks what is new, and take a step with them, or the last."""
        seed = self._seed if self._talks.seed_per_request else None
        requests = [self._asked[name].left(name, seed) for name in self._new if name in self._asked]
        command = session.agree(_Command(requests, self._given_up, over))
        self._new, self._given_up = [], []
        finished, partial = _obey(session, command)
        for name, completion in partial.items():
            self._asked[name].take(completion, self._talks.version)
        for name, completion in finished.items():
            asked = self._asked[name]
            asked.take(completion, self._talks.version)
            if not asked.waiter.done():
                asked.waiter.set_result(asked.so_far)

    async def _group(self, number: int, prompt: Prompt, sampling: Sampling) -> Scored:
        """The rows and samples of a group. An error of one of its conversations is the row's."""
        assert self._talks.scorer is not None
        engines: list[AsyncEngine] = [_Engine(self, sampling, f"{number}/{k}") for k in range(sampling.n)]
        talks = (converse(self._talks.conversation, engine, prompt) for engine in engines)
        outcomes = await asyncio.gather(*talks, return_exceptions=True)
        if errors := [(k, error) for k, error in enumerate(outcomes) if isinstance(error, BaseException)]:
            return [self._failed(number, prompt, k, error) for k, error in errors]
        samples = [replace(sample, index=k) for k, sample in enumerate(outcomes)]
        results = await self._talks.scorer.score(prompt, samples)
        return [(row_of(number, sample, result), sample) for sample, result in zip(samples, results, strict=True)]

    def _aged(self, group: Scored) -> Scored:
        """With how many updates its tokens are behind, where groups go on from step to step."""
        if not self._goes_on:
            return group
        aged = []
        for row, sample in group:
            if sample.versions is not None:
                behind = self._talks.version - sample.versions
                sample = replace(sample, staleness=behind)
                row = replace(row, staleness=(behind.float().mean().item(), int(behind.max()), int(behind.min())))
            aged.append((row, sample))
        return aged

    def _failed(self, number: int, prompt: Prompt, index: int, error: BaseException) -> tuple[Row, Sample]:
        told = f"prompt {prompt.id}, sample {index}: its conversation raised {type(error).__name__}: {error}"
        if not isinstance(error, Exception) or self._talks.abort_on_error:
            raise RolloutError(told) from error
        sample = Sample(prompt.id, index, prompt.tokens, len(prompt.tokens))
        return row_of(number, sample, RewardResult(None, {}, told)), sample


def _follow(session: Session) -> None:
    """The other ranks' part of a run."""
    over = False
    while not over:
        command: _Command = session.agree()
        _obey(session, command)
        over = command.over


def _obey(session: Session, command: _Command) -> tuple[dict[str, Completion], dict[str, Completion]]:
    """What was finished, and, at the end, what each of the others has so far."""
    session.abort(command.given_up)
    if command.over:
        return {}, session.abort()
    session.add(command.requests)
    return session.advance() if session.busy else {}, {}
