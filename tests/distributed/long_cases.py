"""Cases that `RankPool` runs: one training step on one long sequence, and the memory that it takes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from megarl.config import load
from megarl.data.records import Sample
from megarl.losses.sft import sft
from megarl.model.engine import Engine
from megarl.model.family import read_spec
from megarl.observe.activations import kept_by_decoder
from megarl.parallel.mesh import build_mesh
from megarl.verify.measure import gradient_of
from megarl.weights.stream import WeightStream


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))


def one_step(recipe: str, model: str, overrides: list[str], length: int) -> dict[str, Any]:
    """Loss, gradients, by how many bytes the process's peak rose in the step, and how many the layers kept."""
    cfg = load([recipe, f"model.path={model}", *overrides])
    mesh = build_mesh(cfg)
    engine = Engine(cfg, mesh, read_spec(model), temperature=1.0, total_updates=1)
    tokens = torch.randint(0, 64, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    sample = Sample("long", 0, tokens, length // 2)
    mine = [sample] if mesh.dp_rank == 0 else []
    engine.step([Sample("short", 0, tokens[:64], 32)], sft)  # what is made once
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    kept = kept_by_decoder(engine.model)
    metrics = engine.step(mine, sft)
    extra = _status("VmHWM") - before
    gradients = WeightStream(engine.model, engine.spec, mesh, 1 << 20, value=gradient_of)
    return {
        "metrics": metrics,
        "gradients": {name: tensor.numpy().copy() for name, tensor in gradients},
        "extra": extra,
        "kept": sum(kept),
        "pid": os.getpid(),
    }
