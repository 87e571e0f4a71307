"""Hugging Face checkpoint directories, read by blocks: safetensors of any dtype, FP8 and MXFP4 as bf16.

Opening a directory reads and checks every header, so that whatever is wrong with the files is said, naming file and
tensor, before anything is made of them. What no header can show is a flipped bit in the data itself: that takes hashes.
Names are logical: ``X.weight`` stands for itself and ``X.weight_scale_inv``, ``P`` for ``P_blocks`` and ``P_scales``.
Nothing is unpickled: ``.bin`` checkpoints are refused. An index cannot point outside its directory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megarl.weights.quantized import (
    BLOCK,
    FP8,
    MXFP4_GROUP,
    SCALE_SUFFIX,
    dequantize_fp8_block,
    dequantize_mxfp4,
    scale_shape,
)
from megarl.weights.shard import Segment

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What travels with the weights: everything a tokenizer or vLLM reads, and no weights.
_CARRIED_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")
# Mistral's repositories hold the same weights a second time, in Mistral's own layout.
_OTHER_LAYOUT = "consolidated*.safetensors"
_OWN = "megarl_*"  # what we say about one directory, such as its manifest, is not true of another
_MAX_HEADER = 100_000_000  # the safetensors library's own bound
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class CheckpointError(ValueError):
    """A checkpoint that is not what it says, with the file or tensor that is wrong."""


@dataclass(frozen=True)
class Stored:
    """A tensor as a file holds it. ``offset`` counts from the beginning of the file."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Logical:
    """A tensor as the model knows it: ``parts`` are one stored tensor, or values and scales with how they combine."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Stored, ...]
    fp8_block: tuple[int, int] | None = None


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, by name. Raises CheckpointError for a file that is not whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise CheckpointError(f"{path}: truncated or damaged: {size} bytes, with a header of {length}")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        stored = [_entry(path, name, entry, 8 + length) for name, entry in header.items()]
    except CheckpointError:
        raise
    except (ValueError, AttributeError) as reason:
        raise CheckpointError(f"{path}: damaged header: {reason}") from reason
    _check_offsets(path, stored, 8 + length, size)
    return {tensor.name: tensor for tensor in stored}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"twice in one file: {next(name for name in names if names.count(name) > 1)}")
    return out


def _entry(path: Path, name: str, entry: Any, data: int) -> Stored:
    """One entry of a header, whose data begins at byte ``data``."""
    problem = f"{path}: damaged header: tensor {name}: {entry}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(problem)
    numbers = [*entry["shape"], *entry["data_offsets"]]
    if len(entry["data_offsets"]) != 2 or not all(type(n) is int and n >= 0 for n in numbers):
        raise CheckpointError(problem)
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(f"{path}: tensor {name}: dtype {entry['dtype']!r} is not one that is read")
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{problem}: {stop - start} bytes are not that shape and dtype's")
    return Stored(name, path, dtype, shape, data + start, stop - start)


def _check_offsets(path: Path, stored: list[Stored], data: int, size: int) -> None:
    at = data
    for tensor in sorted(stored, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != at:
            raise CheckpointError(f"{path}: damaged header: tensor {tensor.name} is at {tensor.offset}, not at {at}")
        at += tensor.nbytes
        if at > size:
            raise CheckpointError(f"{path}: truncated: tensor {tensor.name} ends at byte {at} of a file of {size}")
    if at < size:
        raise CheckpointError(f"{path}: {size - at} bytes after the last tensor belong to none")


def carried_files(path: str | Path) -> list[Path]:
    """The files beside the weights that go where the weights go: config, generation config, tokenizer, custom code."""
    files = (file for file in Path(path).iterdir() if file.is_file() and file.suffix in _CARRIED_SUFFIXES)
    return sorted(file for file in files if not file.name.endswith("index.json") and not file.match(_OWN))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError naming the file where it is missing, damaged or something else."""
    try:
        value = json.loads(path.read_text(), object_pairs_hook=_unique)
    except (OSError, ValueError) as reason:
        raise CheckpointError(f"{path}: cannot be read: {reason}") from reason
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value


