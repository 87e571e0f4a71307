"""Cases that `RankPool` runs: what `megarl verify` measures on a layout, with a bug planted first."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from unittest import mock

import torch

from megarl.config import load
from megarl.data import packing
from megarl.model import engine as engine_module
from megarl.model.engine import Engine
from megarl.parallel.mesh import build_mesh
from megarl.verify.measure import Measured, measure


def measured(recipe: str, bug: str = "none") -> Measured:
    cfg = load([recipe])
    mesh = build_mesh(cfg)
    with BUGS[bug]():
        return measure(cfg, mesh)


@contextlib.contextmanager
def loss_scaled_by_cp() -> Iterator[None]:
    """Every context-parallel rank reports the step's count: megatron adds them up."""
    right = Engine._loss_step

    def wrong(self: Engine, *args: object) -> object:
        out, reduce = right(self, *args)

        def scaled(*values: torch.Tensor) -> object:
            total, _, sums = reduce(*values)
            return total, sums["count"], sums

        return out, scaled

    with mock.patch.object(Engine, "_loss_step", wrong):
        yield


@contextlib.contextmanager
def label_shifted_by_one() -> Iterator[None]:
    """The second pipeline stage, or the first of one, is given the token before as the label."""
    right = packing.pack

    def wrong(*args: object, **kwargs: object) -> object:
        batch = right(*args, **kwargs)
        return dataclasses.replace(batch, targets=batch.targets.roll(1))

    with mock.patch.object(engine_module, "pack", wrong):
        yield


@contextlib.contextmanager
def norms_not_reduced() -> Iterator[None]:
    """Norms forget that sequence parallelism divides their input."""
    right = Engine.__init__

    def wrong(self: Engine, *args: object, **kwargs: object) -> None:
        right(self, *args, **kwargs)
        for name, parameter in self.model.named_parameters():
            if "layernorm" in name:
                parameter.sequence_parallel = False

    with mock.patch.object(Engine, "__init__", wrong):
        yield


@contextlib.contextmanager
def router_counted_twice() -> Iterator[None]:
    """The routers' gradient is doubled on its way into the buffer."""
    right = Engine.__init__

    def wrong(self: Engine, *args: object, **kwargs: object) -> None:
        right(self, *args, **kwargs)
        for name, parameter in self.model.named_parameters():
            if name.endswith("router.weight"):
                parameter.register_hook(lambda gradient: 2 * gradient)

    with mock.patch.object(Engine, "__init__", wrong):
        yield


BUGS = {
    "none": contextlib.nullcontext,
    "loss scaled by CP": loss_scaled_by_cp,
    "label shifted by one": label_shifted_by_one,
    "norms not reduced over SP": norms_not_reduced,
    "router gradient counted twice": router_counted_twice,
}
