"""What a layout computes in one update: loss, log-probabilities, gradient norm and every parameter's gradient, under
the names of Hugging Face tensors. Run on every rank; `Measured` is whole on each."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megarl.config import Config
from megarl.model.engine import Engine
from megarl.model.family import read_spec
from megarl.parallel.collectives import gather_objects
from megarl.parallel.mesh import Mesh
from megarl.verify.cases import Case, anchored
from megarl.verify.shrink import SCORED
from megarl.weights.stream import WeightStream


@dataclass
class Measured:
    """Of one update on the same samples."""

    loss: float
    grad_norm: float
    outputs: list[Tensor]  # [response] of every sample: log-probabilities, or values
    gradients: dict[str, Tensor]
    terms: float = 0.0  # of the truth: the loss with every token's taken without its sign

    def save(self, path: Path) -> None:
        scalars = {"loss": self.loss, "grad_norm": self.grad_norm, "terms": self.terms}
        tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in scalars.items()}
        tensors |= {f"outputs.{i}": x.contiguous() for i, x in enumerate(self.outputs)}
        save_file(tensors | {f"gradients.{name}": x.contiguous() for name, x in self.gradients.items()}, path)

    @staticmethod
    def load(path: Path) -> Measured:
        tensors = load_file(path)
        outputs = [tensors[f"outputs.{i}"] for i in range(sum(name.startswith("outputs.") for name in tensors))]
        gradients = {name[len("gradients.") :]: x for name, x in tensors.items() if name.startswith("gradients.")}
        loss, grad_norm, terms = (tensors[name].item() for name in ("loss", "grad_norm", "terms"))
        return Measured(loss, grad_norm, outputs, gradients, terms)


def model_path(cfg: Config, case: Case) -> str:
    """The small model, or the same with a scalar head that is not 0: that would hide all other gradients."""
    return str(Path(cfg.model.path).with_name(SCORED)) if case.scalar_head else cfg.model.path


def measure(cfg: Config, mesh: Mesh, case: Case, outputs: list[Tensor]) -> Measured:
    """One update of this rank's share of the case. A collective.

    Args:
        outputs: of the truth; samples are `anchored` at them, not at this layout's own.
    """
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, path=model_path(cfg, case)))
    spec = read_spec(cfg.model.path)
    spec = spec.with_scalar_head() if case.scalar_head else spec
    engine = Engine(cfg, mesh, spec, temperature=case.temperature, total_updates=10)
    samples = anchored(case, outputs, cfg.run.seed)
    units = [samples[at : at + case.together] for at in range(0, len(samples), case.together)]
    mine = [sample for unit in units[mesh.dp_rank :: mesh.dp_size] for sample in unit]
    found = engine.values(samples) if case.scalar_head else engine.logps(samples)
    found = [x.cpu() for x in found]
    metrics = engine.step(mine, case.loss, loss_agg_mode=case.loss_agg_mode, together=case.together)
    stream = WeightStream(engine.model, engine.spec, mesh, 64 << 20, value=gradient_of)
    gradients = {name: tensor.float().cpu().clone() for name, tensor in stream}
    return Measured(metrics["loss"], metrics["grad_norm"], found, gradients)


def gradient_of(parameter: Tensor) -> Tensor:
    """As megatron's buffers hold it, in fp32; 0 of what is not trained: a router's expert bias is a buffer."""
    return parameter.main_grad if parameter.requires_grad else torch.zeros_like(parameter)


@dataclass(frozen=True)
class Difference:
    """How far a layout is from the truth in one thing; None where they could not be compared, and why."""

    what: str
    difference: float | None
    tolerance: float
    note: str = ""
    tensor: bool = False  # a gradient

    @property
    def agrees(self) -> bool:
        return self.difference is None or self.difference <= self.tolerance  # NaN does not

    @property
    def size(self) -> tuple[bool, float]:
        """To be ordered by: NaN is the largest."""
        x = 0.0 if self.difference is None else self.difference
        return (x != x, x)


def compare(case: Case, truth: Measured, found: Measured, tolerance: float) -> list[Difference]:
    """The loss relative to the size of its terms, which may cancel; the gradient norm relative to the truth's;
    log-probabilities as they are; gradients relative to the largest element of their tensor, where the experts of a
    layer are one tensor; in the order of the model.

    By itself an expert that three tokens were sent to, whose terms cancel, would be held to less than fp32's rounding
    of these terms.
    """
    said = "values" if case.scalar_head else "log-probs"
    outputs = zip(found.outputs, truth.outputs, strict=True)
    out = [
        Difference(f"{case.name}: loss", _relative(found.loss, truth.loss, truth.terms), tolerance),
        Difference(f"{case.name}: {said}", max(float((a - b).abs().max()) for a, b in outputs), tolerance),
        Difference(
            f"{case.name}: gradient norm", _relative(found.grad_norm, truth.grad_norm, truth.grad_norm), tolerance
        ),
    ]
    largest: dict[str, float] = {}
    for name, gradient in truth.gradients.items():
        largest[_together(name)] = max(largest.get(_together(name), 1e-12), float(gradient.abs().max()))
    for name, gradient in found.gradients.items():
        if name in truth.gradients:
            difference, note = float((gradient - truth.gradients[name]).abs().max()) / largest[_together(name)], ""
        else:
            difference, note = float("inf"), "no such tensor"
        out.append(Difference(f"{case.name}: {name}", difference, tolerance, note, tensor=True))
    for name in sorted(truth.gradients.keys() - found.gradients.keys()):
        out.append(Difference(f"{case.name}: {name}", float("inf"), tolerance, "is missing", tensor=True))
    return out


def _together(name: str) -> str:
    """The experts of a layer under one name."""
    return re.sub(r"\bexperts\.\d+\.", "experts.", name)


def _relative(x: float, truth: float, size: float) -> float:
    return abs(x - truth) / max(size, 1e-12)


def worst_over_ranks(mine: list[Difference], mesh: Mesh) -> list[Difference]:
    """The largest difference of any rank in each thing."""
    everyone = gather_objects(mine, mesh.host_group)
    return [max(same, key=lambda difference: difference.size) for same in zip(*everyone, strict=True)]
