"""Write torch_dist checkpoints for megatron-core 0.16 to 0.19 as a stream of chunks, by one process or several.

What will be there is declared first (`StoredTensor`: key, shape, dtype). Then anyone may write chunks, each into a
file of its own (`ChunkFile`), in any order; a file's `FileRecord`, plain JSON, says what is in it and is what workers
hand over and what a resumed conversion keeps. `TorchDistWriter.finish` checks that the chunks cover every declared
tensor exactly once and writes ``.metadata``, the common state and, last, ``metadata.json``.

All of it happens in ``<name>.incomplete``, which gets its name at the very end, everything on disk: what is interrupted
never looks finished. Then ``latest_checkpointed_iteration.txt`` beside it points to it.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import pickle
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megarl.convert.torch_dist_chunk import ALIGNMENT, Frame, frame
from megarl.convert.torch_dist_reader import COMMON_OBJECT, TRACKER
from megarl.convert.torch_dist_tiling import Box, fault_in_tiling
from megarl.weights.durable import sync, unfinished, write_durably
from megarl.weights.hf_files import CheckpointError
from megarl.weights.hf_writer import WRITTEN_AT_ONCE

MAX_CHUNK_BYTES = 64 << 20
_COPIED_AT_ONCE = 8 << 20  # bytes of a tensor that has to be made contiguous


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that the checkpoint will hold. ``shape`` includes the axes of layers and experts."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class ChunkRecord:
    """Elements ``offsets`` to ``offsets + sizes`` of ``key``, at byte ``at`` of its file."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: str
    at: int
    length: int

    def frame(self) -> Frame:
        """The bytes around its numbers, which are all the others of its ``length``."""
        return frame(getattr(torch, self.dtype), self.sizes, self.key, self.offsets)


@dataclass(frozen=True)
class FileRecord:
    """A finished file: its name, length in bytes and chunks."""

    name: str
    nbytes: int
    chunks: tuple[ChunkRecord, ...]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> FileRecord:
        chunks = [
            ChunkRecord(c["key"], tuple(c["offsets"]), tuple(c["sizes"]), c["dtype"], c["at"], c["length"])
            for c in said["chunks"]
        ]
        return cls(said["name"], said["nbytes"], tuple(chunks))


