"""Cases that `RankPool` runs: models with experts and latent attention, returning what tests compare."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch

from megarl.config import load
from megarl.data.records import Sample
from megarl.model.family import read_spec
from megarl.parallel.mesh import build_mesh
from megarl.weights.names import canonical_parameters, canonical_suffix
from megarl.weights.stream import first_expert
from tests.distributed.model_cases import engine_of, sequence_loss


def parameters(recipe: str, model: str, overrides: list[str]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Canonical name, shape and dtype of every parameter and persistent buffer of this rank."""
    engine = engine_of(recipe, model, overrides)
    module = engine.model
    found = list(canonical_parameters(module, engine.spec, first_expert(engine.spec, engine.mesh)))
    reached = {id(tensor) for _, tensor in found}
    stored = {name: x for name, x in module.state_dict(keep_vars=True).items() if isinstance(x, torch.Tensor)}
    assert all(id(tensor) in reached for tensor in stored.values())
    return {name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in found}


def multi_token_prediction(recipe: str, model: str, overrides: list[str]) -> dict[str, tuple[int, ...]]:
    """Canonical name and shape of every parameter and buffer of the block that megatron makes of the layers for
    multi-token prediction, which models here leave out."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock

    from megarl.model.build import layer_spec, transformer_config

    cfg = load([recipe, f"model.path={model}", *overrides])
    mesh, spec = build_mesh(cfg), read_spec(model)
    with mesh.platform():
        config = transformer_config(cfg, spec, mesh)
        config.mtp_num_layers = spec.mtp_num_layers
        layers = get_gpt_mtp_block_spec(config, layer_spec(cfg, config, spec, mesh, None), use_transformer_engine=False)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        block = MultiTokenPredictionBlock(config, layers, pg_collection=groups)
    out = {}
    for name, tensor in block.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            continue
        # megatron-core has called the layer inside by two names.
        match = re.fullmatch(r"layers\.(\d+)\.(?:transformer_layer|mtp_model_layer)\.(.+)", name)
        if match:
            first = first_expert(spec, mesh)
            suffix = canonical_suffix(match[2], mla=spec.mla is not None, moe=True, first_expert=first)
            name = f"layers.{match[1]}.mtp_model_layer.{suffix}"
        out[f"mtp.{name}"] = tuple(tensor.shape)
    return out


def one_step(
    recipe: str, model: str, overrides: list[str], samples: list[dict[str, Any]]
) -> tuple[dict[str, float], dict[str, np.ndarray], dict[str, np.ndarray], dict[str, int]]:
    """One update of this replica's share of the samples. Returns the metrics, this rank's gradients (of the plain
    optimizer) and weights afterwards by canonical names, and its place in the layout."""
    engine = engine_of(recipe, model, overrides)
    mesh = engine.mesh
    mine = []
    for i, fields in enumerate(samples):
        if i % mesh.dp_size == mesh.dp_rank:
            mine.append(Sample(**fields))
            mine[-1].advantage = 1.0 if i % 3 else -0.5
    metrics = engine.step(mine, sequence_loss)
    held = list(canonical_parameters(engine.model, engine.spec, first_expert(engine.spec, mesh)))
    gradients = {}
    if not engine.cfg.optimizer.use_distributed_optimizer:  # else each rank has only its shard of them
        gradients = {name: x.main_grad.numpy().copy() for name, x in held if isinstance(x, torch.nn.Parameter)}
    weights = {name: x.detach().numpy().copy() for name, x in held}
    place = {"tp": mesh.tp_size, "tp_rank": mesh.tp_rank, "etp": mesh.etp_size, "etp_rank": mesh.etp_rank}
    return metrics, gradients, weights, place


def replicas(recipe: str, model: str, overrides: list[str]) -> dict[str, Any]:
    """What the mesh says of expert parallelism."""
    mesh = build_mesh(load([recipe, f"model.path={model}", *overrides]))
    return {"ep": (mesh.ep_size, mesh.ep_rank), "etp": (mesh.etp_size, mesh.etp_rank), "replica": mesh.replica_ranks}
