"""Rewards for samples that come one group at a time, from an asyncio loop.

The reward workers belong to a thread, which scores together whatever groups have come while it was busy. A sample that
could not be scored is scored once more before ``reward.on_error`` says what becomes of its group.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from megarl.config import RewardConfig
from megarl.data.prompts import Prompt
from megarl.data.records import Sample
from megarl.rewards import RewardError
from megarl.rewards.runner import RewardInput, RewardResult, RewardWorkers
from megarl.rollout.table import inputs_of


class Scorer:
    """Reward workers for use by one loop."""

    def __init__(self, config: RewardConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config, self._tokenizer = config, tokenizer
        # Workers end with the thread that started them.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="megarl-rewards")
        self._workers = self._thread.submit(RewardWorkers, replace(config, on_error="drop_group")).result()
        self._waiting: deque[tuple[Prompt, Sequence[Sample], Future[list[RewardResult]]]] = deque()

    async def score(self, prompt: Prompt, samples: Sequence[Sample]) -> list[RewardResult]:
        """One result a sample. Raises RewardError where one has none and ``reward.on_error`` is abort."""
        future: Future[list[RewardResult]] = Future()
        self._waiting.append((prompt, samples, future))
        self._thread.submit(self._score_waiting)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        self._thread.submit(self._workers.close).result()
        self._thread.shutdown()

    def _score_waiting(self) -> None:
        """In the thread. What goes wrong here is told to whoever waits."""
        waiting = [self._waiting.popleft() for _ in range(len(self._waiting))]
        waiting = [entry for entry in waiting if entry[2].set_running_or_notify_cancel()]
        try:
            groups = [inputs_of(prompt, samples, self._tokenizer) for prompt, samples, _ in waiting]
            results = self._twice([entry for group in groups for entry in group])
        except BaseException as error:
            for _, _, future in waiting:
                future.set_exception(error)
            return
        for (_, samples, future), at in zip(waiting, _starts(groups), strict=True):
            self._tell(future, results[at : at + len(samples)])

    def _twice(self, inputs: list[RewardInput]) -> list[RewardResult]:
        results = self._workers.score(inputs) if inputs else []
        failed = [i for i, result in enumerate(results) if result.error]
        again = self._workers.score([inputs[i] for i in failed]) if failed else []
        for i, result in zip(failed, again, strict=True):
            results[i] = result
        return results

    def _tell(self, future: Future[list[RewardResult]], results: list[RewardResult]) -> None:
        errors = [result.error for result in results if result.error]
        if errors and self._config.on_error == "abort":
            words = f"{len(errors)} of {len(results)} samples could not be scored, twice; the first: {errors[0]}"
            future.set_exception(RewardError(words))
        else:
            future.set_result(results)


def _starts(groups: Sequence[Sequence[RewardInput]]) -> list[int]:
    """Where each group begins among all of them, end to end."""
    starts = [0]
    for group in groups[:-1]:
        starts.append(starts[-1] + len(group))
    return starts[: len(groups)]
