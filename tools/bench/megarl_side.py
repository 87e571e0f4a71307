"""megarl's side of both benchmarks: its own GRPO loop, which stands still after every step.

As a script it is a worker of grpo_vs_trl.py: ``megarl_side.py <folder>``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gate import Gate
from workload import PROMPTS, SAMPLES

from megarl.algorithms import grpo
from megarl.config import load
from megarl.observe.run import Run
from megarl.parallel.mesh import build_mesh
from megarl.parallel.watchdog import Watchdog

# (number of the step, its seconds, its metrics with the seconds of its phases)
Between = Callable[[int, float, dict[str, float]], None]


class PausingRun(Run):
    """A run that calls ``between`` after each step, when all of it is done and reported."""

    between: Between
    started: float

    def report(self, step: int, total_steps: int, metrics: Mapping[str, float], *args: Any, **kwargs: Any) -> None:
        values = {**metrics, **self.phases.pop()}
        super().report(step, total_steps, values, *args, **kwargs)
        self.between(step, time.perf_counter() - self.started, values)
        self.started = time.perf_counter()


def train(folder: Path, between: Between) -> None:
    """GRPO on what `workload.make` wrote, in this process: what `megarl.train` does, but for the pauses."""
    cfg = load([str(folder / "grpo.yaml")])
    mesh = build_mesh(cfg)
    watchdog = Watchdog(cfg.run.deadline_s)
    run = PausingRun(cfg, mesh.rank, mesh.world_size, mesh.describe(), watchdog=watchdog)
    run.between, run.started = between, time.perf_counter()
    grpo.train(cfg, run, mesh)
    run.finish()
    mesh.close()
    watchdog.close()


def response_tokens(metrics: dict[str, float]) -> int:
    """How many the step has sampled, by its metrics."""
    return round(metrics["response_length/mean"] * PROMPTS * SAMPLES)


def main(folder: Path) -> None:
    gate = Gate()
    train(folder, lambda step, seconds, metrics: gate.pause(response_tokens(metrics)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
