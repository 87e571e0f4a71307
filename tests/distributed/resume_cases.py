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


def poisoned(
    recipe: str, overrides: list[str], at: list[int], on_rank: int
) -> tuple[list[int], str | None, list[float]]:
    """Train with weights that one rank makes NaN just for these steps' updates. Returns (steps that ran, the error that
    ended it, the policy's first weights at the end)."""
    from megarl.algorithms import sft
    from megarl.model.engine import Engine, NonFiniteError

    cfg = load([recipe, *overrides])
    mesh = build_mesh(cfg)
    run = Run(cfg, mesh.rank, mesh.world_size, mesh.describe(), None, None, find(cfg, mesh))
    ran: list[int] = []
    engines: list[Engine] = []

    class Poisoned(Engine):
        """The real engine, with a loss that is not a number where this test says so."""

        def step(self, samples, loss, **kwargs):  # type: ignore[no-untyped-def]
            engines[:] = [self]
            ran.append(len(ran) + 1)
            bad = len(ran) in at and mesh.rank == on_rank
            return super().step(samples, _not_a_number if bad else loss, **kwargs)

    original, sft.Engine, error = sft.Engine, Poisoned, None
    try:
        sft.train(cfg, run, mesh)
    except NonFiniteError as reason:
        error = str(reason)
    finally:
        sft.Engine = original
    run.finish()
    return ran, error, next(engines[0].model.parameters()).detach().flatten()[:8].tolist()


def _not_a_number(logps, batch):  # type: ignore[no-untyped-def]
    return logps * float("nan"), {}
