"""What one layout computes: loss, log-probabilities, gradient norm and every parameter's gradient, under the names of
Hugging Face tensors. Run on every rank; `Measured` is whole on each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megarl.config import Config
from megarl.data.records import MicroBatch, Sample
from megarl.losses.policy import grpo
from megarl.losses.preference import preference_tokens
from megarl.losses.sft import sft
from megarl.model.engine import Engine, Loss
from megarl.model.family import read_spec
from megarl.parallel.collectives import gather_objects
from megarl.parallel.mesh import Mesh
from megarl.verify.shrink import VOCABULARY
from megarl.weights.stream import WeightStream


@dataclass
class Measured:
    """Of one update on the same samples."""

    loss: float
    grad_norm: float
    logps: list[Tensor]  # [response] of every sample
    gradients: dict[str, Tensor]


def samples_for(cfg: Config, count: int = 12, longest: int = 60) -> list[Sample]:
    """Random samples of many lengths with everything that a loss may ask for; in pairs, for preferences."""
    generator = torch.Generator().manual_seed(cfg.run.seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    def noise(length: int) -> Tensor:
        return 0.1 * torch.randn(length, generator=generator)

    out = []
    for i in range(count):
        prompt, response = number(1, longest // 3), number(1, 2 * longest // 3)
        tokens = torch.randint(0, VOCABULARY, (prompt + response,), generator=generator).tolist()
        sample = Sample(f"random:{i // 2}", i % 2, tokens, prompt, advantage=float(noise(1)) * 10)
        old = -4 + noise(response)
        sample.old_logps, sample.rollout_logps, sample.ref_logps = (
            old,
            old + noise(response) / 10,
            old + noise(response),
        )
        sample.desirable = i % 3 > 0
        out.append(sample)
    return out


def measure(cfg: Config, mesh: Mesh) -> Measured:
    """One update of the recipe's loss on this rank's share of `samples_for`. A collective."""
    engine = Engine(cfg, mesh, read_spec(cfg.model.path), temperature=cfg.rollout.temperature, total_updates=10)
    everything = samples_for(cfg)
    loss, mode, together = loss_of(cfg)
    units = [everything[at : at + together] for at in range(0, len(everything), together)]
    mine = [sample for unit in units[mesh.dp_rank :: mesh.dp_size] for sample in unit]
    logps = [x.cpu() for x in engine.logps(everything)]
    metrics = engine.step(mine, loss, loss_agg_mode=mode, together=together)
    stream = WeightStream(engine.model, engine.spec, mesh, 64 << 20, value=gradient_of)
    gradients = {name: tensor.float().cpu().clone() for name, tensor in stream}
    return Measured(metrics["loss"], metrics["grad_norm"], logps, gradients)


def gradient_of(parameter: Tensor) -> Tensor:
    """As megatron's buffers hold it, in fp32. The routers' expert biases are buffers of the model, and have none."""
    return parameter.main_grad if parameter.requires_grad else torch.zeros_like(parameter)


def loss_of(cfg: Config) -> tuple[Loss, str, int]:
    """(the recipe's loss, its aggregation, samples that belong together)."""
    if cfg.algorithm == "preference":
        return partial(preference_tokens, cfg=cfg.preference), "seq-mean-token-mean", 2
    if cfg.algorithm in ("sft", "unpaired"):
        return sft, cfg.loss.loss_agg_mode, 1
    return _policy_loss(cfg), cfg.loss.loss_agg_mode, 1


def _policy_loss(cfg: Config) -> Loss:
    def loss(logps: Tensor, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        return grpo(logps, batch, cfg.loss)

    return loss


@dataclass(frozen=True)
class Difference:
    """How far a layout is from one rank in one thing."""

    what: str
    difference: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        return self.difference <= self.tolerance  # NaN does not


def compare(truth: Measured, found: Measured, tolerance: float) -> list[Difference]:
    """Loss and gradient norm relative to one rank's, log-probabilities as they are, gradients relative to the largest
    element of their tensor; the tensors in the order of the model."""
    out = [
        Difference("loss", _relative(found.loss, truth.loss), tolerance),
        Difference(
            "log-probs",
            max(float((a - b).abs().max()) for a, b in zip(found.logps, truth.logps, strict=True)),
            tolerance,
        ),
        Difference("gradient norm", _relative(found.grad_norm, truth.grad_norm), tolerance),
    ]
    for name in sorted(truth.gradients.keys() - found.gradients.keys()):
        out.append(Difference(f"{name}: missing", float("inf"), tolerance))
    for name, gradient in truth.gradients.items():
        if name in found.gradients:
            largest = max(float(gradient.abs().max()), 1e-12)
            out.append(Difference(name, float((found.gradients[name] - gradient).abs().max()) / largest, tolerance))
    return out


def _relative(x: float, truth: float) -> float:
    return abs(x - truth) / max(abs(truth), 1e-12)


def worst_over_ranks(mine: list[Difference], mesh: Mesh) -> list[Difference]:
    """The largest difference of any rank in each thing."""
    everyone = gather_objects(mine, mesh.host_group)
    return [
        max(same, key=lambda d: (d.difference != d.difference, d.difference)) for same in zip(*everyone, strict=True)
    ]
