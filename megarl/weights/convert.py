"""Live megatron-core models to and from Hugging Face weights, by the family's rules.

`load_hf` reads, on every rank, exactly the bytes of that rank's parameters, without any collective. `WeightStream`
gives the whole model back as HF tensors, layer by layer in bounded buckets, on every rank: vLLM's push and `save_hf`
consume it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megarl.model.family import ModelSpec
from megarl.parallel.mesh import Mesh
from megarl.weights.hf_files import CheckpointError, HFCheckpoint, HFWriter
from megarl.weights.names import canonical_parameters
from megarl.weights.rules import CanonTensor
from megarl.weights.shard import local_shape, segments


def check_names(spec: ModelSpec, checkpoint: HFCheckpoint) -> None:
    """Every tensor of the model is in the checkpoint with its shape, and nothing else is. Raises CheckpointError
    naming all."""
    wanted: dict[str, tuple[int, ...]] = {}
    for tensor in spec.tensors():
        wanted |= tensor.hf_shapes()
    present = {name for name in checkpoint.names() if not spec.passes_over(name)}
    if spec.tied:
        present.discard("lm_head.weight")  # some exporters write the tied copy too
    problems = [f"missing: {name}" for name in sorted(wanted.keys() - present)]
    problems += [f"not part of {spec.family.name}: {name}" for name in sorted(present - wanted.keys())]
    for name in sorted(wanted.keys() & present):
        shape = checkpoint.shape(name)
        if shape != wanted[name]:
            problems.append(f"{name}: shape {shape}, the config says {wanted[name]}")
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise CheckpointError(f"{checkpoint.path} does not fit its config.json:\n  {shown}")


@torch.no_grad()
def load_hf(model: torch.nn.Module, spec: ModelSpec, mesh: Mesh, checkpoint: HFCheckpoint) -> int:
    """Fill every parameter of this rank's ``model`` (a GPTModel). Returns the number of bytes read.

    Raises CheckpointError for a tensor that is missing, extra or misshapen, or a parameter that no rule fills.
    """
    check_names(spec, checkpoint)
    canon = {tensor.name: tensor for tensor in spec.tensors()}
    read = 0
    for name, parameter in canonical_parameters(model, spec):
        if name not in canon:
            raise CheckpointError(
                f"no rule of family {spec.family.name} fills parameter {name} {tuple(parameter.shape)}"
            )
        tensor = canon[name]
        _check_shape(tensor, parameter, mesh.tp_size)
        filled = 0
        for part in segments(tensor, mesh.tp_size, mesh.tp_rank):
            block = checkpoint.read(part.hf, part.hf_rows, part.columns)
            parameter[part.local_rows].copy_(block)
            filled += block.shape[0]
            read += block.numel() * block.element_size()
        parameter[filled:].zero_()  # vocabulary padding, always last
    return read


def _check_shape(tensor: CanonTensor, parameter: torch.Tensor, tp_size: int) -> None:
    expected = local_shape(tensor, tp_size)
    if tuple(parameter.shape) != expected:
        raise CheckpointError(
            f"{tensor.name}: megatron built {tuple(parameter.shape)}, its rule says {expected} at TP {tp_size}"
        )


@dataclass(frozen=True)
class _Bucket:
    """Tensors of one pipeline stage that travel together."""

    stage: int
    tensors: tuple[CanonTensor, ...]
    numel: int  # elements of one tensor-parallel rank


class WeightStream:
    """The whole model as HF tensors on every rank, from each rank's parameters, a bounded bucket at a time.

    What travels, in which order and from which stage is settled once, here; iterating needs no metadata.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        spec: ModelSpec,
        mesh: Mesh,
        bucket_bytes: int,
        value: Callable[[torch.nn.Parameter], torch.Tensor] = torch.Tensor.detach,
    ) -> None:
        """``value`` says what of a parameter is streamed: its weights, or, to compare layouts, its gradient."""
        self.mesh = mesh
        self.parameters = dict(canonical_parameters(model, spec))
        self.value = value
        (self.dtype,) = {value(parameter).dtype for parameter in self.parameters.values()}  # buckets are of one dtype
        self.buckets = list(self._plan(spec, bucket_bytes))

    def _plan(self, spec: ModelSpec, bucket_bytes: int) -> Iterator[_Bucket]:
        stage_of = self._stages()
        limit = max(1, bucket_bytes // self.dtype.itemsize // self.mesh.tp_size)
        stage, tensors, numel = 0, [], 0
        for tensor in spec.tensors():
            size = torch.Size(local_shape(tensor, self.mesh.tp_size)).numel()
            if tensors and (numel + size > limit or stage_of[tensor.name] != stage):
                yield _Bucket(stage, tuple(tensors), numel)
                tensors, numel = [], 0
            stage = stage_of[tensor.name]
            tensors.append(tensor)
            numel += size
        yield _Bucket(stage, tuple(tensors), numel)

    def _stages(self) -> dict[str, int]:
        """The first pipeline stage that holds each tensor (a tied embedding is on two)."""
        held: list[list[str]] = [[] for _ in range(self.mesh.pp_size)]
        dist.all_gather_object(held, list(self.parameters), group=self.mesh.pp_group)
        return {name: stage for stage in reversed(range(self.mesh.pp_size)) for name in held[stage]}

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(HF name, whole tensor), in streaming order. A collective: every rank of the pipeline iterates to the end."""
        for bucket in self.buckets:
            shares = self._gather(bucket)  # [tp, numel]
            at = 0
            for tensor in bucket.tensors:
                shape = torch.Size(local_shape(tensor, self.mesh.tp_size))
                local = [share[at : at + shape.numel()].view(shape) for share in shares]
                at += shape.numel()
                yield from self._join(tensor, local).items()

    def _gather(self, bucket: _Bucket) -> torch.Tensor:
        mesh = self.mesh
        shares = torch.empty((mesh.tp_size, bucket.numel), dtype=self.dtype, device=mesh.device)
        if bucket.stage == mesh.pp_rank:
            mine = torch.cat([self.value(self.parameters[tensor.name]).reshape(-1) for tensor in bucket.tensors])
            if mesh.tp_size == 1:
                shares[0] = mine
            else:
                dist.all_gather_into_tensor(shares.view(-1), mine, group=mesh.tp_group)
        if mesh.pp_size > 1:
            owner = dist.get_global_rank(mesh.pp_group, bucket.stage)
            dist.broadcast(shares, owner, group=mesh.pp_group)
        return shares

    def _join(self, tensor: CanonTensor, local: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        whole = {name: local[0].new_empty(shape) for name, shape in tensor.hf_shapes().items()}
        for tp_rank, share in enumerate(local):
            for part in segments(tensor, self.mesh.tp_size, tp_rank):
                where = part.hf_rows if part.columns is None else (part.hf_rows, part.columns)
                whole[part.hf][where] = share[part.local_rows]
        return whole


def save_hf(stream: WeightStream, path: str | Path, carry_from: str | Path) -> None:
    """Write an HF directory that transformers and vLLM load. A collective; rank 0 writes, one file in memory at a
    time."""
    writer = HFWriter(path) if stream.mesh.rank == 0 else None
    for name, tensor in stream:
        if writer:
            writer.add(name, tensor)
    if writer:
        writer.finish(carry_from)
    dist.barrier(group=stream.mesh.host_group)
