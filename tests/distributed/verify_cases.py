"""Cases that `RankPool` runs: what `megarl verify` measures on a layout, with a bug planted first."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from megarl.config import load
from megarl.data import packing
from megarl.model import engine as engine_module
from megarl.model.engine import Engine
from megarl.parallel.mesh import build_mesh
from megarl.verify import command
from megarl.verify.measure import Difference


def truth(recipe: str, folder: str) -> None:
    """As the command's one rank does it."""
    cfg = load([recipe])
    command.truth(cfg, build_mesh(cfg), Path(folder), vllm=False)


def differences(recipe: str, folder: str, bug: str = "none") -> list[Difference]:
    """As the command's ranks do it, with a bug planted first."""
    cfg = load([recipe])
    mesh = build_mesh(cfg)
    with BUGS[bug]():
        return command.differences(cfg, mesh, Path(folder), 1e-5)


def rank_with(bug: str, *args: object) -> None:
    """A rank of the command, for which a bug is planted."""
    with BUGS[bug]():
        command._rank(*args)


def rank_that_is_killed(rank: int, *args: object) -> None:
    """In the place of a rank: the last one is killed as the kernel would, the others wait for it."""
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


@contextlib.contextmanager
def loss_scaled_by_cp() -> Iterator[None]:
    """Every context-parallel rank counts the pack that they share: megatron adds the counts up, and divides by them."""
    right = Engine._loss_step

    def wrong(self: Engine, *args: object) -> object:
        out, reduce = right(self, *args)

        def all_count(*values: torch.Tensor) -> object:
            with mock.patch.object(Engine, "_counts", lambda self, batch: True):
                return reduce(*values)

        return out, all_count

    with mock.patch.object(Engine, "_loss_step", wrong):
        yield


@contextlib.contextmanager
def label_shifted_by_one() -> Iterator[None]:
    """Every token is given the label of the one before."""
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


@contextlib.contextmanager
def tokens_see_the_pack() -> Iterator[None]:
    """Sequences of a pack are one to attention."""
    right = engine_module.packed_layout

    def wrong(cu_seqlens: list[int], *args: object, **kwargs: object) -> object:
        return right([0, cu_seqlens[-1]], *args, **kwargs)

    with mock.patch.object(engine_module, "packed_layout", wrong):
        yield


@contextlib.contextmanager
def mean_of_microbatches() -> Iterator[None]:
    """Each microbatch's loss is divided by its own count before they are added."""
    right = Engine._loss_step

    def wrong(self: Engine, *args: object) -> object:
        out, reduce = right(self, *args)

        def divided(*values: torch.Tensor) -> object:
            total, once, sums = reduce(*values)
            return total / max(int(sums["count"]), 1), once.clamp(max=1), sums

        return out, divided

    with mock.patch.object(Engine, "_loss_step", wrong):
        yield


BUGS = {
    "none": contextlib.nullcontext,
    "loss scaled by CP": loss_scaled_by_cp,
    "label shifted by one": label_shifted_by_one,
    "norms not reduced over SP": norms_not_reduced,
    "router gradient counted twice": router_counted_twice,
    "attention over the whole pack": tokens_see_the_pack,
    "mean of microbatches' means": mean_of_microbatches,
}
