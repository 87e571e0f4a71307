"""Groups of samples on their way: a thread whose asyncio loop has many of them in work, under one rule.

Groups are numbered in data order. Step s trains on exactly the groups [s B, (s + 1) B), and group i may *start* when
``i < (max_staleness + version + 1) B``, where ``version`` counts the updates whose weights the engines have. So every
token that step s trains on is of weights s - max_staleness or newer: by construction, with nothing dropped, no queue
and no controller, and in the order of the data. A straggler delays its own step alone. With ``max_staleness`` 0 this is
the synchronous algorithm.

Every replica of the policy has a stream of its own, and works on its share of the numbers: nothing passes between
them. An error of a group is raised by the `want` that asks for it, with the prompt's id.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from megarl.data.prompts import Prompt

T = TypeVar("T")
Draw = Callable[[int], list[Prompt]]


class StreamError(RuntimeError):
    """A group could not be made; the message names its prompt."""


class Loop:
    """A thread that runs coroutines."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function in the thread, and wait for it."""

        async def called() -> T:
            return function(*arguments)

        return self.run(called()).result()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Stream(Generic[T]):
    """The groups of one replica. Methods are for the trainer's thread."""

    def __init__(
        self,
        loop: Loop,
        work: Callable[[int, Prompt], Awaitable[T]],
        *,
        batch: int,
        max_staleness: int,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """
        Args:
            work: makes the group of this number and prompt, in the loop.
            batch: B, the groups of a step, of all replicas.
            share: (which of the replicas this is, how many there are).
        """
        self._loop, self._work = loop, work
        self._batch, self._max_staleness, self._share = batch, max_staleness, share
        self._tasks: dict[int, asyncio.Task[T]] = {}
        self._prompts: dict[int, Prompt] = {}
        self._draw: Draw | None = None
        self._next = self._limit = self._taken = 0  # the next to be drawn, the first that may not be, the next to give
        self._steps = 0  # to come

    def begin(self, draw: Draw, steps: int) -> None:
        """Forget whatever is in work, and start with group 0: the first that ``draw`` gives now. The engines have the
        weights that step 0 trains. ``steps`` are to come: no group is begun for one beyond them."""
        self._loop.run(self._begin(draw, steps)).result()

    def advance(self) -> None:
        """The engines have the weights of one more update."""
        self._loop.call(self._advance)

    def want(self, count: int) -> Future[dict[int, T]]:
        """The next ``count`` groups of all replicas, by their place among these: the part that was made here. Each
        group is given once."""
        first, self._taken = self._taken, self._taken + count
        return self._loop.run(self._collect(first, count))

    def stop(self) -> None:
        """End all work."""
        self._loop.run(self._discard()).result()

    # ---- in the loop -------------------------------------------------------------------------------------------------

    async def _begin(self, draw: Draw, steps: int) -> None:
        await self._discard()
        self._draw, self._next, self._limit, self._taken, self._steps = draw, 0, 0, 0, steps
        self._open()

    def _advance(self) -> None:
        self._steps -= 1
        self._open()

    async def _discard(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._tasks.clear()
        self._prompts.clear()

    def _open(self) -> None:
        """What was given is what the updates so far were made of, so that this is (max_staleness + version + 1) B; with
        dynamic sampling, where steps take more, it is more than that by as much. The last steps need none after
        themselves."""
        self._start(self._taken + min(self._max_staleness + 1, self._steps) * self._batch)

    def _start(self, limit: int) -> None:
        assert self._draw is not None, "begin() comes first"
        self._limit = max(self._limit, limit)
        mine, of = self._share
        while self._next < self._limit:
            (prompt,) = self._draw(1)
            if self._next % of == mine:
                self._prompts[self._next] = prompt
                self._tasks[self._next] = asyncio.ensure_future(self._work(self._next, prompt))
            self._next += 1

    async def _collect(self, first: int, count: int) -> dict[int, T]:
        self._start(first + count)  # a step that dynamic sampling prolongs; its weights are the newest
        wanted = {i: self._tasks[i] for i in range(first, first + count) if i in self._tasks}
        if wanted:
            await asyncio.wait(wanted.values(), return_when=asyncio.FIRST_EXCEPTION)
        for i, task in wanted.items():
            if task.done() and (error := task.exception()) is not None:
                raise StreamError(f"prompt {self._prompts[i].id}: {type(error).__name__}: {error}") from error
        for i in wanted:
            del self._tasks[i], self._prompts[i]
        return {i - first: task.result() for i, task in wanted.items()}
