"""Cases that `RankPool` runs: the model and engine on some layout, returning what tests compare."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from megarl.config import load
from megarl.data.records import MicroBatch, Sample
from megarl.losses.policy import grpo
from megarl.model.engine import Engine, NonFiniteError
from megarl.model.family import read_spec
from megarl.parallel.collectives import exchange_samples
from megarl.parallel.mesh import Mesh, build_mesh
from megarl.verify.measure import gradient_of
from megarl.weights.stream import WeightStream


def engine_of(
    recipe: str, model: str, overrides: list[str], temperature: float = 1.0, mesh: Mesh | None = None
) -> Engine:
    cfg = load([recipe, f"model.path={model}", *overrides])
    return Engine(cfg, mesh or build_mesh(cfg), read_spec(model), temperature=temperature, total_updates=10)


def logits(recipe: str, model: str, overrides: list[str], tokens: list[int]) -> np.ndarray:
    return engine_of(recipe, model, overrides).logits(Sample("a", 0, tokens, 1)).numpy()


def streamed(
    recipe: str, model: str, overrides: list[str], bucket_bytes: int, save_to: str, max_file_bytes: int = 1 << 30
) -> dict[str, np.ndarray]:
    """The whole model as HF tensors, from small buckets; also written to ``save_to``."""
    engine = engine_of(recipe, model, overrides)
    stream = engine.stream(bucket_bytes)
    engine.save_hf(save_to, bucket_bytes, max_file_bytes)
    return {name: tensor.numpy() for name, tensor in stream}


class Rounded(torch.nn.Parameter):
    """Like Transformer Engine's FP8 parameters: a slice is a copy, and what it was rounded from may be kept."""

    exact: torch.Tensor | None

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.data.clone()[index]

    def get_high_precision_init_val(self) -> torch.Tensor | None:
        return self.exact


def fills_rounded(recipe: str, model: str, overrides: list[str]) -> dict[str, list[bool]]:
    """For parameters that are put together of several tensors, whether they and what is kept are as without it."""
    from megarl.model.build import build_model
    from megarl.weights import load as loading

    cfg = load([recipe, f"model.path={model}", *overrides])
    mesh, spec = build_mesh(cfg), read_spec(model)
    with mesh.platform():
        built = build_model(cfg, spec, mesh, temperature=1.0)
    loading.load_hf(built, spec, mesh, model)
    layer = built.decoder.layers[0]
    linears = {"qkv": layer.self_attention.linear_qkv, "gate and up": layer.mlp.linear_fc1}
    plain = {name: linear.weight for name, linear in linears.items()}
    for name, linear in linears.items():
        linear.weight = Rounded(torch.full_like(plain[name], torch.nan))
        linear.weight.exact = torch.full_like(plain[name], torch.nan) if name == "qkv" else None
        vars(linear.weight).update(vars(plain[name]))
    is_float8tensor, loading.is_float8tensor = loading.is_float8tensor, lambda parameter: isinstance(parameter, Rounded)
    try:
        loading.load_hf(built, spec, mesh, model)
    finally:
        loading.is_float8tensor = is_float8tensor
    return {
        name: [torch.equal(x, plain[name]) for x in (linear.weight.data, linear.weight.exact) if x is not None]
        for name, linear in linears.items()
    }


def stray(recipe: str, model: str, overrides: list[str]) -> str:
    """What loading says of a model with a parameter and a buffer that no rule fills."""
    from megarl.model.build import build_model
    from megarl.weights.hf_files import CheckpointError
    from megarl.weights.load import load_hf

    cfg = load([recipe, f"model.path={model}", *overrides])
    mesh, spec = build_mesh(cfg), read_spec(model)
    with mesh.platform():
        built = build_model(cfg, spec, mesh, temperature=1.0)
    built.decoder.layers[1].mlp.register_parameter("gate", torch.nn.Parameter(torch.zeros(3, 2)))
    built.decoder.register_buffer("scale", torch.zeros(5))
    built.decoder.register_buffer("cache", torch.zeros(7), persistent=False)
    try:
        load_hf(built, spec, mesh, model)
    except CheckpointError as error:
        return str(error)
    return "loaded"


def bytes_read(recipe: str, model: str, overrides: list[str]) -> tuple[int, int]:
    """(bytes that loading read, bytes of this rank's parameters without vocabulary padding)."""
    from megarl.model.build import build_model
    from megarl.weights.load import load_hf

    cfg = load([recipe, f"model.path={model}", *overrides])
    mesh = build_mesh(cfg)
    with mesh.platform():
        spec = read_spec(model)
        built = build_model(cfg, spec, mesh, temperature=1.0)
        read = load_hf(built, spec, mesh, model)
    padding = sum(p.numel() for p in built.parameters() if p.shape[0] > 0 and bool((p == 0).all()))
    return read, 4 * (sum(p.numel() for p in built.parameters()) - padding)


def logps(
    recipe: str, model: str, overrides: list[str], samples: list[dict[str, Any]], temperature: float
) -> list[np.ndarray]:
    """Log-probabilities of this replica's share of the samples: every dp-th one."""
    engine = engine_of(recipe, model, overrides, temperature)
    mine = [Sample(**s) for s in samples]
    return [x.cpu().numpy() for x in engine.logps(mine)]


