"""To a Hugging Face directory, from a checkpoint of either format.

The target's files have their final size and header before a byte is copied (`megarl.weights.hf_writer`), and every row
goes from the mapped source to its place in a mapped file by one copy, cast to another dtype if asked. The vocabulary's
padding stays behind, tied embeddings are written once, and copies that HF keeps (of multi-token-prediction layers) are
written again. With ``fp8`` every linear weight is written as DeepSeek-V3's are, a few blocks of rows at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megarl.convert import work
from megarl.convert.files import Staging, TargetError, inside
from megarl.convert.manifest import HF, MANIFEST, Manifest, describe, entry_from, entry_in_file
from megarl.convert.progress import ProgressBar
from megarl.convert.sources import (
    HFSource,
    Source,
    check_rules,
    check_source,
    config_folder,
    open_source,
    put,
    refuse,
    rows_per_chunk,
)
from megarl.convert.work import Moved, Record, Unit, units
from megarl.model.family import ModelSpec, as_classifier
from megarl.weights.durable import unfinished
from megarl.weights.hf_files import CheckpointError
from megarl.weights.hf_writer import HFTensor, OpenFile, PlannedFile, as_fp8, create_files, plan_files, write_metadata
from megarl.weights.quantized import BLOCK, SCALE_SUFFIX, is_quantised
from megarl.weights.rules import CanonTensor, Run
from megarl.weights.shard import Segment, row_segments

MAX_FILE_BYTES = 5 << 30


@dataclass(frozen=True)
class ToHF:
    """What to write. ``layers``: only so many of the first layers (a slice for tests, that runs like a small model).

    ``part``: of a training run's checkpoint not the policy but the model of that name. ``dtype`` None keeps each
    tensor's own; with ``from_master`` that is fp32, but for what has no master.
    """

    source: Path
    target: Path
    config_from: Path | None = None
    dtype: torch.dtype | None = None
    keep_mtp: bool = True
    from_master: bool = False
    fp8: bool = False
    max_file_bytes: int = MAX_FILE_BYTES
    layers: int | None = None
    part: str | None = None

    def open(self) -> _Filler:
        return _Filler(self)

    def open_source(self) -> Source:
        return open_source(
            self.source, self.config_from, keep_mtp=self.keep_mtp, from_master=self.from_master, part=self.part
        )

    def options(self) -> dict[str, Any]:
        """What another run must have in common to go on with this one's folder."""
        said = {"dtype": str(self.dtype), "mtp": self.keep_mtp, "fp8": self.fp8, "max_file_bytes": self.max_file_bytes}
        return said | {"from_master": self.from_master, "layers": self.layers, "part": self.part}


