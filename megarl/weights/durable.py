"""Files and folders that survive a crash of the machine: on the disk when a call returns, or not under their name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

INCOMPLETE = ".incomplete"


def unfinished(target: Path) -> Path:
    """Where a folder or file is made before it gets its name."""
    return target.with_name(target.name + INCOMPLETE)


def write_durably(path: Path, data: str | bytes) -> None:
    """Write a small file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(folder: Path, target: Path) -> None:
    """Give ``folder``, whose files are on the disk, the name ``target``, in place of a folder that has it.

    That one is ``<target>.replaced`` for a moment; what a killed run left under this name is removed.
    """
    replaced = target.with_name(target.name + ".replaced")
    sync(folder)
    if target.exists():
        if replaced.exists():
            shutil.rmtree(replaced)
        os.rename(target, replaced)
    os.rename(folder, target)
    sync(target.parent)
    if replaced.exists():
        shutil.rmtree(replaced)
