"""Cases that `RankPool` runs: what each memory lever leaves on the device, and keeps of activations."""

from __future__ import annotations

from typing import Any

import torch

from megarl.config import FP8Config
from megarl.data.records import Sample
from megarl.model.engine import Engine
from megarl.model.precision import FP8Rounding
from megarl.observe.activations import kept_by_decoder
from tests.distributed.model_cases import engine_of, sequence_loss


def samples_of(engine: Engine, samples: list[dict[str, Any]]) -> list[Sample]:
    """This replica's share."""
    mine = [Sample(**s) for i, s in enumerate(samples) if i % engine.mesh.dp_size == engine.mesh.dp_rank]
    for i, sample in enumerate(mine):
        sample.advantage = 1.0 if i % 3 else -0.5
    return mine


def three_steps(recipe: str, model: str, overrides: list[str], samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Three updates, with log-probs and the reference's in between, as a loop has them. The weights after them, and
    what the levers left on the device between the verbs and during an update."""
    engine = engine_of(recipe, model, overrides)
    batch = samples_of(engine, samples)
    reference = engine.weights()
    during: dict[str, int] = {}

    def loss(values, batch):  # type: ignore[no-untyped-def]
        during.update(engine.residency.bytes_on_device())
        return sequence_loss(values, batch)

    numbers = []
    for _ in range(3):
        with engine.holding(reference):
            numbers.append(torch.cat(engine.logps(batch)).numpy())
        numbers.append(torch.cat(engine.logps(batch)).numpy())
        engine.step(batch, loss)
    between = engine.residency.bytes_on_device()
    weights = {name: tensor.float().numpy().copy() for name, tensor in engine.stream(1 << 20)}
    return {"numbers": numbers, "weights": weights, "between": between, "during": during}


def activations(recipe: str, model: str, overrides: list[str], samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Bytes that the decoder's layers keep for backward, and the weights after an update."""
    engine = engine_of(recipe, model, overrides)
    batch = samples_of(engine, samples)
    saved = kept_by_decoder(engine.model)
    engine.step(batch, sequence_loss)
    weights = {name: tensor.numpy().copy() for name, tensor in engine.stream(1 << 20)}
    return {"saved": saved, "weights": weights}


def rounding(recipe: str, model: str, overrides: list[str], samples: list[dict[str, Any]]) -> dict[str, float]:
    """What FP8 would round of this update's inputs: FP8 itself needs CUDA, the account of it does not."""
    engine = engine_of(recipe, model, overrides)
    cfg = FP8Config(enabled=True, fp8_recipe="tensorwise", metrics=True)
    engine.rounding = FP8Rounding([chunk.module for chunk in engine.chunks], cfg, engine.spec.num_layers)
    metrics = engine.step(samples_of(engine, samples), sequence_loss)
    return {name: value for name, value in metrics.items() if name.startswith("fp8/")}
