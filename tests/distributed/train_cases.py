"""Cases that `RankPool` runs: whole training runs, in the pool's processes, so that vLLM is imported once."""

from __future__ import annotations

from megarl.algorithms import ALGORITHMS
from megarl.config import load
from megarl.observe.run import Run
from megarl.parallel.mesh import build_mesh
from megarl.rewards import RewardError


def train(recipe: str, overrides: list[str]) -> str:
    """Run the recipe. Returns "done", or the message of a RewardError."""
    cfg = load([recipe, *overrides])
    mesh = build_mesh(cfg)
    run = Run(cfg, mesh.rank, mesh.world_size, mesh.describe())
    try:
        ALGORITHMS[cfg.algorithm](cfg, run, mesh)
    except RewardError as error:
        return str(error)
    run.finish()
    return "done"
