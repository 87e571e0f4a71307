"""A deadline on every phase, and a name for whoever breaks it.

Each rank's watchdog thread writes a heartbeat (host, phase) to a store of the job's once a second. A rank that stays
in one phase longer than the deadline prints every thread's stack, says which ranks are silent or behind, and ends its
process; the launcher then ends the rest. The collectives have the same deadline. A rank whose peer died hears of it by
an exception or by the launcher's SIGTERM, and says the same sentence about it before it goes.

SIGUSR1, and SIGTERM while all ranks run, ask for an end after the step: `stop_requested` says so, and the loop saves.
A second one ends the process at once.

On a hang or a peer's failure every rank leaves its stacks and phase in a folder of the run, ``rank_00003.txt``, and on
CUDA what NCCL's flight recorder holds of the last collectives, ``nccl_00003.bin`` (for ``torchfrtrace``).
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

EXIT_DEADLINE = 124  # as timeout(1)
EXIT_TERMINATED = 128 + signal.SIGTERM  # as a shell reports it
_BEAT_S = 1.0
_ALIVE = "all of them run"
_STOPS = (signal.SIGTERM, signal.SIGUSR1)
_STALE_S = 3.0  # a rank without a heartbeat for so long no longer runs


class Watchdog:
    """Heartbeats of this rank and the deadline of its phases. `megarl.observe.timers.Phases` enters and leaves."""

    def __init__(self, deadline_s: float, folder: Path | None = None) -> None:
        """``folder``: where the stacks of a hang go besides stderr; made when there are some."""
        self.folder = folder
        self.stop_requested: str | None = None
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.deadline_s = deadline_s
        self._store = self._own_store()
        self._phases: list[tuple[str, float]] = [("start", time.monotonic())]
        self._closed = False
        self._beats = 0
        self._last_words = threading.Lock()
        self._signals = _signals_as_bytes()
        self._beat()
        dist.barrier()  # every rank has a heartbeat before anyone may look for it
        self._thread = threading.Thread(target=self._watch, name="megarl-watchdog", daemon=True)
        self._thread.start()

    def _own_store(self) -> dist.Store:
        """A store on rank 0 beside the job's own, whose connection may be busy in a collective's set-up."""
        timeout = timedelta(seconds=30)
        address: list[Any] = [None]
        if self.rank == 0:
            host = os.environ.get("MASTER_ADDR", "127.0.0.1")
            server = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
            address = [(host, server.port)]
        dist.broadcast_object_list(address, 0)
        if self.rank == 0:
            return server
        host, port = address[0]
        return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)

    def enter(self, name: str) -> None:
        self._phases.append((name, time.monotonic()))
        self._beat()  # at once: should this rank die here, its last heartbeat names the phase

    def leave(self) -> None:
        # The phase around it goes on: its own clock starts again, since it did get somewhere.
        self._phases.pop()
        name, _ = self._phases[-1]
        self._phases[-1] = (name, time.monotonic())

    @property
    def phase(self) -> str:
        return self._phases[-1][0]

    def close(self) -> None:
        self._closed = True
        self._thread.join()
        signal.set_wakeup_fd(-1)
        for number in _STOPS:
            signal.signal(number, signal.SIG_DFL)

    def suspects(self) -> str:
        """One sentence on the ranks that stopped, or are in another phase than this one. Takes `_STALE_S` seconds:
        only what
        moves meanwhile is alive, whatever the clocks of other hosts say."""
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        try:
            before = {rank: self._heartbeat(rank) for rank in others}
            time.sleep(_STALE_S)
            beats = {rank: self._heartbeat(rank) for rank in others}
        except (RuntimeError, OSError) as reason:
            return f"rank 0, which keeps the heartbeats, does not answer ({type(reason).__name__})"
        silent, elsewhere = [], []
        for rank, beat in beats.items():
            where = f"rank {rank} on {beat['host']} (phase {beat['phase']!r}"
            if beat["count"] == before[rank]["count"]:
                silent.append(f"{where})")
            elif beat["phase"] != self.phase:
                elsewhere.append(f"{where}, {beat['seconds']:.0f} s in it)")
        if silent:
            return "no longer running: " + ", ".join(silent)
        if elsewhere:
            return f"{_ALIVE}, in another phase: " + ", ".join(elsewhere)
        return f"{_ALIVE}, in the same phase"

    def _heartbeat(self, rank: int) -> dict[str, Any]:
        return json.loads(self._store.get(f"beat/{rank}"))

    def report(self, what: str, *, peers: bool) -> None:
        """Say on stderr who this is, where, and what happened; with ``peers`` also what became of the other ranks.

        Only the first of several reports of one process is made: they are about the same end.
        """
        if not self._last_words.acquire(blocking=False):
            time.sleep(4 * _STALE_S)  # let the other finish; it ends the process
            return
        print(f"{self._me()}: {what}", file=sys.stderr, flush=True)
        if peers and self.world_size > 1:
            print(f"{self._me()}: other ranks: {self.suspects()}", file=sys.stderr, flush=True)

    def report_error(self, error: BaseException) -> None:
        collective = _is_collective(error)
        if collective:
            self._leave_stacks(f"{type(error).__name__}: {error}")
        self.report(f"{type(error).__name__}: {error}", peers=collective)

    def _me(self) -> str:
        return f"rank {self.rank} on {_host()} in phase {self.phase!r}"

    def _beat(self) -> None:
        name, since = self._phases[-1]
        seconds = time.monotonic() - since
        self._beats += 1
        beat = {"host": _host(), "phase": name, "seconds": seconds, "count": self._beats}
        with contextlib.suppress(RuntimeError, OSError):  # the store goes with rank 0, which the deadline then notices
            self._store.set(f"beat/{self.rank}", json.dumps(beat))

    def _watch(self) -> None:
        while not self._closed:
            readable, _, _ = select.select([self._signals], [], [], _BEAT_S)
            for number in self._signals.recv(16) if readable else b"":
                self._signalled(signal.Signals(number))
            self._beat()
            if time.monotonic() - self._phases[-1][1] > self.deadline_s:
                self._end()

    def _signalled(self, number: signal.Signals) -> None:
        """Ask for an end after the step; end now where that was asked before, or peers have died."""
        if number not in _STOPS:
            return
        if self.stop_requested is not None:
            print(f"{self._me()}: told to stop a second time ({number.name})", file=sys.stderr, flush=True)
            os._exit(128 + number)
        if number == signal.SIGTERM and self._peers_are_gone():
            self.report("told to stop (SIGTERM)", peers=True)
            self._leave_stacks("told to stop (SIGTERM)")
            os._exit(EXIT_TERMINATED)
        self.stop_requested = number.name

    def _peers_are_gone(self) -> bool:
        """Whether it is the launcher that ends what a failed rank has left. Takes `_STALE_S` seconds."""
        return self.world_size > 1 and not self.suspects().startswith(_ALIVE)

    def _leave_stacks(self, why: str) -> None:
        """This rank's stacks, phase and last collectives in the run's folder. What cannot be written is not worth
        another error: the process ends anyway."""
        if self.folder is None:
            return
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"rank_{self.rank:05d}.txt").open("w") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self._me()}: {why}\n\n")
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)
            if dist.is_nccl_available() and dist.get_backend() == "nccl":
                trace = importlib.import_module("torch._C._distributed_c10d")._dump_nccl_trace()
                (self.folder / f"nccl_{self.rank:05d}.bin").write_bytes(trace)

    def _end(self) -> None:
        why = f"over the deadline of {self.deadline_s:.0f} s (run.deadline_s)"
        self._leave_stacks(why)
        self.report(why, peers=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        sys.stderr.flush()
        # The main thread may be inside a collective that never returns: nothing softer would end it.
        os._exit(EXIT_DEADLINE)


def _host() -> str:
    """This machine, by the name that Slurm would leave it out by, or its own."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _signals_as_bytes() -> socket.socket:
    """A socket that gets a byte for every signal, at once and from whichever thread.

    The main thread, inside a collective, could not run a handler.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    signal.set_wakeup_fd(theirs.detach(), warn_on_full_buffer=False)
    for number in _STOPS:
        signal.signal(number, lambda number, frame: None)  # the watchdog's thread acts on it
    return ours


def _is_collective(error: BaseException) -> bool:
    """Whether an error looks like a peer's: torch has no type of its own for gloo's and NCCL's failures."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "nccl", "connection", "timed out"))


def signal_at_parents_death(number: int) -> None:
    """Let the kernel send this process a signal when the one that started it dies. Linux only."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, number)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Let the kernel end this process when the launcher that started it dies: no orphans, not even after kill -9.
    Linux only."""
    signal_at_parents_death(number)
    if sys.platform != "linux":
        return
    launcher = os.environ.get("MEGARL_LAUNCHER")  # its process id, where `megarl train` became torchrun
    if launcher and int(launcher) != os.getppid():
        print("the launcher died while this rank was starting", file=sys.stderr)
        os._exit(EXIT_DEADLINE)
