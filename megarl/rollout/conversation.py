"""A rollout is an async function: ``conversation(engine, prompt) -> Sample``. It generates, acts on what was written,
lets the model read the outcome, and generates again, as often as it likes.

Contract: tokens in, tokens out. What a conversation appends is never tokenised again, so that the sample is exactly
what the engine saw. Tokens that the policy did not write are observations: they are outside of the sample's
``loss_mask``. A conversation holds no lock and blocks no loop: many of them wait side by side for one engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from megarl.data.prompts import Prompt
from megarl.data.records import Sample


@dataclass(frozen=True)
class Sampling:
    """How to sample. `temperature` 0 is greedy; `top_k` -1 means all tokens."""

    n: int = 1
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop_token_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.n < 1 or self.max_tokens < 1:
            raise ValueError(f"n={self.n} and max_tokens={self.max_tokens} must be at least 1")
        # vLLM silently raises a temperature below 0.01 to 0.01: the log-probs would be those of another policy.
        if self.temperature != 0 and not 0.01 <= self.temperature <= 2:
            raise ValueError(f"temperature={self.temperature}: give 0 (greedy) or a value from 0.01 to 2")

    def greedy(self) -> Sampling:
        """One response, of the likeliest tokens."""
        return replace(self, n=1, temperature=0.0)


@dataclass(frozen=True)
class Completion:
    """What was sampled in one go."""

    tokens: list[int]  # [T], the EOS or stop token included
    logps: list[float]  # [T], of the distribution that they were sampled from
    finish_reason: str  # "stop" or "length"
    # With rollout.router_replay, on the first rank of an engine: [prompt + T - 1, layers with experts, top-k], the
    # experts that every position was sent to (`megarl.rollout.router_replay`).
    routed_experts: torch.Tensor | None = field(default=None, compare=False)
    # [T], which push of weights sampled each token, where engines take weights while they generate; else empty.
    versions: Sequence[int] = ()


class AsyncEngine(Protocol):
    """What a conversation generates with. How to sample (temperature, top_p, ...) is the rollout's, not its own."""

    max_tokens: int  # how many tokens a whole response may have in this rollout, observations included

    async def generate(self, tokens: list[int], max_tokens: int, *, stop_token_ids: Sequence[int] = ()) -> Completion:
        """Sample what follows ``tokens``, until EOS, one of the rollout's stop tokens or of these, or ``max_tokens``.

        Engines that fail are an engine's own matter: what comes back is whole.
        """
        ...

    async def ready(self) -> None:
        """Returns as soon as there is an engine, weights and all, that a request would go to: no turn's time begins
        before."""
        ...


Conversation = Callable[[AsyncEngine, Prompt], Awaitable[Sample]]


class Transcript:
    """A response as it grows, of turns that the policy wrote and observations that it read."""

    def __init__(self, prompt: Prompt) -> None:
        self._prompt = prompt
        self._finish_reason = ""
        self._tokens = list(prompt.tokens)
        self._logps: list[float] = []
        self._written: list[bool] = []
        self._versions: list[int] = []
        self._routed_experts: torch.Tensor | None = None

    @property
    def tokens(self) -> list[int]:
        """Prompt and response so far: what the next turn follows."""
        return list(self._tokens)

    @property
    def response_length(self) -> int:
        return len(self._written)

    def wrote(self, completion: Completion) -> None:
        """A turn of the policy's."""
        self._append(completion.tokens, completion.logps, [True] * len(completion.tokens))
        self._versions += completion.versions
        self._routed_experts = completion.routed_experts  # of all that it read, turns before included
        self._finish_reason = completion.finish_reason

    def observed(self, tokens: Sequence[int]) -> None:
        """What the policy is told."""
        self._append(tokens, [0.0] * len(tokens), [False] * len(tokens))
        if self._versions:  # an observation is as old as the turn before it, so that no maximum or minimum sees it
            self._versions += [self._versions[-1]] * len(tokens)

    def _append(self, tokens: Sequence[int], logps: Sequence[float], written: list[bool]) -> None:
        self._tokens += tokens
        self._logps += logps
        self._written += written

    def sample(self, measures: dict[str, float] | None = None, finish_reason: str | None = None) -> Sample:
        """The whole of it. Raises ValueError where the policy wrote nothing.

        Args:
            measures: what an environment says of the episode; reward functions get them as columns.
            finish_reason: why it ended, where that is not why the last turn did.
        """
        if not any(self._written):
            raise ValueError(f"prompt {self._prompt.id}: a conversation ended without a token of the policy's")
        versions = None if not self._versions else torch.tensor(self._versions, dtype=torch.int32)
        if versions is not None and len(versions) != self.response_length:
            raise ValueError(f"prompt {self._prompt.id}: some turns know their versions, others do not")
        return Sample(
            self._prompt.id,
            0,
            self.tokens,
            len(self._prompt.tokens),
            rollout_logps=torch.tensor(self._logps),
            loss_mask=None if all(self._written) else torch.tensor(self._written),
            versions=versions,
            routed_experts=self._routed(),
            finish_reason=finish_reason or self._finish_reason,
            measures=measures or {},
        )

    def _routed(self) -> torch.Tensor | None:
        """[tokens - 1, layers, top-k]. What was observed after the last turn, no engine has read: nothing that the
        policy wrote follows, so that any experts will do."""
        if self._routed_experts is None:
            return None
        unread = len(self._tokens) - 1 - len(self._routed_experts)
        layers, topk = self._routed_experts.shape[1:]
        first = torch.arange(topk, dtype=self._routed_experts.dtype).expand(unread, layers, topk)
        return torch.cat([self._routed_experts, first])


async def converse(conversation: Conversation, engine: AsyncEngine, prompt: Prompt) -> Sample:
    """A conversation that raises nothing but Exceptions of its own: SystemExit would end the loop that all of them run
    in, and a CancelledError that nobody has asked for would look like the run's."""
    try:
        return await conversation(engine, prompt)
    except SystemExit as error:
        raise RuntimeError(f"SystemExit: {error}") from error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise RuntimeError("CancelledError, though nothing has cancelled it") from error


async def single_turn(engine: AsyncEngine, prompt: Prompt) -> Sample:
    """One response to the prompt: what a rollout is unless configured otherwise."""
    transcript = Transcript(prompt)
    transcript.wrote(await engine.generate(transcript.tokens, engine.max_tokens))
    return transcript.sample()
