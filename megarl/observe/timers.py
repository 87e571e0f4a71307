"""Seconds per phase of a step.

`with phases("generate"): ...` adds the seconds of the block to that phase; `pop()` hands out what has gathered since
the last `pop()` as `timing_s/<phase>` metrics. Phases may be nested; the outer one includes the inner one:

- a phase directly in `step`, or in no other, goes by its own name: `timing_s/generate`;
- one deeper down is named after those around it, so that a step's rollout and a validation's stay apart:
  `timing_s/validate/generate`;
- `timing_s/total` is the seconds of the outermost phases: all the time that was recorded, each second once.

A watchdog, where one is given, hears which phase the rank is in (its own name only), so that a hang can be named.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

PREFIX = "timing_s/"
STEP = "step"
TOTAL = "total"


class PhaseWatchdog(Protocol):
    """What Phases tells: enter on the way in, leave on the way out (also when the block raises)."""

    def enter(self, name: str) -> object: ...

    def leave(self) -> object: ...


class Phases:
    """Wall-clock seconds by phase name, summed until popped."""

    def __init__(self, watchdog: PhaseWatchdog | None = None) -> None:
        self._watchdog = watchdog
        self._open: list[str] = []
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self._watchdog is not None:
            self._watchdog.enter(name)
        around = self._open[1:] if self._open[:1] == [STEP] else self._open
        path = "/".join([*around, name])
        self._open.append(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self._open.pop()
            self._add(path, seconds)
            if not self._open:
                self._add(TOTAL, seconds)
            if self._watchdog is not None:
                self._watchdog.leave()

    def pop(self) -> dict[str, float]:
        """`{"timing_s/generate": 1.23, ...}` since the last pop; empty if no phase has ended."""
        seconds, self._seconds = self._seconds, {}
        return {PREFIX + name: value for name, value in seconds.items()}

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
