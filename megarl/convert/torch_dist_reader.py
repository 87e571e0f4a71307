"""Read torch_dist checkpoints of megatron-core without megatron, a process group, or a whole tensor in memory.

A checkpoint is ``<path>/latest_checkpointed_iteration.txt`` (a number, or ``release``) and ``iter_%07d/`` or
``release/`` beside it; the latter may be given itself. In there: ``metadata.json``, which is written last and so marks
the checkpoint as whole; ``.metadata``, a pickled torch ``Metadata`` saying for every key its shape, dtype and chunks;
``*.distcp`` files holding the chunks; the common state as ``common.pt`` or, from core 0.19 on, as the object
``common_state/shard_0_1``.

Files are mapped read-only, so what is read counts as page cache; a block that one chunk holds is a view of it, never
to be written to. Pickles are read as data (`megarl.convert.inert_pickle`). Whatever is missing, truncated or
contradicts itself raises CheckpointError naming the file and the key.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import mmap
import os
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarl.convert.inert_pickle import Record, read_pickle, read_torch_save
from megarl.convert.torch_dist_chunk import Numbers, parse, whose
from megarl.convert.torch_dist_tiling import Box, fault_in_tiling
from megarl.weights.hf_files import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
COMMON_OBJECT = "common_state/shard_0_1"
_OPEN_FILES = 64  # mapped at a time: each costs a file descriptor


@dataclass(frozen=True)
class Span:
    """Bytes of a file."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Piece:
    """Part of a block that was asked for: ``view`` is ``block[rows]`` or, of 2-D tensors, ``block[rows, columns]``."""

    rows: slice
    columns: slice | None
    view: Tensor


def checkpoint_folder(path: str | Path) -> Path:
    """The folder with metadata.json: ``path`` itself, or the one the tracker file in it names."""
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory")
    tracker = path / TRACKER
    if (path / "metadata.json").exists() or (path / ".metadata").exists() or not tracker.exists():
        return path
    said = tracker.read_text().strip()
    if said != "release" and not said.isdecimal():
        raise CheckpointError(f"{tracker}: {said!r} is neither an iteration nor `release`")
    folder = path / ("release" if said == "release" else f"iter_{int(said):07d}")
    if not folder.is_dir():
        raise CheckpointError(f"{tracker} names {folder.name}, which is not there")
    return folder


