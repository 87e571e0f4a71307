"""To a Megatron checkpoint (torch_dist), from a Hugging Face directory.

    DST/latest_checkpointed_iteration.txt    ``release``, or a number
    DST/release/                             the checkpoint; megarl_manifest.json in it
    DST/hf/                                  config.json, generation config and tokenizer of the source

One file a unit of work (a layer), in chunks of at most 64 MB, whose rows are written from where they lie in the mapped
source. Each tensor keeps its dtype unless another is asked for. The vocabulary is padded with zeros.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megarl.convert import work
from megarl.convert.files import Staging, TargetError, inside
from megarl.convert.manifest import (
    MANIFEST,
    MEGATRON,
    Entry,
    Hash,
    Manifest,
    describe,
    dtype_name,
    entry_from,
    raw_bytes,
)
from megarl.convert.progress import ProgressBar
from megarl.convert.sources import (
    CHUNK_BYTES,
    HF_FOLDER,
    HFSource,
    Source,
    check_rules,
    check_source,
    gather,
    open_source,
    refuse,
)
from megarl.convert.torch_dist_names import StoredNames, homogeneous
from megarl.convert.torch_dist_reader import TRACKER
from megarl.convert.torch_dist_writer import ChunkFile, FileRecord, StoredTensor, TorchDistWriter, row_chunks
from megarl.convert.work import Moved, Record, Unit, units
from megarl.model.family import ModelSpec
from megarl.weights.durable import sync, unfinished, write_durably
from megarl.weights.hf_files import CheckpointError, carried_files, read_json
from megarl.weights.rules import CanonTensor, Shard
from megarl.weights.shard import VOCAB_MULTIPLE


@dataclass(frozen=True)
class ToMegatron:
    """What to write, and how it is laid out and named: see `megarl.convert.torch_dist_names`.

    ``stacked`` None stacks the layers of dense models. Those of a model with experts megatron-core stacks too where its
    ``moe_layer_freq`` is the number 1, but not where it is a list; numbered keys can be read either way, because
    ``content_metadata`` says that the layers are numbered. ``core_version`` is the megatron-core that will read it.
    """

    source: Path
    target: Path
    dtype: torch.dtype | None = None
    keep_mtp: bool = True
    flavour: str = "te"
    stacked: bool | None = None
    core_version: tuple[int, int] = (0, 16)
    vocab_multiple: int = VOCAB_MULTIPLE
    iteration: int | None = None

    def open(self) -> _Filler:
        return _Filler(self)

    def open_source(self) -> Source:
        return open_source(self.source, keep_mtp=self.keep_mtp)

    def names(self, spec: ModelSpec) -> StoredNames:
        """Raises TargetError where the layers cannot be stacked."""
        if self.stacked and not homogeneous(spec):
            raise TargetError(f"{self.source}: layers of several kinds cannot be stacked")
        stacked = spec.moe is None if self.stacked is None else self.stacked
        return StoredNames(spec, flavour=self.flavour, stacked=stacked)

    @property
    def folder(self) -> Path:
        """Where the checkpoint itself is made: `TorchDistWriter` renames it within our own unfinished folder."""
        name = "release" if self.iteration is None else f"iter_{self.iteration:07d}"
        return unfinished(self.target) / name

    def padded(self, rows: int) -> int:
        return -(-rows // self.vocab_multiple) * self.vocab_multiple

    def options(self) -> dict[str, Any]:
        """What another run must have in common to go on with this one's folder."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("source", "target")}
        return fields | {"dtype": str(self.dtype), "core_version": ".".join(map(str, self.core_version))}


def convert_to_megatron(
    job: ToMegatron, *, workers: int = 1, resume: bool = False, overwrite: bool = False
) -> Manifest:
    """Write the checkpoint. Raises TargetError, CheckpointError or UnsupportedModel before anything is written where
    source or target are not right; an error later leaves ``<target>.incomplete``."""
    if inside(job.target, job.source) or inside(job.source, job.target):
        raise TargetError(f"{job.target}: source and target lie in one another")
    with contextlib.closing(job.open_source()) as source:
        if not isinstance(source, HFSource):
            raise TargetError(f"{job.source}: is no Hugging Face directory")
        refuse(f"{job.source} cannot be converted:", source.problems())
        check_rules(source.spec.tensors())
        stored = _stored_tensors(job, source)
        staging = Staging(job.target, resume=resume, overwrite=overwrite, ours=_is_ours(job.target))
        with contextlib.closing(staging):
            manifest = _write(job, source, stored, staging, workers)
            staging.publish()
    return manifest


