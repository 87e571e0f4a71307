"""One run at a time has a folder. The kernel holds the lock, so that a dead run's is free at once, however it died."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path

LOCK_FILE = "run.lock"


class FolderInUse(RuntimeError):
    """Another run writes this folder. The message says which."""


class RunLock:
    """Held from here to `close`, or to the end of the process. Over a network it needs a file system with flock, which
    NFS 4, Lustre (mounted with flock) and GPFS are."""

    def __init__(self, folder: Path) -> None:
        path = folder / LOCK_FILE
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._file, 1000, 0).decode(errors="replace") or "a run that is just starting"
            os.close(self._file)
            raise FolderInUse(
                f"{folder} is being written by {holder}: wait for it, stop it, or give this run another run.name"
            ) from None
        job = os.environ.get("SLURM_JOB_ID")
        holder_is = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(holder_is | ({"slurm_job": job} if job else {})).encode(), 0)

    def close(self) -> None:
        """Let others have the folder."""
        os.close(self._file)
