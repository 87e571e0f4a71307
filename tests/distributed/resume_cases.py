"""Cases that `RankPool` runs: a run from its recipe, as `megarl.train` runs it, up to a step or to its end."""

from __future__ import annotations

from pathlib import Path

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


class StopsWhen:
    """A watchdog that hears a signal once a file is there."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    @property
    def stop_requested(self) -> str | None:
        return "SIGTERM" if self._path.exists() else None

    def enter(self, name: str) -> None:
        pass

    def leave(self) -> None:
        pass


def train_until(recipe: str, overrides: list[str], path: str) -> str | None:
    """Run the recipe until a file is there. Returns why it stopped."""
    cfg = load([recipe, *overrides])
    mesh = build_mesh(cfg)
    run = Run(cfg, mesh.rank, mesh.world_size, mesh.describe(), None, StopsWhen(path), find(cfg, mesh))
    ALGORITHMS[cfg.algorithm](cfg, run, mesh)
    run.finish()
    return run.stopped


def train(
    recipe: str,
    overrides: list[str],
    stop_after: int | None = None,
    only_on: int | None = None,
    phase: str = "train",
) -> str | None:
    """Run the recipe; in a phase of step ``stop_after`` it is told to stop, on all ranks or on one. Returns why it
    stopped."""
    cfg = load([recipe, *overrides])
    mesh = build_mesh(cfg)
    told = only_on is None or mesh.rank == only_on
    watchdog = StopsAfter(stop_after if told else None, phase)
    run = Run(cfg, mesh.rank, mesh.world_size, mesh.describe(), None, watchdog, find(cfg, mesh))
    ALGORITHMS[cfg.algorithm](cfg, run, mesh)
    run.finish()
    return run.stopped


def poisoned(
    recipe: str, overrides: list[str], at: list[int], on_rank: int, factor: float = float("nan"), how: str = "all"
) -> tuple[list[int], str | None, list[float]]:
    """Train with a loss that one rank multiplies by ``factor`` in these steps: of all samples, of the "first" of each
    microbatch, or "once", the first time that it is computed. Returns (steps that ran, the error that
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
            return super().step(samples, _Multiplied(factor, how) if bad else loss, **kwargs)

    original, sft.Engine, error = sft.Engine, Poisoned, None
    try:
        sft.train(cfg, run, mesh)
    except NonFiniteError as reason:
        error = str(reason)
    finally:
        sft.Engine = original
    run.finish()
    return ran, error, next(engines[0].model.parameters()).detach().flatten()[:8].tolist()


class _Multiplied:
    """A loss that goes wrong."""

    def __init__(self, factor: float, how: str) -> None:
        self.factor, self.how, self.calls = factor, how, 0

    def __call__(self, logps, batch):  # type: ignore[no-untyped-def]
        self.calls += 1
        first = batch.cu_seqlens[1] if self.how == "first" else len(logps)
        factors = logps.new_ones(len(logps))
        if self.how != "once" or self.calls == 1:
            factors[:first] = self.factor
        return -logps * factors, {"entropy": batch.entropy}  # as sft: ranks add up the same metrics
