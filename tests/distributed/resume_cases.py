"""Cases that `RankPool` runs: a run from its recipe, as `megarl.train` runs it, up to a step or to its end."""

from __future__ import annotations

from megarl.algorithms import ALGORITHMS
from megarl.checkpoint.resume import find
from megarl.config import load
from megarl.observe.run import Run
from megarl.parallel.mesh import build_mesh


class StopsAfter:
    """A watchdog that hears a signal at the end of a step's ``phase``: what a preempted job's hears."""

    def __init__(self, step: int | None, phase: str = "train") -> None:
        self.stop_requested: str | None = None
        self._left, self._phase = step, phase

    def enter(self, name: str) -> None:
        if name == self._phase and self._left is not None:
            self._left -= 1
            if self._left == 0:
                self.stop_requested = "SIGTERM"

    def leave(self) -> None:
        pass


def train(recipe: str, overrides: list[str], stop_after: int | None = None, only_on: int | None = None) -> str | None:
    """Run the recipe; ``stop_after`` steps it is told to stop, on all ranks or on one. Returns why it stopped."""
    cfg = load([recipe, *overrides])
    mesh = build_mesh(cfg)
    told = only_on is None or mesh.rank == only_on
    watchdog = StopsAfter(stop_after if told else None)
    run = Run(cfg, mesh.rank, mesh.world_size, mesh.describe(), None, watchdog, find(cfg, mesh))
    ALGORITHMS[cfg.algorithm](cfg, run, mesh)
    run.finish()
    return run.stopped
