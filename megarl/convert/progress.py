"""How far a conversion is: a bar with GB/s and the time left on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 15.0


def readable(nbytes: float) -> str:
    """Decimal units, as disks and networks are sold: 3.4 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


class ProgressBar:
    """Counts bytes of ``total``; used as a context. Writes to stderr, so that stdout holds results only."""

    def __init__(self, title: str, total: int, stream: TextIO | None = None) -> None:
        self.title, self.total, self.done = title, total, 0
        self.stream = stream or sys.stderr
        self.start = self.last_line = time.monotonic()
        self.bar: Progress | None = None
        self.task = TaskID(0)

    def __enter__(self) -> ProgressBar:
        self.start = self.last_line = time.monotonic()
        if self.stream.isatty():
            columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}")
            self.bar = Progress(*columns, TimeRemainingColumn(), console=Console(file=self.stream))
            self.task = self.bar.add_task(self.title, total=self.total, rate="")
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()
        if kind is None:
            self._line(f"{self.title}: {readable(self.done)} in {self.seconds:.1f} s, {self._rate()}")

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def to(self, done: int) -> None:
        """``done`` bytes are done in all."""
        self.done = done
        if self.bar:
            self.bar.update(self.task, completed=done, rate=f"{readable(done)} {self._rate()}")
        elif time.monotonic() - self.last_line > _SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            left = (self.total - done) * self.seconds / max(done, 1)
            of = f"{readable(done)} of {readable(self.total)}"
            self._line(f"{self.title}: {of}, {self._rate()}, {left:.0f} s left")

    def say(self, text: str) -> None:
        """A line that stays, above the bar."""
        if self.bar:
            self.bar.console.print(text, markup=False)
        else:
            self._line(text)

    def _rate(self) -> str:
        return f"{self.done / max(self.seconds, 1e-3) / 1e9:.2f} GB/s"

    def _line(self, text: str) -> None:
        print(text, file=self.stream, flush=True)
