"""Folders that are whole or absent: one writer at a time, and a finished folder put in place.

A checkpoint is written in ``<name>.incomplete`` beside its final place. `Staging` locks that folder, and renames it
when everything in it is on the disk; until then nothing under the final name changes.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from multiprocessing import reduction
from pathlib import Path
from typing import Any

from megarl.weights.durable import put_in_place, unfinished

PROGRESS = "megarl_progress.jsonl"  # what an interrupted run has finished; see `megarl.convert.work`

_LOCK_SECONDS = 10.0  # workers of a killed run, which may just be starting, are gone by then


class TargetError(ValueError):
    """The target cannot be written: it exists, another run writes it, or the disk is too full. Nothing was done."""


class FolderLock:
    """A folder held by one run. Its worker processes hold it too (it can be sent to them as they are spawned), so that
    none that outlives a killed run can write into what the next run makes."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @classmethod
    def take(cls, folder: Path) -> FolderLock:
        """Raises TargetError where another run has it and keeps it for seconds."""
        lock = cls(os.open(folder, os.O_RDONLY))
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            except BlockingIOError:
                if time.monotonic() > deadline:
                    lock.close()
                    raise TargetError(f"{folder}: another run, or a worker of a killed one, is writing it") from None
            time.sleep(0.05)

    def __reduce__(self) -> tuple[Any, ...]:
        return FolderLock._in_worker, (reduction.DupFd(self.descriptor),)

    @classmethod
    def _in_worker(cls, descriptor: Any) -> FolderLock:
        return cls(descriptor.detach())

    def close(self) -> None:
        os.close(self.descriptor)


class Staging:
    """The folder ``<target>.incomplete``, held by one run at a time.

    A target that is there is replaced only with ``overwrite``, and only where `megarl convert` wrote it (``ours`` says
    so): nobody's training run is deleted by a mistyped path. ``resume`` goes on with the folder of an interrupted run.
    """

    def __init__(self, target: Path, *, resume: bool, overwrite: bool, ours: bool) -> None:
        self.target = target
        self.folder = unfinished(target)
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            if not overwrite:
                raise TargetError(f"{target}: exists; --overwrite replaces it")
            if not ours:
                raise TargetError(
                    f"{target}: --overwrite replaces only what `megarl convert` wrote; this has no manifest"
                )
        # A run that was killed before its first record was whole leaves nothing to go on with.
        left = self.folder.exists() and any(not f.name.startswith(Path(PROGRESS).stem) for f in self.folder.iterdir())
        if left and not (self.folder / PROGRESS).exists():
            raise TargetError(f"{self.folder}: was not left by an interrupted run: move it away")
        if left and not (resume or overwrite):
            raise TargetError(f"{self.folder}: left by an interrupted run: --resume goes on, --overwrite starts again")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = FolderLock.take(self.folder)
        self.resumed = resume and left
        if not self.resumed:
            self._empty()

    def _empty(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def need(self, nbytes: int) -> None:
        """Raise TargetError unless the disk can take so many bytes more."""
        free = shutil.disk_usage(self.folder).free
        if nbytes > free:
            raise TargetError(f"{self.folder}: {nbytes:,} bytes are needed, {free:,} are free")

    def publish(self) -> None:
        """Put the folder in its place: the last thing that happens, and one rename."""
        put_in_place(self.folder, self.target)
        (self.target / PROGRESS).unlink()  # after the rename: a folder without it could not be resumed

    def close(self) -> None:
        """Let another run have the folder; what is in it stays."""
        self.lock.close()


def inside(path: Path, folder: Path) -> bool:
    """Whether ``path`` is ``folder`` or lies in it."""
    return folder.resolve() in (path.resolve(), *path.resolve().parents)
