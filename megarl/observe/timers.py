"""Seconds per phase of a step.

`with phases("generate"): ...` adds the seconds of the block to that phase; `pop()` hands out what has gathered since
the last `pop()` as `timing_s/<phase>` metrics. Phases may be nested: the outer one includes the inner one.
A watchdog, where one is given, hears which phase the rank is in, so that a hang can be named.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class PhaseWatchdog(Protocol):
    """What Phases tells: enter on the way in, leave on the way out (also when the block raises)."""

    def enter(self, name: str) -> object: ...

    def leave(self) -> object: ...


class Phases:
    """Wall-clock seconds by phase name, summed until popped."""

    def __init__(self, watchdog: PhaseWatchdog | None = None) -> None:
        self._watchdog = watchdog
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self._watchdog is not None:
            self._watchdog.enter(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
            if self._watchdog is not None:
                self._watchdog.leave()

    def pop(self) -> dict[str, float]:
        """`{"timing_s/generate": 1.23, ...}` since the last pop."""
        seconds, self._seconds = self._seconds, {}
        return {f"timing_s/{name}": value for name, value in seconds.items()}