def _write(job: ToMegatron, source: Source, stored: list[StoredTensor], staging: Staging, workers: int) -> Manifest:
    """Everything, in the staging folder."""
    nbytes = sum(torch.Size(each.shape).numel() * each.dtype.itemsize for each in stored)
    progress = work.begin(staging, source.identity() | job.options(), nbytes)
    extra = job.names(source.spec).extra_states()
    writer = TorchDistWriter(job.folder, stored, extra, resume=True, overwrite=True)
    with ProgressBar(f"to {job.target}", nbytes) as bar:
        records = work.run(job, units(source.spec), progress, workers, staging.lock, bar)
    entries = {name: entry_from(said) for record in records for name, said in record["tensors"].items()}
    assert entries.keys() == {tensor.name for tensor in source.spec.tensors()}, "not every tensor was written"
    manifest = Manifest(MEGATRON, describe(source.spec), str(job.source), job.options(), entries)
    manifest.write(writer.folder)
    _carry(source, staging.folder / HF_FOLDER)
    files = [FileRecord.from_json(record["file"]) for record in records]
    writer.finish(files, _common_state(job, source.spec), job.core_version)
    return manifest


def _is_ours(target: Path) -> bool:
    """Whether everything that `target` holds was written by a conversion."""
    if not (target / TRACKER).is_file():
        return False
    folders = [path for path in target.iterdir() if path.is_dir() and path.name != HF_FOLDER]
    return all((folder / MANIFEST).is_file() for folder in folders)


def _stored_tensors(job: ToMegatron, source: Source) -> list[StoredTensor]:
    names = job.names(source.spec)
    vocab = job.padded(source.spec.vocab_size)
    shapes = names.shapes(vocab)
    dtypes: dict[str, torch.dtype] = {}
    for tensor in source.spec.tensors():
        for place in names.places(tensor):
            dtype = _dtype(job, source, tensor)
            if dtypes.setdefault(place.key, dtype) != dtype:
                raise CheckpointError(
                    f"{job.source}: {tensor.name} is {dtype}, but other tensors of {place.key} are "
                    f"{dtypes[place.key]}: --per-layer-keys, or one --dtype for all"
                )
    return [StoredTensor(key, shape, dtypes[key]) for key, shape in shapes.items()]


def _dtype(job: ToMegatron, source: Source, tensor: CanonTensor) -> torch.dtype:
    return source.dtype(tensor) if job.dtype is None or tensor.keep_fp32 else job.dtype


def _common_state(job: ToMegatron, spec: ModelSpec) -> dict[str, Any]:
    """What megatron-core reads beside the tensors. ``content_metadata`` tells it how layers are keyed."""
    layout = {"singleton_local_shards": False, "non_homogeneous_layers": not job.names(spec).stacked}
    return {"checkpoint_version": 3.0, "iteration": job.iteration or 0, "content_metadata": layout}


