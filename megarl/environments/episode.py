"""One conversation under way: its transcript, its measures, and the limits that end it.

Contract: an `Episode` is an `AsyncEngine` that keeps every token that the engine sampled and every token that was
appended since, and ends the conversation at `max_turns` turns, at the rollout's limit of tokens (observations
included), when a turn takes longer than `turn_timeout_s` (from where the policy is asked to where it is asked again, so
tools are part of it), or the whole longer than `episode_timeout_s`. What was written until then is a sample like any
other, whose finish_reason is "length", "turns" or "timeout"; an observation that no turn follows is left out of it.

It also sees to it that a conversation passes on what it was given: a prompt of a turn that does not begin with the
transcript, token by token, is an error and not a sample.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megarl.data.prompts import Prompt
from megarl.data.records import Sample
from megarl.rollout.conversation import AsyncEngine, Completion, Conversation, Transcript


@dataclass(frozen=True)
class EpisodeLimits:
    """Where a conversation ends at the latest; None: nowhere."""

    max_turns: int | None = None
    turn_timeout_s: float | None = None
    episode_timeout_s: float | None = None


class EpisodeOver(Exception):
    """A limit was reached: `str` of it is the sample's finish_reason."""


class Episode:
    """An engine for one conversation."""

    def __init__(self, engine: AsyncEngine, prompt: Prompt, limits: EpisodeLimits, clock: asyncio.Timeout) -> None:
        self.max_tokens = engine.max_tokens
        self.measures = {"num_turns": 0.0}
        self._engine = engine
        self._prompt = prompt
        self._limits = limits
        self._clock = clock
        self._ends = _later(limits.episode_timeout_s)
        self._transcript = Transcript(prompt)
        self._unread: list[int] = []

    async def turn(self, max_tokens: int | None = None, *, stop_token_ids: Sequence[int] = ()) -> Completion:
        """What the policy writes next, of at most `max_tokens`."""
        tokens = self._transcript.tokens + self._unread
        return await self.generate(tokens, max_tokens or self.max_tokens, stop_token_ids=stop_token_ids)

    def observe(self, tokens: Sequence[int]) -> None:
        """What the policy reads before its next turn."""
        self._unread += tokens

    async def generate(self, tokens: list[int], max_tokens: int, *, stop_token_ids: Sequence[int] = ()) -> Completion:
        """As an engine's, within the limits."""
        known = self._transcript.tokens
        if tokens[: len(known)] != known:
            at = next(i for i, (a, b) in enumerate(zip([*tokens, -1], known, strict=False)) if a != b)
            raise ValueError(
                f"prompt {self._prompt.id}: a turn was to follow tokens that differ from the transcript at position"
                f" {at} (were they tokenised again?)"
            )
        observed = tokens[len(known) :]
        room = min(max_tokens, self.max_tokens - self._transcript.response_length - len(observed))
        if self.measures["num_turns"] == self._limits.max_turns:
            raise EpisodeOver("turns")
        if room < 1:
            raise EpisodeOver("length")
        self._clock.reschedule(self._ends)
        await self._engine.ready()
        self._set_clock()
        completion = await self._engine.generate(tokens, room, stop_token_ids=stop_token_ids)
        self._transcript.observed(observed)
        self._transcript.wrote(completion)
        self._unread = []
        self.measures["num_turns"] += 1
        return completion

    async def ready(self) -> None:
        await self._engine.ready()

    def _set_clock(self) -> None:
        ends = [when for when in (self._ends, _later(self._limits.turn_timeout_s)) if when is not None]
        self._clock.reschedule(min(ends, default=None))

    def sample(self, finish_reason: str | None = None) -> Sample:
        """The conversation so far. Raises ValueError where the policy wrote nothing."""
        return self._transcript.sample(dict(self.measures), finish_reason)

    def checked(self, sample: Sample) -> Sample:
        """A sample that the conversation made itself, with all measures; its tokens have to be the transcript's."""
        known = self._transcript.tokens
        if sample.tokens[: len(known)] != known or sample.prompt_length != len(self._prompt.tokens):
            raise ValueError(f"prompt {self._prompt.id}: the conversation's sample has other tokens than were sampled")
        return replace(sample, measures=self.measures | sample.measures)


def within(limits: EpisodeLimits, conversation: Conversation) -> Conversation:
    """The conversation, ended at limits."""

    async def limited(engine: AsyncEngine, prompt: Prompt) -> Sample:
        try:
            async with asyncio.timeout(None) as clock:
                episode = Episode(engine, prompt, limits, clock)
                return episode.checked(await conversation(episode, prompt))
        except EpisodeOver as over:
            return episode.sample(str(over))
        except TimeoutError:
            if not clock.expired():  # a tool's own, which it should have dealt with
                raise
            return episode.sample("timeout")

    return limited


def _later(seconds: float | None) -> float | None:
    return None if seconds is None else asyncio.get_running_loop().time() + seconds
