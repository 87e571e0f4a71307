"""Cases that `RankPool` runs: whole training runs, in the pool's processes, so that vLLM is imported once."""

from __future__ import annotations

from typing import Any

import torch

from megarl.algorithms import ALGORITHMS
from megarl.algorithms.onpolicy import another_model
from megarl.config import load
from megarl.data.records import Sample
from megarl.observe.run import Run
from megarl.parallel.mesh import build_mesh
from megarl.rewards import RewardError
from megarl.rollout import sampler


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


def calls_of_engines(recipe: str, overrides: list[str]) -> tuple[int, list[tuple[int, float]]]:
    """Run the recipe. Returns how many vLLM engines this process started, and (samples a prompt, temperature) of every
    call that one had."""
    started, calls = [], []

    class Noted(sampler.VLLMEngine):
        """The real engine, which says what it was asked for."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            started.append(self)
            super().__init__(*args, **kwargs)

        def generate(self, prompts, sampling, seed):  # type: ignore[no-untyped-def]
            calls.append((sampling.n, sampling.temperature))
            return super().generate(prompts, sampling, seed)

    original, sampler.VLLMEngine = sampler.VLLMEngine, Noted
    try:
        train(recipe, overrides)
    finally:
        sampler.VLLMEngine = original
    return len(started), calls


def asked_only(recipe: str, overrides: list[str], tokens: list[int]) -> tuple[dict[str, int], bool]:
    """Bytes that a model without an optimizer has on the device; and whether it says the same of ``tokens``, behind a
    prompt of two, as one with an optimizer."""
    cfg = load([recipe, *overrides])
    mesh = build_mesh(cfg)
    samples = [Sample("p", 0, tokens, 2)]
    teacher = another_model(cfg, mesh, cfg.model.path)
    trained = another_model(cfg, mesh, cfg.model.path, cfg.optimizer, updates=1)
    same = torch.equal(teacher.logps(samples)[0], trained.logps(samples)[0])
    return teacher.residency.bytes_on_device(), same