def _carry(source: Source, folder: Path) -> None:
    """Copy config and tokenizer, config.json saying how many multi-token-prediction layers are left."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in carried_files(source.path):
        write_durably(folder / file.name, file.read_bytes())
    if source.spec.mtp_num_layers != source.spec.mtp_in_checkpoint:
        config = read_json(folder / "config.json") | {"num_nextn_predict_layers": source.spec.mtp_num_layers}
        write_durably(folder / "config.json", json.dumps(config, indent=2) + "\n")
    sync(folder)


class _Filler:
    """Writes units, each into a file of its own."""

    def __init__(self, job: ToMegatron) -> None:
        self.job = job
        self.source = job.open_source()
        self.names = job.names(self.source.spec)
        self.number = {unit.name: k for k, unit in enumerate(units(self.source.spec))}
        self.folder = unfinished(job.folder)

    def fill(self, unit: Unit, moved: Moved) -> Callable[[], Record]:
        file = ChunkFile(self.folder, self.number[unit.name], about=sum(map(self._nbytes, unit.tensors)))
        hashes = {tensor.name: self._write(tensor, file, moved).as_json() for tensor in unit.tensors}
        return functools.partial(self._settle, unit, file, hashes)

    def _settle(self, unit: Unit, file: ChunkFile, tensors: dict[str, Any]) -> Record:
        """Check the source's hashes, and wait until the file is on the disk."""
        for tensor in unit.tensors:
            check_source(self.source, tensor)
        return {"unit": unit.name, "tensors": tensors, "file": file.finish().to_json()}

    def _shape(self, tensor: CanonTensor) -> tuple[int, ...]:
        """With the vocabulary's padding."""
        rows = self.job.padded(tensor.shape[0]) if tensor.shard is Shard.VOCAB else tensor.shape[0]
        return (rows, *tensor.shape[1:])

    def _nbytes(self, tensor: CanonTensor) -> int:
        return math.prod(self._shape(tensor)) * _dtype(self.job, self.source, tensor).itemsize

    def _write(self, tensor: CanonTensor, file: ChunkFile, moved: Moved) -> Entry:
        """Write all chunks of a tensor, and hash them on the way."""
        dtype, shape = _dtype(self.job, self.source, tensor), self._shape(tensor)
        (place,) = self.names.places(tensor)
        row_bytes = torch.Size(shape[1:]).numel() * dtype.itemsize
        hashed = Hash()
        for chunk in row_chunks(shape[0], row_bytes, CHUNK_BYTES):
            parts = self._parts(tensor, chunk.start, chunk.stop, dtype)
            for part in parts:
                hashed.update(raw_bytes(part))
            sizes = (*(1 for _ in place.index), chunk.stop - chunk.start, *shape[1:])
            file.write(place.key, (*place.index, chunk.start, *(0 for _ in shape[1:])), sizes, parts)
            moved((chunk.stop - chunk.start) * row_bytes)
        return Entry(shape, dtype_name(dtype), hashed.hexdigest())

    def _parts(self, tensor: CanonTensor, start: int, stop: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """Tensors that, end to end, are the rows from ``start`` to ``stop``; mapped ones where nothing is computed."""
        parts = []
        end = min(stop, tensor.shape[0])
        if start < end:
            blocks = list(self.source.blocks(tensor, start, end))
            whole = all(block.view.shape[1:] == tensor.shape[1:] for block in blocks)
            views = [block.view for block in blocks] if whole else [gather(self.source, tensor, start, end)]
            parts = [view.to(dtype).contiguous() for view in views]
        if stop > end:
            parts.append(torch.zeros((stop - max(start, end), *tensor.shape[1:]), dtype=dtype))
        return parts

    def intact(self, unit: Unit, record: Record) -> bool:
        """Hash the tensors again, from the file's chunks."""
        said = FileRecord.from_json(record["file"])
        path = self.folder / said.name
        if not path.is_file() or path.stat().st_size != said.nbytes:
            return False
        hashes = {self.names.stored(tensor.name): Hash() for tensor in unit.tensors}
        leading = {key: len(index) for key, index in hashes}
        with path.open("rb") as file:
            for chunk in said.chunks:
                around = chunk.frame()
                file.seek(chunk.at)
                data = memoryview(file.read(chunk.length))
                numbers = data[len(around.head) : chunk.length - len(around.tail)]
                if data[: len(around.head)] != around.head or data[len(around.head) + len(numbers) :] != around.tail:
                    return False
                hashes[chunk.key, chunk.offsets[: leading[chunk.key]]].update(numbers)
        found = {tensor.name: hashes[self.names.stored(tensor.name)].hexdigest() for tensor in unit.tensors}
        return found == {name: entry["xxh3_128"] for name, entry in record["tensors"].items()}

    def close(self) -> None:
        self.source.close()