def row_chunks(rows: int, row_bytes: int, limit: int = MAX_CHUNK_BYTES) -> Iterator[slice]:
    """Cut ``rows`` into runs of at most ``limit`` bytes (one row at least), all but the last of equal length."""
    step = max(1, limit // max(1, row_bytes))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


class ChunkFile:
    """One .distcp file, written from front to back by one process.

    Args:
        folder: `TorchDistWriter.folder`.
        number: no other file of the checkpoint may have it. A file of that number is written over.
        about: bytes that will be written, as far as known: disk space is taken at once, which is faster.
    """

    def __init__(self, folder: str | Path, number: int, about: int = 0) -> None:
        self.name = f"__{number}_0.distcp"
        self.path = Path(folder) / self.name
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        if about:
            os.posix_fallocate(self._file, 0, about)
        self._at = 0
        self._chunks: list[ChunkRecord] = []

    def write(self, key: str, offsets: Sequence[int], sizes: Sequence[int], parts: Tensor | Iterable[Tensor]) -> None:
        """Write one chunk: elements ``offsets`` to ``offsets + sizes`` of ``key``.

        ``parts``, laid end to end, are its elements in row-major order; all have one dtype. Contiguous ones are written
        from where they are, such as a mapped file, without a copy in between.
        """
        given = [parts] if isinstance(parts, Tensor) else list(parts)
        dtype, sizes, offsets = given[0].dtype, tuple(sizes), tuple(offsets)
        if sum(part.numel() for part in given) != math.prod(sizes) or any(part.dtype != dtype for part in given):
            raise ValueError(f"{key} at {offsets}: parts {[tuple(p.shape) for p in given]} are no chunk {sizes}")
        around = frame(dtype, sizes, key, offsets)
        start = self._at
        self._write_all([around.head])
        self._write_all(buffer for part in given for buffer in _buffers(part))
        self._write_all([around.tail])
        self._chunks.append(
            ChunkRecord(key, offsets, sizes, str(dtype).removeprefix("torch."), start, self._at - start)
        )
        self._write_all([bytes(-self._at % ALIGNMENT)])
        # On Linux this starts writing the range to disk and does not wait: the disk works while we read on.
        os.posix_fadvise(self._file, start, self._at - start, os.POSIX_FADV_DONTNEED)

    def _write_all(self, buffers: Iterable[Any]) -> None:
        for buffer in buffers:
            data = memoryview(buffer).cast("B")
            while data:
                written = os.write(self._file, data[:WRITTEN_AT_ONCE])
                data = data[written:]
                self._at += written

    def finish(self) -> FileRecord:
        """Put the file on disk, and say what is in it."""
        os.ftruncate(self._file, self._at)
        os.fsync(self._file)
        os.close(self._file)
        return FileRecord(self.name, self._at, tuple(self._chunks))


def _buffers(part: Tensor) -> Iterator[Any]:
    """The bytes of a tensor in row-major order, copied only where they are not so in memory, a few rows at a time."""
    if part.is_contiguous():
        yield _bytes_of(part)
        return
    row_bytes = part[0].numel() * part.element_size()
    for rows in row_chunks(part.shape[0], row_bytes, _COPIED_AT_ONCE):
        yield _bytes_of(part[rows].contiguous())


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


class TorchDistWriter:
    """A checkpoint in the making.

    Args:
        path: the folder to be, such as ``.../iter_0000010`` or ``.../release``.
        tensors: everything it will hold.
        extra_states: unique keys of ``_extra_state`` objects, which are written with None as their value
            (`StoredNames.extra_states`).
        resume: keep the files of an interrupted attempt.
        overwrite: replace a finished checkpoint of that name.
    """

    def __init__(
        self,
        path: str | Path,
        tensors: Iterable[StoredTensor],
        extra_states: Iterable[str] = (),
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self.folder = unfinished(self.path)
        self.tensors = {tensor.key: tensor for tensor in tensors}
        self.extra_states = list(extra_states)
        self._overwrite = overwrite
        if self.path.exists() and not overwrite:
            raise CheckpointError(f"{self.path} exists already")
        if not resume:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)

    def chunk_file(self, number: int) -> ChunkFile:
        return ChunkFile(self.folder, number)

    def finish(
        self, files: Iterable[FileRecord], common: dict[str, Any], core_version: tuple[int, int] = (0, 16)
    ) -> Path:
        """Check that the checkpoint is whole, complete it, and give it its name.

        Args:
            common: the common state, plain data: ``iteration``, ``checkpoint_version``, ``args``, ...
            core_version: the oldest megatron-core that is to read it. ``common.pt`` is read by all of them; from 0.19
                on the object that replaces it is written too.

        Raises:
            CheckpointError: chunks overlap or leave holes, or a file is not as its record says. Nothing is finished.
        """
        files = sorted(files, key=lambda record: record.name)
        self._check_files(files)
        self._check_chunks(files)
        objects: dict[str, Any] = dict.fromkeys(self.extra_states)
        if core_version >= (0, 19):
            objects[COMMON_OBJECT] = common
        spans = self._write_objects(objects, files)
        torch.save(common, self.folder / "common.pt")
        write_durably(self.folder / ".metadata", pickle.dumps(self._metadata(files, spans)))
        sync(self.folder / "common.pt")
        self._remove_strangers(files, spans)
        sync(self.folder)
        said = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        said |= {"common_backend": "torch", "common_backend_version": 1}
        write_durably(self.folder / "metadata.json", json.dumps(said).encode())
        sync(self.folder)
        self._give_name()
        return self.path

    def _check_files(self, files: list[FileRecord]) -> None:
        names = [record.name for record in files]
        if len(set(names)) != len(names):
            raise CheckpointError(f"{self.folder}: two records of one file among {names}")
        for record in files:
            path = self.folder / record.name
            if not path.is_file():
                raise CheckpointError(f"{path} is missing")
            if path.stat().st_size != record.nbytes:
                raise CheckpointError(f"{path}: {path.stat().st_size} bytes, {record.nbytes} were written")

    def _check_chunks(self, files: list[FileRecord]) -> None:
        boxes: dict[str, list[Box]] = {key: [] for key in self.tensors}
        for record in files:
            for chunk in record.chunks:
                where = f"{self.folder / record.name}: {chunk.key}"
                if chunk.key not in self.tensors:
                    raise CheckpointError(f"{where}: not declared")
                dtype = str(self.tensors[chunk.key].dtype).removeprefix("torch.")
                if chunk.dtype != dtype:
                    raise CheckpointError(f"{where}: a chunk of {chunk.dtype} in a tensor of {dtype}")
                boxes[chunk.key].append(Box(chunk.offsets, chunk.sizes))
        for key, own in boxes.items():
            if fault := fault_in_tiling(self.tensors[key].shape, own):
                raise CheckpointError(f"{self.folder}: {key}: {fault}")

    def _write_objects(self, objects: dict[str, Any], files: list[FileRecord]) -> dict[str, _StorageInfo]:
        """All objects in one file; equal ones share their bytes."""
        if not objects:
            return {}
        taken = [int(record.name.split("_")[2]) for record in files]
        name = f"__{max(taken, default=-1) + 1}_0.distcp"
        data, spans, nothing = bytearray(), {}, None
        for key, value in objects.items():
            if value is None and nothing is not None:
                spans[key] = nothing
                continue
            saved = io.BytesIO()
            torch.save([value], saved)
            spans[key] = _StorageInfo(name, len(data), len(saved.getvalue()))
            nothing = spans[key] if value is None else nothing
            data += saved.getvalue()
        write_durably(self.folder / name, bytes(data))
        return spans

    def _metadata(self, files: list[FileRecord], objects: dict[str, _StorageInfo]) -> Metadata:
        chunks: dict[str, list[ChunkStorageMetadata]] = {key: [] for key in self.tensors}
        storage: dict[MetadataIndex, _StorageInfo] = {}
        for record in files:
            for chunk in record.chunks:
                offsets = torch.Size(chunk.offsets)
                index = MetadataIndex(chunk.key, offsets, len(chunks[chunk.key]))
                chunks[chunk.key].append(ChunkStorageMetadata(offsets, torch.Size(chunk.sizes)))
                storage[index] = _StorageInfo(record.name, chunk.at, chunk.length)
        entries: dict[str, Any] = {
            key: TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), torch.Size(tensor.shape), chunks[key])
            for key, tensor in self.tensors.items()
        }
        for key, span in objects.items():
            entries[key] = BytesStorageMetadata()
            storage[MetadataIndex(key)] = span
        return Metadata(state_dict_metadata=entries, planner_data={}, storage_data=storage)

    def _remove_strangers(self, files: list[FileRecord], objects: dict[str, _StorageInfo]) -> None:
        """Files of an interrupted attempt that no record names."""
        named = {record.name for record in files} | {span.relative_path for span in objects.values()}
        for path in self.folder.glob("*.distcp"):
            if path.name not in named:
                path.unlink()

    def _give_name(self) -> None:
        if self._overwrite and self.path.exists():
            (self.path / "metadata.json").unlink(missing_ok=True)  # from here on the old one is not finished either
            shutil.rmtree(self.path)
        os.rename(self.folder, self.path)
        sync(self.path.parent)
        iteration = self.path.name.removeprefix("iter_")
        said = str(int(iteration)) if iteration.isdecimal() else iteration
        if said.isdecimal() or said == "release":
            tracker = self.path.parent / TRACKER
            write_durably(unfinished(tracker), said.encode())
            os.rename(unfinished(tracker), tracker)
            sync(self.path.parent)