class HFCheckpoint:
    """A directory of safetensors. Tensors are read by blocks: only the bytes asked for are touched."""

    def __init__(self, path: str | Path) -> None:
        """Raises CheckpointError for a missing, truncated, damaged or unindexed file, and for a tensor that is missing,
        in two files, or without its scales."""
        self.path = Path(path)
        self._stored = self._scan()
        self._logical = dict(self._combine(self._stored))
        self._open: dict[Path, safe_open] = {}

    def check(self) -> None:
        """Read all headers again. Raises CheckpointError where files have changed since they were opened."""
        if self._scan() != self._stored:
            raise CheckpointError(f"{self.path}: its files have changed while they were read")

    def names(self) -> set[str]:
        return set(self._logical)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Of what `read` gives: bf16 for FP8 and MXFP4."""
        return self._tensor(name).dtype

    def nbytes(self, name: str) -> int:
        """Of the tensor as `read` gives it."""
        tensor = self._tensor(name)
        return math.prod(tensor.shape) * tensor.dtype.itemsize

    def stored(self, name: str) -> tuple[Stored, ...]:
        """What the files hold of the tensor, and where: one tensor, or values and scales."""
        return self._tensor(name).parts

    def config(self) -> dict[str, Any]:
        return read_json(self.path / "config.json")

    def carried_files(self) -> list[Path]:
        return carried_files(self.path)

    def read(self, segment: Segment) -> torch.Tensor:
        """``segment.view`` of the tensor: a view of the mapped file, to be copied and not kept, where nothing has to be
        computed; otherwise the block's values, for which only its bytes and the scales that cover them are read."""
        tensor = self._tensor(segment.hf)
        _check_inside(self.path, segment, tensor.shape)
        try:
            if tensor.fp8_block is not None:
                return self._read_fp8(tensor, segment)
            if len(tensor.parts) == 2:
                return self._read_mxfp4(tensor, segment)
        except ValueError as reason:
            raise CheckpointError(f"{tensor.parts[0].file}: tensor {segment.hf}: {reason}") from reason
        return segment.view(self._mapped(tensor.parts[0]))

    def whole(self, name: str) -> torch.Tensor:
        """The whole tensor; of stacked MXFP4 experts that is large."""
        tensor = self._tensor(name)
        if len(tensor.parts) == 1:
            return self._mapped(tensor.parts[0])
        rows, columns = tensor.shape[-2:]
        stack = range(tensor.shape[0]) if len(tensor.shape) == 3 else [None]
        blocks = [self.read(Segment(name, slice(0, rows), slice(0, rows), slice(0, columns), e)) for e in stack]
        return blocks[0] if len(tensor.shape) == 2 else torch.stack(blocks)

    def close(self) -> None:
        self._open.clear()

    def _tensor(self, name: str) -> Logical:
        if name not in self._logical:
            raise CheckpointError(f"{self.path}: tensor {name} is missing")
        return self._logical[name]

    def _mapped(self, stored: Stored) -> torch.Tensor:
        try:
            if stored.file not in self._open:
                self._open[stored.file] = safe_open(stored.file, "pt")
            return self._open[stored.file].get_tensor(stored.name)
        except (SafetensorError, OSError) as reason:
            raise CheckpointError(f"{stored.file}: cannot read tensor {stored.name}: {reason}") from reason

    def _read_fp8(self, tensor: Logical, segment: Segment) -> torch.Tensor:
        assert tensor.fp8_block is not None
        rows, columns = segment.hf_rows, segment.columns or slice(0, tensor.shape[1])
        whole = slice(rows.start, rows.stop)
        q, scale_inv = (self._mapped(part) for part in tensor.parts)
        if segment.transposed:
            block = dequantize_fp8_block(q, scale_inv, tensor.fp8_block, columns, whole).T
        else:
            block = dequantize_fp8_block(q, scale_inv, tensor.fp8_block, whole, columns)
        return block[:: rows.step]

    def _read_mxfp4(self, tensor: Logical, segment: Segment) -> torch.Tensor:
        """A stored row is a logical column: experts ``[out, in]`` on disk stand for ``[in, out]``."""
        assert segment.index is not None, segment
        blocks, scales = (self._mapped(part)[segment.index] for part in tensor.parts)
        columns = segment.columns or slice(0, tensor.shape[1 if segment.transposed else 2])
        outs, ins = (segment.hf_rows, columns) if segment.transposed else (columns, segment.hf_rows)
        first = ins.start // MXFP4_GROUP
        groups = slice(first, -(-ins.stop // MXFP4_GROUP))
        values = dequantize_mxfp4(blocks[outs, groups], scales[outs, groups])
        start = first * MXFP4_GROUP
        values = values[:, ins.start - start : ins.stop - start : ins.step]
        return values if segment.transposed else values.T

    def _scan(self) -> dict[str, Stored]:
        """Every stored tensor, by name."""
        present = sorted(self.path.glob("*.safetensors"))
        index = self.path / INDEX
        if not index.exists():
            return self._single(present)
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{index}: damaged: no weight_map of tensor names to file names")
        files = [self._inside(file) for file in sorted(set(weight_map.values()))]
        for file in present:
            if file not in files and not file.match(_OTHER_LAYOUT) and read_header(file):
                raise CheckpointError(f"{file}: holds tensors, but {INDEX} does not name it; which are the weights?")
        stored: dict[str, Stored] = {}
        for file in files:
            if not file.is_file():
                lost = min(name for name, its in weight_map.items() if its == file.name)
                raise CheckpointError(f"{file}: missing, though {INDEX} names it as the file of {lost}")
            for name, tensor in read_header(file).items():
                if name in stored:
                    raise CheckpointError(f"{file}: tensor {name} is in {stored[name].file.name} too")
                stored[name] = tensor
        for name in sorted(stored.keys() | weight_map.keys()):
            file = self.path / weight_map.get(name, "")
            if name not in weight_map:
                raise CheckpointError(f"{index}: tensor {name} of {stored[name].file.name} is not in the index")
            if name not in stored or stored[name].file != file:
                raise CheckpointError(f"{file}: tensor {name} is not there, though {INDEX} says so")
        return stored

    def _single(self, present: list[Path]) -> dict[str, Stored]:
        single = self.path / SINGLE
        if single not in present:
            raise CheckpointError(f"{self.path}: neither {INDEX} nor {SINGLE} is there (only safetensors are read)")
        for file in present:
            if file != single and not file.match(_OTHER_LAYOUT) and read_header(file):
                raise CheckpointError(
                    f"{file}: holds tensors beside {SINGLE}, and no {INDEX} says which are the weights"
                )
        return read_header(single)

    def _inside(self, file: str) -> Path:
        """The index names files of its directory only. (They may be links: the hub's cache consists of them.)"""
        path = PurePosixPath(file)
        if path.is_absolute() or ".." in path.parts:
            raise CheckpointError(f"{self.path / INDEX}: {file!r} lies outside the checkpoint")
        return self.path / path

    def _combine(self, stored: dict[str, Stored]) -> Iterator[tuple[str, Logical]]:
        """Logical tensors: values joined with their scales."""
        for name, tensor in stored.items():
            if name.endswith(SCALE_SUFFIX):
                self._partner(stored, tensor, name.removesuffix(SCALE_SUFFIX), FP8)
            elif tensor.dtype == FP8:
                yield name, self._fp8(tensor, self._partner(stored, tensor, name + SCALE_SUFFIX, None))
            elif name.endswith("_blocks") and tensor.dtype == torch.uint8:
                base = name.removesuffix("_blocks")
                yield base, _mxfp4(tensor, self._partner(stored, tensor, base + "_scales", torch.uint8))
            elif name.endswith("_scales") and tensor.dtype == torch.uint8:
                self._partner(stored, tensor, name.removesuffix("_scales") + "_blocks", torch.uint8)
            else:
                yield name, Logical(tensor.shape, tensor.dtype, (tensor,))

    def _partner(self, stored: dict[str, Stored], tensor: Stored, name: str, dtype: torch.dtype | None) -> Stored:
        if name not in stored:
            raise CheckpointError(f"{tensor.file}: tensor {tensor.name} without {name}, which is in no file")
        if dtype is not None and stored[name].dtype != dtype:
            raise CheckpointError(f"{stored[name].file}: tensor {name} is {stored[name].dtype}, though it has scales")
        return stored[name]

    def _fp8(self, tensor: Stored, scale: Stored) -> Logical:
        block = (self.config().get("quantization_config") or {}).get("weight_block_size")
        if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
            raise CheckpointError(
                f"{self.path / 'config.json'}: quantization_config.weight_block_size is {block}; tensor {tensor.name} "
                f"of {tensor.file.name} is FP8, which is read in blocks such as {list(BLOCK)}"
            )
        size = (block[0], block[1])
        if len(tensor.shape) != 2 or scale.shape != scale_shape(tensor.shape, size):
            raise CheckpointError(
                f"{scale.file}: tensor {scale.name} has shape {scale.shape}; {tensor.name} is {tensor.shape} in blocks "
                f"of {size}"
            )
        return Logical(tensor.shape, torch.bfloat16, (tensor, scale), size)


def _mxfp4(blocks: Stored, scales: Stored) -> Logical:
    if len(blocks.shape) != 4 or blocks.shape[3] * 2 != MXFP4_GROUP or blocks.shape[:3] != scales.shape:
        raise CheckpointError(
            f"{blocks.file}: tensor {blocks.name} has shape {blocks.shape} and {scales.name} {scales.shape}, where "
            "[experts, rows, groups, 16] and [experts, rows, groups] are read"
        )
    experts, rows, groups, _ = blocks.shape
    return Logical((experts, groups * MXFP4_GROUP, rows), torch.bfloat16, (blocks, scales))


def _check_inside(path: Path, segment: Segment, shape: tuple[int, ...]) -> None:
    """A slice past the end would be cut short without a word."""
    matrix = shape if segment.index is None else shape[1:]
    ends = [segment.hf_rows.stop] + ([] if segment.columns is None else [segment.columns.stop])
    sizes = matrix[::-1] if segment.transposed else matrix
    past = segment.index is not None and segment.index >= shape[0]
    if past or any(end > size for end, size in zip(ends, sizes, strict=False)):
        raise CheckpointError(f"{path}: tensor {segment.hf} of shape {shape} has no block {segment}")