def sequence_loss(values: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A loss with a token part, a part that needs the whole sequence, and an entropy part: a wrong join cannot pass."""
    lengths = batch.per_sequence(torch.ones_like(values))
    mean = batch.per_sequence(values) / lengths.clamp(min=1)
    loss = -batch.advantages * values + mean.exp()[batch.sequence] + 0.1 * batch.entropy
    return loss, {"value": values}


def one_step(
    recipe: str, model: str, overrides: list[str], samples: list[dict[str, Any]], mode: str
) -> tuple[dict[str, float], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """One update. Returns (metrics, every gradient, every weight after it) in HF names."""
    engine = engine_of(recipe, model, overrides)
    mesh = engine.mesh
    mine = []
    for i, fields in enumerate(samples):
        if i % mesh.dp_size == mesh.dp_rank:
            sample = Sample(**fields)
            sample.advantage = 1.0 if i % 3 else -0.5
            mine.append(sample)
    metrics = engine.step(mine, sequence_loss, loss_agg_mode=mode)
    grads = {}
    if not engine.cfg.optimizer.use_distributed_optimizer:  # else each rank has only its shard of them
        gradients = WeightStream(engine.model, engine.spec, mesh, 1 << 20, value=gradient_of)
        grads = {name: tensor.cpu().numpy() for name, tensor in gradients}
    return metrics, grads, {name: tensor.float().cpu().numpy() for name, tensor in engine.stream(1 << 20)}


def reference_swap(recipe: str, model: str, overrides: list[str], samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Two updates with the reference held in between, and the same two without."""
    outcomes = []
    mesh = build_mesh(load([recipe, f"model.path={model}", *overrides]))
    for with_reference in (True, False):
        engine = engine_of(recipe, model, overrides, mesh=mesh)
        reference = engine.weights()
        batch = [Sample(**fields) for fields in samples]
        for sample in batch:
            sample.advantage = 1.0
        first = engine.logps(batch)
        engine.step(batch, sequence_loss)
        kept = None
        if with_reference:
            with engine.holding(reference):
                kept = engine.logps(batch)
        moved = engine.logps(batch)
        engine.step(batch, sequence_loss)
        outcomes.append({name: tensor.clone() for name, tensor in engine.stream(1 << 20)})
        if kept is not None:
            same = all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
            differ = not any(torch.equal(a, b) for a, b in zip(first, moved, strict=True))
    equal = all(torch.equal(outcomes[0][name], outcomes[1][name]) for name in outcomes[0])
    return {"reference_is_the_start": same, "policy_moved": differ, "training_undisturbed": equal}


def one_replica_has_nothing(
    recipe: str, model: str, overrides: list[str], samples: list[dict[str, Any]]
) -> dict[str, Any]:
    """A GRPO update with every term of the loss, all of whose samples are on replica 0."""
    return _on_one_replica(engine_of(recipe, model, overrides), samples)


def one_replica_underflows(
    recipe: str, model: str, overrides: list[str], samples: list[dict[str, Any]]
) -> tuple[dict[str, Any], float, bool]:
    """As `one_replica_has_nothing`. Returns (metrics, the least log-probability before the update, whether all weights
    of this rank are finite after it)."""
    engine = engine_of(recipe, model, overrides)
    lowest = min(float(logps.min()) for logps in engine.logps([Sample(**fields) for fields in samples]))
    metrics = _on_one_replica(engine, samples)
    return metrics, lowest, all(bool(torch.isfinite(p).all()) for p in engine.model.parameters())


def _on_one_replica(engine: Engine, samples: list[dict[str, Any]]) -> dict[str, Any]:
    mine = [Sample(**fields) for fields in samples] if engine.mesh.dp_rank == 0 else []
    for sample in mine:
        sample.advantage = 1.0
        sample.rollout_logps = sample.ref_logps = torch.full((sample.response_length,), -3.0)
    return engine.step(mine, partial(grpo, cfg=engine.cfg.loss))


def poisoned_step(recipe: str, model: str, overrides: list[str], samples: list[dict[str, Any]]) -> dict[str, Any]:
    """One NaN advantage on one replica: what every rank says, and whether its weights stayed."""
    engine = engine_of(recipe, model, overrides)
    batch = [Sample(**fields) for fields in samples]
    for sample in batch:
        sample.advantage = float("nan") if engine.mesh.dp_rank == 1 else 1.0
    before = {name: tensor.clone() for name, tensor in engine.stream(1 << 20)}
    said = ""
    try:
        engine.step(batch, sequence_loss)
    except NonFiniteError as error:
        said = str(error)
    return {"said": said, "kept": all(torch.equal(tensor, before[name]) for name, tensor in engine.stream(1 << 20))}


def learning_rates(recipe: str, model: str, overrides: list[str], samples: list[dict[str, Any]]) -> list[float]:
    engine = engine_of(recipe, model, overrides)
    return [engine.step([Sample(**fields) for fields in samples], sequence_loss)["lr"] for _ in range(10)]


def exchanged(recipe: str, model: str, overrides: list[str]) -> list[tuple[str, int, list[int], list[float]]]:
    """Every rank sends rank r the samples whose row is r modulo the world's size; one rank has none to send."""
    mesh = build_mesh(load([recipe, f"model.path={model}", *overrides]))
    outgoing: list[list[Sample]] = [[] for _ in range(mesh.world_size)]
    for row in range(0 if mesh.rank == 1 else 5):
        tokens = [100 * mesh.rank + row] * (row + 2)
        sample = Sample(f"from {mesh.rank}", row, tokens, 1, rollout_logps=torch.full((row + 1,), -float(row)), row=row)
        outgoing[row % mesh.world_size].append(sample)
    arrived = [sample for sent in exchange_samples(outgoing, mesh.host_group) for sample in sent]
    return [(s.prompt_id, s.row, s.tokens, s.rollout_logps.tolist()) for s in arrived]
