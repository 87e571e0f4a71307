"""Hugging Face checkpoint directories, written in place: every file's header and every tensor's place are known before
a byte moves.

Files are allocated at their final size, so several processes may fill disjoint blocks of any tensor, in any order,
without holding more than the block::

    directory = HFDirectory("out", plan_files(tensors))
    directory.begin()                                  # one process: `out.incomplete` with all files, empty
    file = directory.files[k].open(directory.partial)  # any process
    file.write(segment, block)                         # `megarl.weights.shard.Segment`; or `write_whole`
    file.finish()                                      # everything of it on disk
    directory.finish(carry_from=source)                # one process, when all others have: index, config, then the name

The directory has its name only when all of it is on disk. Sizes are in bytes.
Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megarl.weights.durable import put_in_place, sync, unfinished
from megarl.weights.hf_files import DTYPES, INDEX, SINGLE, CheckpointError, carried_files, read_json
from megarl.weights.quantized import (
    BLOCK,
    FP8,
    SCALE_SUFFIX,
    fp8_config,
    is_quantised,
    quantize_fp8_block,
    scale_shape,
)
from megarl.weights.shard import Segment

_WRITE_BEHIND = 1 << 20
# Bytes a write call: for longer ones Linux looks for large pages of cache, at several times the cost of the copy.
WRITTEN_AT_ONCE = 1 << 20
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class HFTensor:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PlannedFile:
    """A safetensors file before it exists. Its tensors lie one after the other, wider dtypes first, so that each is
    aligned to its dtype."""

    name: str
    tensors: tuple[HFTensor, ...]

    @cached_property
    def header(self) -> bytes:
        at = 0
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for tensor in self.tensors:
            span = [at, at + tensor.nbytes]
            entries[tensor.name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
            at += tensor.nbytes
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
        return len(text).to_bytes(8, "little") + text

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Where each tensor begins, from the beginning of the file."""
        at, out = len(self.header), {}
        for tensor in self.tensors:
            out[tensor.name] = at
            at += tensor.nbytes
        return out

    @cached_property
    def nbytes(self) -> int:
        """Of the whole file."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)

    def create(self, folder: str | Path) -> OpenFile:
        """Make the file, header written and disk space taken, and open it. Raises OSError where the disk is too
        small."""
        path = Path(folder) / self.name
        partial = path.with_name(self.name + ".new")  # never under its name without its header
        with partial.open("wb") as file:
            # Taken now: a mapped page that finds no room on the disk later would kill the process.
            os.posix_fallocate(file.fileno(), 0, self.nbytes)
            file.write(self.header)
        os.rename(partial, path)
        return self.open(folder)

    def open(self, folder: str | Path) -> OpenFile:
        """Open the file that `create` made, here or in another process. Raises CheckpointError if it is another."""
        return OpenFile(self, self.check(folder))

    def check(self, folder: str | Path) -> Path:
        """Where `create` made the file. Raises CheckpointError if it is another, or not there."""
        path = Path(folder) / self.name
        try:
            with path.open("rb") as file:
                header, size = file.read(len(self.header)), os.fstat(file.fileno()).st_size
        except FileNotFoundError as reason:
            raise CheckpointError(f"{path}: the file to be filled is not there") from reason
        if header != self.header or size != self.nbytes:
            raise CheckpointError(f"{path}: not the file that was planned; remove it and begin again")
        return path


class OpenFile:
    """A file being filled, by this process and perhaps others."""

    def __init__(self, plan: PlannedFile, path: Path) -> None:
        self.path = path
        self._plan = {tensor.name: tensor for tensor in plan.tensors}
        self._offsets = plan.offsets
        self._nbytes = plan.nbytes
        self._descriptor = os.open(path, os.O_RDWR)
        self._mapped: torch.Tensor | None = None

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as a view of the mapped file: what is copied into it is in the file. Not to be kept after
        `finish`. `write` is faster."""
        if self._mapped is None:
            storage = torch.UntypedStorage.from_file(str(self.path), shared=True, nbytes=self._nbytes)  # type: ignore[arg-type]
            self._mapped = torch.empty(0, dtype=torch.uint8).set_(storage)
        planned, at = self._plan[name], self._offsets[name]
        return self._mapped[at : at + planned.nbytes].view(planned.dtype).view(planned.shape)

    def write(self, segment: Segment, block: torch.Tensor) -> None:
        """Put a block in its place, ``segment.view`` of the tensor, in the tensor's dtype. Raises ValueError for
        another shape."""
        planned = self._plan[segment.hf]
        place = segment.view(torch.empty(planned.shape, dtype=planned.dtype, device="meta"))
        if place.shape != block.shape:
            raise ValueError(f"{self.path}: {segment} is {tuple(place.shape)}, the block {tuple(block.shape)}")
        if place.is_contiguous():
            # A write call, not the map, which is several times slower: every page of it faults.
            at = self._offsets[segment.hf] + place.storage_offset() * place.element_size()
            self._put(block.to("cpu", place.dtype).contiguous(), at)
        else:
            segment.view(self.tensor(segment.hf)).copy_(block)

    def write_fp8(self, name: str, row: int, block: torch.Tensor) -> None:
        """Quantise whole rows ``[rows, columns]`` of a weight from row ``row`` on, and put values and scales in their
        places. ``row`` is a multiple of 128, and so is the number of rows, unless they are the last."""
        rows = self._plan[name].shape[0]
        end = row + block.shape[0]
        if row % BLOCK[0] or (end % BLOCK[0] and end != rows):
            raise ValueError(f"{self.path}: rows {row} to {end} of {name} are not whole blocks of {BLOCK[0]}")
        try:
            q, scales = quantize_fp8_block(block)
        except ValueError as reason:
            raise CheckpointError(f"{self.path}: tensor {name}, from row {row}: {reason}") from reason
        first = row // BLOCK[0]
        self._write_rows(name, row, q)
        self._write_rows(name + SCALE_SUFFIX, first, scales)

    def write_whole(self, name: str, tensor: torch.Tensor) -> None:
        """Put a whole tensor in its place, in the planned dtype. Raises ValueError for another shape."""
        if tuple(tensor.shape) != self._plan[name].shape:
            raise ValueError(f"{self.path}: {name} is {self._plan[name].shape}, not {tuple(tensor.shape)}")
        self._put(tensor.to("cpu", self._plan[name].dtype).contiguous(), self._offsets[name])

    def _write_rows(self, name: str, row: int, rows: torch.Tensor) -> None:
        where = slice(row, row + rows.shape[0])
        self.write(Segment(name, where, slice(0, rows.shape[0]), slice(0, rows.shape[1])), rows)

    def _put(self, block: torch.Tensor, at: int) -> None:
        data = memoryview(block.view(-1).view(torch.uint8).numpy())
        nbytes, start = len(data), at
        while data:
            done = os.pwrite(self._descriptor, data[:WRITTEN_AT_ONCE], at)
            data, at = data[done:], at + done
        if nbytes >= _WRITE_BEHIND:
            # On Linux this starts writing the range to disk and does not wait: the disk works while we read on.
            os.posix_fadvise(self._descriptor, start, nbytes, os.POSIX_FADV_DONTNEED)

    def sync(self) -> None:
        """Returns when what was filled so far, here and by others, is on disk. Raises OSError where the disk
        failed."""
        os.fsync(self._descriptor)

    def finish(self) -> None:
        """`sync`, and let go of the file."""
        try:
            self.sync()
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the file, which may not be on the disk yet."""
        self._mapped = None
        os.close(self._descriptor)


def plan_files(tensors: Iterable[HFTensor], max_file_bytes: int = 5 << 30) -> list[PlannedFile]:
    """Whole files of at most ``max_file_bytes`` of data, in the order given; a larger tensor has a file of its own.

    Raises ValueError for no tensors, for a name given twice and for a dtype that safetensors does not have.
    """
    groups: list[list[HFTensor]] = []
    free = 0
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise ValueError(f"tensor {tensor.name} is to be written twice")
        if tensor.dtype not in _NAMES:
            raise ValueError(f"tensor {tensor.name}: safetensors cannot hold {tensor.dtype}")
        seen.add(tensor.name)
        if not groups or tensor.nbytes > free:
            groups.append([])
            free = max_file_bytes
        groups[-1].append(tensor)
        free -= tensor.nbytes
    if not groups:
        raise ValueError("no tensors to be written")
    count = len(groups)
    names = [SINGLE] if count == 1 else [f"model-{k + 1:05d}-of-{count:05d}.safetensors" for k in range(count)]
    aligned = (tuple(sorted(group, key=lambda tensor: -tensor.dtype.itemsize)) for group in groups)
    return [PlannedFile(name, group) for name, group in zip(names, aligned, strict=True)]


def as_fp8(tensors: Iterable[HFTensor]) -> list[HFTensor]:
    """The same tensors as an FP8 checkpoint has them: of every quantised weight its e4m3 values and its scales."""
    out = []
    for tensor in tensors:
        if is_quantised(tensor.name, tensor.shape):
            out.append(HFTensor(tensor.name, tensor.shape, FP8))
            out.append(HFTensor(tensor.name + SCALE_SUFFIX, scale_shape(tensor.shape), torch.float32))
        else:
            out.append(tensor)
    return out


def create_files(folder: Path, files: list[PlannedFile], resume: bool = False) -> None:
    """Create all files in a folder. With ``resume``, those that an interrupted run left are kept; raises
    CheckpointError where they are not the planned ones."""
    planned = {file.name for file in files}
    for path in folder.glob("*.safetensors"):
        if not resume or path.name not in planned:
            raise CheckpointError(f"{path}: left by a run with another plan; remove it and begin again")
    for file in files:
        if (folder / file.name).exists():
            file.check(folder)
        else:
            file.create(folder).close()


def write_metadata(
    folder: Path, files: list[PlannedFile], carry_from: str | Path, config_changes: dict[str, Any] | None = None
) -> None:
    """The files beside the weights: the index, and config and tokenizer files from the checkpoint ``carry_from``.

    config.json says the dtype and the quantisation of what was written, whatever its source was; ``config_changes`` go
    on top, and None removes a key. Everything in ``folder`` is on disk when this returns. Raises CheckpointError for a
    planned file that is not there.
    """
    tensors = [tensor for file in files for tensor in file.tensors]
    for file in files:
        file.check(folder)
    if len(files) > 1:
        weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
        total = sum(tensor.nbytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / INDEX, index)
    for path in carried_files(carry_from):
        shutil.copyfile(path, folder / path.name)
    changes = config_changes or {}
    config = _described(read_json(folder / "config.json"), tensors) | changes
    removed = {key for key, value in changes.items() if value is None}
    _write_json(folder / "config.json", {key: value for key, value in config.items() if key not in removed})
    for path in [*folder.iterdir(), folder]:
        sync(path)


def _described(config: dict[str, Any], tensors: list[HFTensor]) -> dict[str, Any]:
    """The config with the dtype and quantisation that the tensors have: readers take both from it."""
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    plain = [t for t in tensors if t.dtype != FP8 and not t.name.endswith(SCALE_SUFFIX)]
    nbytes: Counter[torch.dtype] = Counter()
    for tensor in plain:
        if tensor.dtype.is_floating_point:
            nbytes[tensor.dtype] += tensor.nbytes
    ((dtype, _),) = nbytes.most_common(1) or [(torch.bfloat16, 0)]
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")  # old, new name
    if len(plain) < len(tensors):
        linear = (t.name for t in plain if len(t.shape) == 2 and not t.name.endswith("embed_tokens.weight"))
        config["quantization_config"] = fp8_config(linear)
    return config


class HFDirectory:
    """A checkpoint directory being written: ``<name>.incomplete`` until it is finished."""

    def __init__(self, path: str | Path, files: list[PlannedFile], overwrite: bool = False) -> None:
        """Raises FileExistsError where ``path`` exists, unless it is to be replaced at the end."""
        self.path = Path(path)
        self.files = files
        self.overwrite = overwrite
        self.partial = unfinished(self.path)
        self._check_target()

    def _check_target(self) -> None:
        if os.path.lexists(self.path) and not self.overwrite:
            raise FileExistsError(f"{self.path} exists; remove it or ask for it to be overwritten")

    def begin(self) -> None:
        """Create all files, in place of what an interrupted run left."""
        if self.partial.exists():
            shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True)
        create_files(self.partial, self.files)

    def finish(self, carry_from: str | Path, config_changes: dict[str, Any] | None = None) -> None:
        """`write_metadata`, then give the directory its name. Every file must have been filled and finished."""
        self._check_target()
        write_metadata(self.partial, self.files, carry_from, config_changes)
        put_in_place(self.partial, self.path)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