class TorchDistReader:
    """One torch_dist checkpoint, opened: metadata is read and every file's length checked, no weights.

    Args:
        path: the checkpoint's folder, or the one with the tracker file.
        check_crc: compare the numbers of each chunk with the checksum torch.save wrote, when first touched.
    """

    def __init__(self, path: str | Path, check_crc: bool = True) -> None:
        self.path = checkpoint_folder(path)
        self.check_crc = check_crc
        self._check_finished()
        self._metadata = self.path / ".metadata"
        self._tensors: dict[str, tuple[tuple[int, ...], torch.dtype, list[Box]]] = {}
        self._objects: set[str] = set()
        self._spans: dict[tuple[str, tuple[int, ...] | None], Span] = {}
        self._sizes: dict[str, int | None] = {}
        self._read_metadata()
        self._check_files()
        self._maps: OrderedDict[str, mmap.mmap] = OrderedDict()
        self._blocks: dict[tuple[str, int], dict[tuple[int, ...], list[Box]]] = {}
        self._chunk = functools.lru_cache(maxsize=1024)(self._open_chunk)

    def keys(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every stored tensor, optimizer state included."""
        return {key: (shape, dtype) for key, (shape, dtype, _) in self._tensors.items()}

    def objects(self) -> set[str]:
        """Unique keys of what is no tensor, such as ``..._extra_state/shard_0_4``."""
        return set(self._objects)

    @property
    def iteration(self) -> int | str | None:
        """From the folder's name: a number, ``release``, or None."""
        number = self.path.name.removeprefix("iter_")
        return int(number) if number.isdecimal() else "release" if self.path.name == "release" else None

    def common(self) -> dict[str, Any]:
        """The common state as data, {} where there is none. Objects in it are `Record`; tensors are not read."""
        file = self.path / "common.pt"
        where = str(file) if file.exists() else f"{self.path}: {COMMON_OBJECT}"
        try:
            if file.exists():
                state = read_torch_save(file)
            elif COMMON_OBJECT in self._objects:
                state = self.read_object(COMMON_OBJECT)
            else:
                return {}
        except ValueError as reason:
            raise CheckpointError(f"{where}: {reason}") from reason
        if not isinstance(state, dict):
            raise CheckpointError(f"{where}: holds no dict")
        return state

    def read_object(self, key: str) -> Any:
        """An object as data. megatron-core stores each as a list of one."""
        span = self._spans[key, None]
        mapped = self._map(span.file)
        try:
            value = read_torch_save(io.BytesIO(mapped[span.offset : span.offset + span.length]))
        except ValueError as reason:
            raise CheckpointError(f"{self.path / span.file}: {key}: {reason}") from reason
        return value[0] if isinstance(value, list) and len(value) == 1 else value

    def check(self, keys: Iterable[str]) -> None:
        """That the chunks of every key cover it exactly once. `read` checks the key it reads."""
        for key in keys:
            self._boxes(key, 0)

    def block_shape(self, key: str, index: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Shape of entry ``index`` of a key: 1-D or 2-D."""
        shape = self._known(key)[0]
        if not 1 <= len(shape) - len(index) <= 2 or any(not 0 <= i < n for i, n in zip(index, shape, strict=False)):
            raise CheckpointError(f"{self._metadata}: {key} of shape {shape} has no entry {index}")
        return shape[len(index) :]

    def pieces(self, key: str, index: tuple[int, ...] = (), rows: slice | None = None) -> Iterator[Piece]:
        """The parts that make up ``rows`` of entry ``index`` of a stored tensor, as views of the mapped files.

        Together they cover the block exactly once. ``rows`` has no step; None is all of them.
        """
        shape = self.block_shape(key, index)
        start, stop, _ = (rows or slice(None)).indices(shape[0])
        for box in self._boxes(key, len(index)).get(index, ()):
            first = box.offsets[len(index)]
            low, high = max(start, first), min(stop, first + box.sizes[len(index)])
            if low >= high:
                continue
            within = tuple(i - o for i, o in zip(index, box.offsets, strict=False))
            view = self._chunk(key, box)[within][low - first : high - first]
            columns = None
            if len(shape) == 2:
                columns = slice(box.offsets[-1], box.offsets[-1] + box.sizes[-1])
            yield Piece(slice(low - start, high - start), columns, view)

    def read(
        self, key: str, index: tuple[int, ...] = (), rows: slice | None = None, out: Tensor | None = None
    ) -> Tensor:
        """``rows`` of entry ``index`` of a stored tensor.

        Without ``out`` a block that lies in one chunk is a view of the mapped file, which must not be written to, and
        others are put together in new memory: ask for as many rows as may be in memory. ``out`` may have another dtype.
        """
        shape = self.block_shape(key, index)
        pieces = list(self.pieces(key, index, rows))
        start, stop, _ = (rows or slice(None)).indices(shape[0])
        wanted = (max(stop - start, 0), *shape[1:])
        if out is None:
            if len(pieces) == 1 and pieces[0].view.shape == wanted:
                return pieces[0].view
            out = torch.empty(wanted, dtype=self._tensors[key][1])
        elif tuple(out.shape) != wanted:
            raise ValueError(f"{key}: {wanted} is read into {tuple(out.shape)}")
        for piece in pieces:
            target = out[piece.rows] if piece.columns is None else out[piece.rows, piece.columns]
            target.copy_(piece.view)
        return out

    def files(self, key: str, index: tuple[int, ...] = ()) -> list[str]:
        """Names of the files that hold a part of entry ``index`` of a key."""
        boxes = self._boxes(key, len(index)).get(index, [])
        return sorted({self._spans[key, box.offsets].file for box in boxes})

    def close(self) -> None:
        """Forget all mapped files; views given out stay valid."""
        self._chunk.cache_clear()
        self._maps.clear()

    # --- metadata

    def _check_finished(self) -> None:
        marker = self.path / "metadata.json"
        if not marker.exists():
            raise CheckpointError(f"{marker} is missing: no torch_dist checkpoint, or saving it did not finish")
        try:
            said = json.loads(marker.read_text())
        except ValueError as reason:
            raise CheckpointError(f"{marker}: damaged: {reason}") from reason
        backend = said.get("sharded_backend") if isinstance(said, dict) else None
        if backend != "torch_dist":
            raise CheckpointError(f"{marker}: sharded_backend is {backend!r}; only torch_dist is read")

    def _read_metadata(self) -> None:
        if not self._metadata.exists():
            raise CheckpointError(f"{self._metadata} is missing")
        try:
            fields = read_pickle(self._metadata.read_bytes()).fields()
            for key, entry in fields["state_dict_metadata"].items():
                if entry.kind.endswith(".TensorStorageMetadata"):
                    self._add_tensor(key, entry.fields())
                else:
                    self._objects.add(key)
            for index, info in fields["storage_data"].items():
                self._add_span(index.fields(), info.fields())
        except CheckpointError:
            raise
        except (ValueError, KeyError, AttributeError, TypeError, IndexError) as reason:
            raise CheckpointError(f"{self._metadata}: damaged: {type(reason).__name__}: {reason}") from reason

    def _add_tensor(self, key: str, fields: dict[str, Any]) -> None:
        dtype = _properties(fields["properties"])
        boxes = []
        for chunk in fields["chunks"]:
            said = chunk.fields()
            boxes.append(Box(_ints(said["offsets"]), _ints(said["sizes"])))
        self._tensors[key] = (_ints(fields["size"]), dtype, boxes)

    def _add_span(self, index: dict[str, Any], info: dict[str, Any]) -> None:
        key, offsets = index["fqn"], index.get("offset")
        if info.get("transform_descriptors"):
            raise CheckpointError(f"{self._metadata}: {key} is stored with transforms, which are not read")
        file = str(info["relative_path"])
        if Path(file).name != file:
            raise CheckpointError(f"{self._metadata}: {key} lies in {file!r}, outside of the checkpoint")
        where = None if offsets is None or key in self._objects else _ints(offsets)
        self._spans[key, where] = Span(file, int(info["offset"]), int(info["length"]))

    def _check_files(self) -> None:
        """Every chunk has its bytes, in a file that is there and long enough, and shares them with no other chunk."""
        for key, (_, _, boxes) in self._tensors.items():
            for box in boxes:
                if (key, box.offsets) not in self._spans:
                    raise CheckpointError(f"{self._metadata}: {key}: chunk {box} is stored nowhere")
        for key in self._objects:
            if (key, None) not in self._spans:
                raise CheckpointError(f"{self._metadata}: {key} is stored nowhere")
        by_file: dict[str, list[tuple[int, int, str]]] = {}
        for (key, where), span in self._spans.items():
            self._check_length(span, key)
            if where is not None:
                by_file.setdefault(span.file, []).append((span.offset, span.length, key))
        for file, spans in by_file.items():
            spans.sort()
            for (offset, length, key), (following, _, other) in itertools.pairwise(spans):
                if offset + length > following:
                    raise CheckpointError(f"{self.path / file}: chunks of {key} and {other} share bytes")

    def _check_length(self, span: Span, key: str) -> None:
        size = self._size(span.file)
        if size is None:
            raise CheckpointError(f"{self.path / span.file} is missing; it holds a part of {key}")
        if span.offset < 0 or span.length <= 0 or span.offset + span.length > size:
            ends = span.offset + span.length
            raise CheckpointError(f"{self.path / span.file}: truncated: {size} bytes, but {key} ends at byte {ends}")

    def _size(self, file: str) -> int | None:
        if file not in self._sizes:
            path = self.path / file
            self._sizes[file] = path.stat().st_size if path.is_file() else None
        return self._sizes[file]

    # --- chunks

    def _known(self, key: str) -> tuple[tuple[int, ...], torch.dtype, list[Box]]:
        if key not in self._tensors:
            raise CheckpointError(f"{self._metadata}: {key} is missing")
        return self._tensors[key]

    def _boxes(self, key: str, leading: int) -> dict[tuple[int, ...], list[Box]]:
        """The chunks that hold a part of each entry, by the entry's ``leading`` indices."""
        if (key, leading) not in self._blocks:
            shape, _, boxes = self._known(key)
            if fault := fault_in_tiling(shape, boxes):
                raise CheckpointError(f"{self._metadata}: {key}: {fault}")
            by_index: dict[tuple[int, ...], list[Box]] = {}
            for box in sorted(boxes, key=lambda b: b.offsets):
                spans = [range(o, o + s) for o, s in zip(box.offsets[:leading], box.sizes, strict=False)]
                for index in itertools.product(*spans):
                    by_index.setdefault(index, []).append(box)
            self._blocks[key, leading] = by_index
        return self._blocks[key, leading]

    def _open_chunk(self, key: str, box: Box) -> Tensor:
        """The whole chunk as a view of the mapped file."""
        span = self._spans[key, box.offsets]
        mapped = self._map(span.file)
        where = f"{self.path / span.file}: {key} {box}"
        try:
            numbers = parse(_Window(mapped, span))
        except ValueError as reason:
            raise CheckpointError(f"{where}: damaged: {reason}") from reason
        dtype = self._tensors[key][1]
        if numbers.sizes != box.sizes or numbers.dtype != dtype:
            raise CheckpointError(f"{where} {dtype}: the file has shape {numbers.sizes}, {numbers.dtype} there")
        if numbers.whose not in (b"", whose(key, box.offsets)):
            raise CheckpointError(f"{where}: the file has another part there: {numbers.whose.decode(errors='replace')}")
        if self.check_crc and numbers.crc:
            self._check_crc(mapped, span, numbers, where)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            storage = torch.frombuffer(mapped, dtype=dtype, count=numbers.count, offset=span.offset + numbers.start)
        return storage.view(numbers.sizes)

    def _check_crc(self, mapped: mmap.mmap, span: Span, numbers: Numbers, where: str) -> None:
        start = span.offset + numbers.start
        with memoryview(mapped) as whole:
            with whole[start : start + numbers.count * numbers.dtype.itemsize] as data:
                found = zlib.crc32(data)
        if found != numbers.crc:
            raise CheckpointError(f"{where}: its numbers are damaged (checksum {found:08x}, not {numbers.crc:08x})")

    def _map(self, file: str) -> mmap.mmap:
        if file in self._maps:
            self._maps.move_to_end(file)
            return self._maps[file]
        descriptor = os.open(self.path / file, os.O_RDONLY)
        try:
            mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
        self._maps[file] = mapped
        if len(self._maps) > _OPEN_FILES:
            self._maps.popitem(last=False)  # views keep it mapped as long as they live
        return mapped


class _Window(io.RawIOBase):
    """A span of a mapped file as a file of its own."""

    def __init__(self, mapped: mmap.mmap, span: Span) -> None:
        self.mapped, self.span, self.at = mapped, span, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.span.length}[whence]
        if base + offset < 0:
            raise ValueError("not an archive")
        self.at = base + offset
        return self.at

    def read(self, count: int = -1) -> bytes:
        stop = self.span.length if count is None or count < 0 else min(self.at + count, self.span.length)
        data = self.mapped[self.span.offset + self.at : self.span.offset + max(stop, self.at)]
        self.at += len(data)
        return data


def _ints(values: Any) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or not all(isinstance(value, int) for value in values):
        raise ValueError(f"{values!r} is no shape")
    return tuple(values)


def _properties(properties: Record) -> torch.dtype:
    """TensorProperties: a tuple of state in newer torch, attributes in older."""
    state = properties.state
    dtype = state[0] if isinstance(state, tuple) and state else properties.fields().get("dtype")
    if not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor without dtype")
    return dtype
