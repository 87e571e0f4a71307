"""Runs Python programs that nobody has read: a policy's answers, and what it asks a tool to compute.

Contract: `run(program, stdin, limits)` returns an `Outcome`, whatever the program does. It raises `SandboxError` where
the sandbox itself cannot be had, and then nothing of the program has run. `megarl.sandbox.inside` builds the walls:

- namespaces of its own: no network (not even loopback), no other processes to see or to signal, no shared memory;
- a file system of its own: Python and the system's libraries, read-only, and one empty folder of bounded size that is
  gone afterwards; no /proc, no home, no data, no trainer's files;
- an empty environment, no capabilities, no set-uid programs, and the user "nobody" where the trainer is root;
- limits on CPU seconds, memory, processes, files and output, and a wall clock. The program's processes end together.

Namespaces need a Linux that lets users have them (kernel 5.12 or newer). Where it does not, `isolation="rlimits"` goes
without: the program then sees the network and every file that "nobody" (or the trainer's user) can read. That is for
machines that hold nothing worth protecting, and has to be asked for.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

CANNOT_START = "cannot start the program"  # as inside.py reports it
INSIDE = str(Path(__file__).parent / "inside.py")
START_S = 10.0  # for two Pythons to start on a busy machine, before the program's own clock runs
LEFT_OVER_S = 0.3  # for output in the pipes of a program that has ended; what it started may hold them open


class SandboxError(RuntimeError):
    """There is no sandbox to be had; nothing has run."""


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    wall_s: float = 5.0
    cpu_s: int = 5  # of each of its processes
    memory_mb: int = 1024  # address space of each of its processes
    processes: int = 16
    disk_mb: int = 32  # all of its files
    output_bytes: int = 65536  # of standard output, and of standard error
    isolation: Literal["namespaces", "rlimits"] = "namespaces"

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "isolation" and not value > 0:
                raise SandboxError(f"{name} = {value}: a limit is above 0")
        if self.isolation not in ("namespaces", "rlimits"):
            raise SandboxError(f"isolation = {self.isolation!r} is neither namespaces nor rlimits")


@dataclass(frozen=True)
class Outcome:
    """What became of a program."""

    stdout: str
    stderr: str
    exit_code: int | None  # of the program; minus the signal that ended it; None where it was ended from outside
    ended: Literal["by itself", "wall clock", "output"]

    @property
    def ok(self) -> bool:
        return self.exit_code == 0


def run(program: str, stdin: str = "", limits: Limits | None = None) -> Outcome:
    """Run a Python program. Raises SandboxError."""
    limits = limits or Limits()
    with contextlib.ExitStack() as held:
        # In a file, not in a pipe: a program that reads nothing cannot make this process wait.
        job = held.enter_context(tempfile.TemporaryFile())
        folder = held.enter_context(tempfile.TemporaryDirectory()) if limits.isolation == "rlimits" else None
        job.write(json.dumps({"program": program, "stdin": stdin, "folder": folder, **asdict(limits)}).encode())
        job.seek(0)
        status, told = os.pipe()
        held.callback(os.close, status)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", INSIDE, str(told), str(os.getpid())],
            stdin=job,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            cwd="/",
            pass_fds=[told],
            start_new_session=True,
        )
        os.close(told)
        try:
            return _watch(process, status, limits)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
            process.stderr.close()


def _watch(process: subprocess.Popen, status: int, limits: Limits) -> Outcome:
    """Collect what the program writes, until it ends or has to be ended."""
    read: dict[int, bytearray] = {status: bytearray()}
    out, err = process.stdout.fileno(), process.stderr.fileno()
    read |= {out: bytearray(), err: bytearray()}
    deadline = time.monotonic() + START_S
    started = finished = False
    ended: Literal["by itself", "wall clock", "output"] = "by itself"
    with selectors.DefaultSelector() as ready:
        for descriptor in read:
            ready.register(descriptor, selectors.EVENT_READ)
        while ready.get_map():
            for key, _ in ready.select(max(0.0, deadline - time.monotonic())):
                part = os.read(key.fd, 65536)
                read[key.fd] += part
                if not part:
                    ready.unregister(key.fd)
            if not started and read[status].startswith(b"started\n"):
                started, deadline = True, time.monotonic() + limits.wall_s
            if not finished and b"ended " in read[status]:
                finished, deadline = True, time.monotonic() + LEFT_OVER_S
            if max(len(read[out]), len(read[err])) > limits.output_bytes:
                ended = "output"
                break
            if time.monotonic() >= deadline:
                ended = "by itself" if finished else "wall clock"
                break
    said = read[status].decode(errors="replace")
    if not said.startswith("started\n") or CANNOT_START in said:
        detail = said.strip() or read[err].decode(errors="replace").strip()[-500:] or "it did not start in time"
        raise SandboxError(f"no sandbox on this machine: {detail}")
    code = said.partition("ended ")[2].strip()
    text = [bytes(read[fd][: limits.output_bytes]).decode(errors="replace") for fd in (out, err)]
    return Outcome(text[0], text[1], int(code) if code and ended == "by itself" else None, ended)
