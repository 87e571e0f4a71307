"""``megarl_manifest.json``: what a conversion wrote, with a hash of every tensor's bytes.

It lies beside the weights (in the Hugging Face directory, or in the iteration directory of a Megatron checkpoint). A
Hugging Face manifest lists the stored tensors; a Megatron one lists the canonical tensors of `megarl.weights.rules`,
vocabulary padding included. The hash is XXH3 of 128 bits, which runs at memory's speed (14 GB/s a core, where SHA-256
makes 1.4 and BLAKE2b 0.7): it finds damage, and does not keep out a forger.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash

from megarl import __version__
from megarl.model.family import ModelSpec
from megarl.weights.durable import write_durably
from megarl.weights.hf_files import CheckpointError

MANIFEST = "megarl_manifest.json"
Hash = xxhash.xxh3_128
_HASHED_AT_ONCE = 1 << 20
HF, MEGATRON = "huggingface", "megatron"


@dataclass(frozen=True)
class Entry:
    """One tensor as it lies in the checkpoint. ``dtype`` is torch's name for it."""

    shape: tuple[int, ...]
    dtype: str
    xxh3_128: str

    @property
    def nbytes(self) -> int:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return math.prod(self.shape) * dtype.itemsize

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"shape": list(self.shape)}


def entry_from(said: dict[str, Any]) -> Entry:
    """The inverse of `Entry.as_json`."""
    return Entry(tuple(said["shape"]), said["dtype"], said["xxh3_128"])


@dataclass(frozen=True)
class Manifest:
    """``source`` and ``options`` say where the checkpoint comes from, for a reader; only ``tensors`` is checked."""

    format: str
    model: dict[str, Any]
    source: str
    options: dict[str, Any]
    tensors: dict[str, Entry]
    tool: str = field(default=f"megarl {__version__}")

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())

    def write(self, folder: Path) -> None:
        write_durably(folder / MANIFEST, json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a checkpoint, None where there is none. Raises CheckpointError for one that does not parse."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        said = json.loads(path.read_text())
        entries = {name: entry_from(each) for name, each in said.pop("tensors").items()}
        return Manifest(tensors=entries, **said)
    except (ValueError, TypeError, KeyError, AttributeError) as reason:
        raise CheckpointError(f"{path}: is no manifest: {reason!r}") from reason


def describe(spec: ModelSpec) -> dict[str, Any]:
    """The sizes and switches of a model as JSON."""
    fields = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec) if f.name != "family"}
    plain = {name: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for name, v in fields.items()}
    return {"family": spec.family.name} | plain


def entry(tensor: torch.Tensor) -> Entry:
    """The entry of one whole contiguous tensor."""
    hashed = Hash(raw_bytes(tensor))
    return Entry(tuple(tensor.shape), dtype_name(tensor.dtype), hashed.hexdigest())


def entry_in_file(path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Entry:
    """The entry of a tensor in a file. Read, not mapped: every page of a map costs a fault."""
    hashed = Hash()
    left = math.prod(shape) * dtype.itemsize
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        buffer = memoryview(bytearray(min(left, _HASHED_AT_ONCE)))
        while left and (count := file.readinto(buffer[: min(left, len(buffer))])):
            hashed.update(buffer[:count])
            left -= count
    if left:
        raise CheckpointError(f"{path}: truncated: {left} bytes are missing")
    return Entry(shape, dtype_name(dtype), hashed.hexdigest())


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied. Hashing lets other threads run while it reads them."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
