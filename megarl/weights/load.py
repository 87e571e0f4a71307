"""Weights from a checkpoint into a live megatron-core model, by the family's rules, without any collective: every rank
reads the bytes of its own shares and no others.

A checkpoint is anything that gives blocks of canonical tensors: see `Source`. `HFSource` is a Hugging Face directory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from megatron.core.fp8_utils import is_float8tensor

from megarl.model.family import SCORE, ModelSpec
from megarl.parallel.mesh import Mesh
from megarl.weights.hf_files import CheckpointError, HFCheckpoint
from megarl.weights.names import canonical_parameters
from megarl.weights.plan import share_of
from megarl.weights.rules import CanonTensor
from megarl.weights.shard import columns_of, row_segments, rows_of
from megarl.weights.stream import first_expert, tensor_parallel

_SHOWN_PROBLEMS = 20


class Source(Protocol):
    """A checkpoint, as a model loads it."""

    def problems(self, spec: ModelSpec) -> list[str]:
        """What is missing, extra or misshapen for this model, one line each. Nothing was read yet."""

    def blocks(
        self, tensor: CanonTensor, start: int, stop: int, columns: slice | None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Some columns of rows ``start`` to ``stop`` of a canonical tensor: pairs of a block's first row and
        the block. Rows past the tensor's end are vocabulary padding and in no block."""


class HFSource:
    """A directory of safetensors."""

    def __init__(self, checkpoint: HFCheckpoint) -> None:
        self.checkpoint = checkpoint

    def __str__(self) -> str:
        return str(self.checkpoint.path)

    def problems(self, spec: ModelSpec) -> list[str]:
        wanted: dict[str, tuple[int, ...]] = {}
        for tensor in spec.tensors():
            wanted |= tensor.hf_shapes()
        copies = spec.duplicates()
        present = {name for name in self.checkpoint.names() if not spec.passes_over(name)}
        if spec.tied and "lm_head.weight" in present:  # some exporters write the tied copy too
            copies |= {"lm_head.weight": "model.embed_tokens.weight"}
        missing = sorted(name for name in wanted.keys() - present if not spec.may_start_at_zero(name))
        out = [f"missing: {name}" for name in missing]
        out += [f"not part of {spec.family.name}: {name}" for name in sorted(present - wanted.keys() - copies.keys())]
        for name in sorted(wanted.keys() & present):
            shape = self.checkpoint.shape(name)
            if shape != wanted[name]:
                out.append(f"{name}: shape {shape}, the config says {wanted[name]}")
        for name in sorted(copies.keys() & present):
            if not self._equal(name, copies[name]):
                out.append(f"{name} is not the copy of {copies[name]} that it is in {spec.family.name}")
        return out

    def _equal(self, name: str, other: str) -> bool:
        if other not in self.checkpoint.names():
            return True  # which is reported as missing
        a, b = self.checkpoint.whole(name), self.checkpoint.whole(other)
        return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))

    def blocks(
        self, tensor: CanonTensor, start: int, stop: int, columns: slice | None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        for part in row_segments(tensor, start, stop, columns, start):
            if part.hf == SCORE and SCORE not in self.checkpoint.names():  # the only one that need not be there
                yield part.local_rows.start, torch.zeros(1, 1)
            else:
                yield part.local_rows.start, self.checkpoint.read(part)


def load_hf(model: torch.nn.Module, spec: ModelSpec, mesh: Mesh, path: str | Path) -> int:
    """Fill this rank's ``model`` (a GPTModel) from a Hugging Face directory; see `load`."""
    checkpoint = HFCheckpoint(path)
    try:
        return load(model, spec, mesh, HFSource(checkpoint))
    finally:
        checkpoint.close()


@torch.no_grad()
def load(model: torch.nn.Module, spec: ModelSpec, mesh: Mesh, source: Source) -> int:
    """Fill every parameter of this rank's ``model``, and its persistent buffers, once. Returns the bytes read.

    Raises CheckpointError for a tensor that is missing, extra or misshapen, and for a parameter or buffer that no rule
    fills: nothing stays at random initialisation.
    """
    check(spec, source)
    canon = {tensor.name: tensor for tensor in spec.tensors()}
    parameters = list(canonical_parameters(model, spec, first_expert(spec, mesh)))
    _check_filled(model, spec, canon, parameters)
    return sum(_fill(canon[name], parameter, mesh, source) for name, parameter in parameters)


def check(spec: ModelSpec, source: Source) -> None:
    """Raise CheckpointError with everything that does not fit."""
    problems = source.problems(spec)
    if problems:
        more = [f"... and {len(problems) - _SHOWN_PROBLEMS} more"] if len(problems) > _SHOWN_PROBLEMS else []
        raise CheckpointError(
            "\n  ".join([f"{source} does not fit its config.json:", *problems[:_SHOWN_PROBLEMS], *more])
        )


def _check_filled(
    model: torch.nn.Module, spec: ModelSpec, canon: dict[str, CanonTensor], found: list[tuple[str, torch.Tensor]]
) -> None:
    """Every parameter and persistent buffer has a rule."""
    problems = [f"no rule fills {name} {tuple(tensor.shape)}" for name, tensor in found if name not in canon]
    reached = {id(tensor) for _, tensor in found}
    persistent = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if name in persistent and id(buffer) not in reached:
            problems.append(f"no rule fills buffer {name} {tuple(buffer.shape)}")
    if problems:
        raise CheckpointError("\n  ".join([f"the model is not one of family {spec.family.name}:", *problems]))


def _fill(tensor: CanonTensor, parameter: torch.Tensor, mesh: Mesh, source: Source) -> int:
    try:
        cut, cuts = share_of(tensor, tuple(parameter.shape), *tensor_parallel(tensor, mesh))
    except ValueError as reason:
        raise CheckpointError(str(reason)) from reason
    columns = columns_of(tensor, cuts, cut)
    # A slice of an FP8 parameter is a copy of it, or shares one scale with all others: it is filled as a whole.
    exact = _before_rounding(parameter) if is_float8tensor(parameter) else None
    whole = parameter if exact is None else exact
    local = read = filled = 0
    for start, stop in rows_of(tensor, cuts, cut):
        for first, block in source.blocks(tensor, start, stop, columns):
            at = local + first - start
            whole[at : at + len(block)].copy_(block)
            filled += len(block)
            read += block.numel() * block.element_size()
        local += stop - start
    wanted = sum(min(stop, tensor.shape[0]) - min(start, tensor.shape[0]) for start, stop in rows_of(tensor, cuts, cut))
    if filled != wanted:
        raise CheckpointError(f"{source}: {filled} of {wanted} rows of {tensor.name} are there for rank {mesh.rank}")
    whole[filled:].zero_()  # vocabulary padding, always last
    if exact is not None:
        parameter.copy_(exact)
    return read


def _before_rounding(parameter: torch.Tensor) -> torch.Tensor:
    """What a parameter that Transformer Engine keeps in FP8 is rounded from: where it still has that, the optimizer
    will make its fp32 weights of it."""
    kept = getattr(parameter, "get_high_precision_init_val", lambda: None)()
    return torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device) if kept is None else kept
