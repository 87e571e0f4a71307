"""Kills a run at each point where it writes a checkpoint, and lets it go on.

    kill_points.py <recipe> <folder> <sync|async>

One process imports everything and forks a run for each point: before a file is opened, in the middle of a write, before
an fsync, a rename, a removal, a new folder, of anything under the run's checkpoints. Prints a JSON list with, for each
point: what it was, the checkpoints that had their name then, which of them verify, and the step that the next process
of the run went on from.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

from megarl.algorithms import ALGORITHMS
from megarl.checkpoint import folder as disk
from megarl.checkpoint.resume import find
from megarl.config import load
from megarl.observe.run import Run
from megarl.parallel.mesh import build_mesh

NAMES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}


class Points:
    """Counts what changes the disk under a folder, and kills this process at one of them."""

    def __init__(self, root: Path, at: int, said: Path) -> None:
        self.root, self.at, self.said, self.seen = str(root), at, said, 0
        self.one = threading.RLock()  # what is said is itself a file
        sys.addaudithook(self.heard)
        self.fsync, self.write = os.fsync, disk.HashedFile.write
        os.fsync = self.synced  # type: ignore[assignment]
        points, calls = self, dict[str, int]()

        def write(file: disk.HashedFile, data: object) -> int:
            view = memoryview(data).cast("B")  # type: ignore[arg-type]
            number = calls[file.path.name] = calls.get(file.path.name, -1) + 1
            if number > 1:  # a file has hundreds of items: two writes are enough
                return points.write(file, view)
            if points.seen == points.at:
                points.write(file, view[: len(view) // 2])
            points.reached(f"write {file.path.name}")
            return points.write(file, view)

        disk.HashedFile.write = write  # type: ignore[method-assign]

    def heard(self, event: str, args: tuple) -> None:  # type: ignore[type-arg]
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in NAMES) and str(args[0]).startswith(self.root):
            self.reached(f"{event} {Path(str(args[0])).name}")

    def synced(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if str(path).startswith(self.root):
            self.reached(f"fsync {path.name}")
        self.fsync(descriptor)

    def reached(self, what: str) -> None:
        with self.one:  # files are written side by side
            if self.seen == self.at:
                self.said.write_text(what)
                os.kill(os.getpid(), signal.SIGKILL)
            self.seen += 1


def run(recipe: str, folder: Path, overrides: list[str], at: int = -1) -> int:
    """Train in a fork, which is killed at point ``at``. Returns the points that it passed; -1 if it was killed."""
    said = folder / "said"
    if (child := os.fork()) == 0:
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        cfg = load([recipe, f"run.root={folder}", *overrides])
        points = Points(folder / cfg.run.name / "checkpoints", at, said)
        mesh = build_mesh(cfg)
        own = Run(cfg, mesh.rank, mesh.world_size, mesh.describe(), None, None, find(cfg, mesh))
        ALGORITHMS[cfg.algorithm](cfg, own, mesh)
        own.finish()
        said.write_text(str(points.seen))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status == signal.SIGKILL:
        return -1
    assert status == 0, (folder / "log").read_text()
    return int(said.read_text())


def verifies(path: Path) -> bool:
    try:
        return disk.verify(path).step == disk.step_of(path)
    except disk.Broken:
        return False


def main(recipe: str, folder: Path, how: str) -> None:
    mode = [f"checkpoint.async_save={'true' if how == 'async' else 'false'}"]
    base = folder / "base"
    base.mkdir(parents=True)
    run(recipe, base, ["run.max_num_steps=1", *mode])
    whole = folder / "whole"
    shutil.copytree(base, whole)
    points = run(recipe, whole, ["run.max_num_steps=2", *mode])
    outcomes = []
    for at in range(points):
        root = folder / str(at)
        shutil.copytree(base, root)
        assert run(recipe, root, ["run.max_num_steps=2", *mode], at) == -1, at
        checkpoints = next(path for path in root.glob("*/checkpoints"))
        named = disk.finished(checkpoints)
        outcome = {"at": (root / "said").read_text(), "named": [disk.step_of(path) for path in named]}
        outcome["whole"] = [disk.step_of(path) for path in named if verifies(path)]
        (root / "log").unlink()
        run(recipe, root, ["run.max_num_steps=3", *mode])
        log = (root / "log").read_text()
        outcome["resumed"] = int(log.partition("resumed from step ")[2].partition(":")[0])
        outcome["left"] = [path.name for path in disk.leftovers(checkpoints)]
        lines = (checkpoints.parent / "metrics.jsonl").read_text().splitlines()
        outcome["losses"] = [json.loads(line)["actor/loss"] for line in lines if "actor/loss" in line]
        outcomes.append(outcome)
        shutil.rmtree(root)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
