"""Cases that `RankPool` runs: an engine with a scalar head on some layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from megarl.config import load
from megarl.data.records import MicroBatch, Sample
from megarl.model.engine import Engine
from megarl.model.family import read_spec
from megarl.parallel.mesh import build_mesh
from megarl.verify.measure import gradient_of
from megarl.weights.stream import WeightStream


def squares(values: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Half the squared distance from 1."""
    return (values - 1).square() / 2, {"value": values}


def one_step(
    recipe: str, model: str, overrides: list[str], samples: list[dict[str, Any]], save_to: str | None = None
) -> dict[str, Any]:
    cfg = load([recipe, f"model.path={model}", *overrides])
    mesh = build_mesh(cfg)
    spec = read_spec(model).with_scalar_head()
    engine = Engine(cfg, mesh, spec, temperature=1.0, total_updates=10)
    everything = [Sample(**fields) for fields in samples]
    mine = everything[mesh.dp_rank :: mesh.dp_size]
    values = [x.numpy() for x in engine.values(everything)]
    if save_to:
        engine.save_hf(save_to, 1 << 20)
    metrics = engine.step(mine, squares, loss_agg_mode="seq-mean-token-mean")
    gradients = WeightStream(engine.model, engine.spec, mesh, 1 << 20, value=gradient_of)
    grads: dict[str, np.ndarray] = {name: tensor.numpy() for name, tensor in gradients}
    return {"values": values, "metrics": metrics, "grads": grads}
