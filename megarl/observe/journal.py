"""What a run writes line by line, files and its output: a full disk must not end it by them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any


class Journal:
    """Appends whole lines to a file, each on its way to the disk when `append` returns.

    Where the disk takes nothing (it is full, or cannot be written to), the lines wait in memory, and the next `append`
    tries again: the file has every line once, in order, as soon as there is room. Standard error says so once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = b""
        self._said = False

    def append(self, lines: Iterable[str]) -> None:
        """Add lines, given without their ends."""
        self._waiting += "".join(line + "\n" for line in lines).encode()
        try:
            self._write()
            self._said = False
        except OSError as reason:
            if not self._said:
                print(f"{self.path}: {reason}; what was to be written there waits in memory", file=sys.stderr)
            self._said = True

    def close(self) -> None:
        """Try a last time. Raises OSError where lines are left that the disk does not take."""
        self._write()

    def _write(self) -> None:
        if not self._waiting:
            return
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            while self._waiting:  # a write may take a part, also of a line: the rest follows right behind it
                self._waiting = self._waiting[os.write(file, self._waiting) :]
        finally:
            os.close(file)


class Output:
    """Standard output or error of a rank, often a file on the disk that the run fills. What it does not take is lost,
    which it says as soon as it takes something again."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._lost = 0

    def write(self, text: str) -> int:
        try:
            if self._lost:
                self._stream.write(f"\n[{self._lost} characters could not be written here]\n")
                self._stream.flush()
                self._lost = 0
            self._stream.write(text)
        except OSError:
            self._lost += len(text)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:  # the stream keeps what it has, for the next time
            pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