@dataclass(frozen=True)
class _Plan:
    """Everything that is known before a byte moves."""

    spec: ModelSpec
    tensors: list[HFTensor]  # as stored: a quantised weight is two
    files: list[PlannedFile]
    copies: dict[str, list[str]]  # HF tensor -> those that repeat it

    @functools.cached_property
    def file_of(self) -> dict[str, PlannedFile]:
        return {tensor.name: file for file in self.files for tensor in file.tensors}

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    @functools.cached_property
    def _tensors(self) -> dict[str, HFTensor]:
        return {tensor.name: tensor for tensor in self.tensors}

    def tensor(self, name: str) -> HFTensor:
        return self._tensors[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def stored_names(self, unit: Unit) -> list[str]:
        """What a unit writes, copies and scales included."""
        names = dict.fromkeys(name for tensor in unit.tensors for name in tensor.hf_shapes())
        repeated = [copy for name in names for copy in self.copies.get(name, [])]
        written = [stored for name in (*names, *repeated) for stored in (name, name + SCALE_SUFFIX)]
        return [stored for stored in written if stored in self._tensors]


def convert_to_hf(job: ToHF, *, workers: int = 1, resume: bool = False, overwrite: bool = False) -> Manifest:
    """Write the directory. Raises TargetError, CheckpointError or UnsupportedModel before anything is written where
    source or target are not right; an error later leaves ``<target>.incomplete``."""
    if inside(job.target, job.source) or inside(job.source, job.target):
        raise TargetError(f"{job.target}: source and target lie in one another")
    with contextlib.closing(job.open_source()) as source:
        refuse(f"{job.source} cannot be converted:", source.problems())
        plan = _plan(job, source)
        ours = (job.target / MANIFEST).exists()
        with contextlib.closing(Staging(job.target, resume=resume, overwrite=overwrite, ours=ours)) as staging:
            manifest = _write(job, source, plan, staging, workers)
            staging.publish()
    return manifest


def _write(job: ToHF, source: Source, plan: _Plan, staging: Staging, workers: int) -> Manifest:
    """Everything, in the staging folder."""
    progress = work.begin(staging, source.identity() | job.options(), plan.nbytes)
    create_files(staging.folder, plan.files, resume=staging.resumed)
    with ProgressBar(f"to {job.target}", sum(tensor.nbytes for tensor in plan.tensors)) as bar:
        records = work.run(job, units(plan.spec), progress, workers, staging.lock, bar)
    entries = {name: entry_from(said) for record in records for name, said in record["tensors"].items()}
    assert entries.keys() == {tensor.name for tensor in plan.tensors}, "not every tensor was written"
    manifest = Manifest(HF, describe(plan.spec), str(job.source), job.options(), entries)
    manifest.write(staging.folder)
    write_metadata(staging.folder, plan.files, _config_from(job, source), _config_changes(job, plan.spec))
    return manifest


def _config_from(job: ToHF, source: Source) -> Path:
    return job.source if isinstance(source, HFSource) else config_folder(source.path, job.config_from)


def _config_changes(job: ToHF, spec: ModelSpec) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if spec.mtp_num_layers != spec.mtp_in_checkpoint:
        changes["num_nextn_predict_layers"] = spec.mtp_num_layers
    if spec.scalar_head:
        changes |= as_classifier(spec.family.hf_architectures[0])
    if job.layers is not None:
        changes["num_hidden_layers"] = spec.num_layers
        changes["layer_types"] = None
    return changes


def _plan(job: ToHF, source: Source) -> _Plan:
    spec = source.spec if job.layers is None else first_layers(source.spec, job.layers)
    tensors = spec.tensors()
    check_rules(tensors)
    copies: dict[str, list[str]] = {}
    if spec.mtp_num_layers:
        for name, original in spec.duplicates().items():
            copies.setdefault("model.embed_tokens.weight" if spec.tied else original, []).append(name)
    out: dict[str, HFTensor] = {}
    for tensor in tensors:
        dtype = source.dtype(tensor) if job.dtype is None or tensor.keep_fp32 else job.dtype
        for name, shape in tensor.hf_shapes().items():
            for each in (name, *copies.get(name, [])):
                out[each] = HFTensor(each, shape, dtype)
    stored = list(out.values())
    if job.fp8:
        if stacked := [name for name, tensor in out.items() if len(tensor.shape) > 2]:
            raise CheckpointError(
                f"{job.source}: {stacked[0]} holds all experts: not a shape that block-scaled FP8 has"
            )
        stored = as_fp8(stored)
    return _Plan(spec, stored, plan_files(stored, job.max_file_bytes), copies)


def first_layers(spec: ModelSpec, count: int) -> ModelSpec:
    """The same model with its first layers only, and without multi-token prediction."""
    if not 1 <= count <= spec.num_layers:
        raise CheckpointError(f"the first {count} layers of a model that has {spec.num_layers}")
    moe = dataclasses.replace(spec.moe, layers=spec.moe.layers[:count]) if spec.moe else None
    return dataclasses.replace(spec, num_layers=count, moe=moe, mtp_num_layers=0)


class _Filler:
    """Fills units of a directory whose files are there."""

    def __init__(self, job: ToHF) -> None:
        self.job = job
        self.source = job.open_source()
        self.plan = _plan(job, self.source)
        self.folder = unfinished(job.target)

    def fill(self, unit: Unit, moved: Moved) -> Callable[[], Record]:
        files = _Files(self.plan, self.folder)
        if self.job.fp8:
            self._fill_fp8(unit, files, moved)
        else:
            for tensor in unit.tensors:
                self._fill(tensor, files, moved)
        return functools.partial(self._settle, unit, files)

    def _settle(self, unit: Unit, files: _Files) -> Record:
        """Check the source's hashes, hash what was written, and wait until it is on the disk."""
        for tensor in unit.tensors:
            check_source(self.source, tensor)
        found = self._written(unit)
        files.finish()
        return {"unit": unit.name, "tensors": found}

    def _written(self, unit: Unit) -> dict[str, Any]:
        """Manifest entries of what is in the target, where an HF tensor's rows may come from several canonical ones."""
        out = {}
        for name in self.plan.stored_names(unit):
            file, tensor = self.plan.file_of[name], self.plan.tensor(name)
            found = entry_in_file(self.folder / file.name, file.offsets[name], tensor.shape, tensor.dtype)
            out[name] = found.as_json()
        return out

    def _fill(self, tensor: CanonTensor, files: _Files, moved: Moved) -> None:
        """Copy a canonical tensor to where its rows are in HF tensors."""
        step = rows_per_chunk(tensor.shape, self.source.dtype(tensor).itemsize)
        for start in range(0, tensor.shape[0], step):
            for block in self.source.blocks(tensor, start, min(start + step, tensor.shape[0])):
                end = block.start + block.view.shape[0]
                for part in row_segments(tensor, block.start, end, block.columns):
                    self._write(part, block.view[part.local_rows], files, moved)

    def _write(self, part: Segment, rows: torch.Tensor, files: _Files, moved: Moved) -> None:
        for name in (part.hf, *self.plan.copies.get(part.hf, [])):
            files.of(name).write(dataclasses.replace(part, hf=name), rows)
            moved(rows.numel() * self.plan.dtype(name).itemsize)

    def _fill_fp8(self, unit: Unit, files: _Files, moved: Moved) -> None:
        """As `_fill`, by HF tensor: whole blocks of rows are gathered, then quantised."""
        runs: dict[str, list[tuple[CanonTensor, int, Run]]] = {}
        for tensor in unit.tensors:
            at = 0
            for run in tensor.runs:
                runs.setdefault(run.hf, []).append((tensor, at, run))
                at += run.rows
        for name, pieces in runs.items():
            shape, dtype = self.plan.tensor(name).shape, self.source.dtype(pieces[0][0])
            step = -(-rows_per_chunk(shape, 4) // BLOCK[0]) * BLOCK[0]
            for start in range(0, shape[0], step):
                stop = min(start + step, shape[0])
                rows = torch.empty((stop - start, *shape[1:]), dtype=dtype)
                self._gather(pieces, start, rows)
                if is_quantised(name, shape):
                    files.of(name).write_fp8(name, start, rows)
                    moved(rows.numel())
                else:
                    columns = slice(0, shape[1]) if len(shape) == 2 else None
                    self._write(Segment(name, slice(start, stop), slice(start, stop), columns), rows, files, moved)

    def _gather(self, pieces: list[tuple[CanonTensor, int, Run]], start: int, rows: torch.Tensor) -> None:
        """Fill ``rows`` with the HF tensor's rows from ``start`` on; ``pieces`` are its runs."""
        for tensor, at, run in pieces:
            low, high = max(start, run.start), min(start + rows.shape[0], run.start + run.rows)
            first = at + low - run.start  # row of the canonical tensor
            for block in self.source.blocks(tensor, first, first + high - low) if low < high else ():
                put(block, rows, first - (low - start))

    def intact(self, unit: Unit, record: Record) -> bool:
        return bool(record["tensors"] == self._written(unit))

    def close(self) -> None:
        self.source.close()


class _Files:
    """The target's files that a unit has tensors in, opened as they are needed."""

    def __init__(self, plan: _Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self.open: dict[str, OpenFile] = {}

    def of(self, name: str) -> OpenFile:
        """The file of a stored tensor."""
        planned = self.plan.file_of[name]
        if planned.name not in self.open:
            self.open[planned.name] = planned.open(self.folder)
        return self.open[planned.name]

    def finish(self) -> None:
        for file in self.open.values():
            file.finish()
