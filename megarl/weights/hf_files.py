"""Hugging Face checkpoint directories: safetensors read by slices, and written as a stream of whole files.

Nothing is unpickled: ``.bin`` checkpoints are refused. An index cannot point outside its directory.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# What travels with the weights: everything a tokenizer or vLLM reads, and no weights.
_CARRIED_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")


class CheckpointError(ValueError):
    """A checkpoint that is not what it says, with the file or tensor that is wrong."""


class HFCheckpoint:
    """A directory of safetensors. Tensors are read by slices: only the bytes asked for are touched."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file_of = self._index()
        self._open: dict[Path, safe_open] = {}

    def _index(self) -> dict[str, Path]:
        index = self.path / _INDEX
        if index.exists():
            named = json.loads(index.read_text())["weight_map"]
            return {name: self._inside(file) for name, file in named.items()}
        single = self.path / _SINGLE
        if not single.exists():
            raise CheckpointError(f"{self.path}: neither {_INDEX} nor {_SINGLE} is there (only safetensors are read)")
        with safe_open(single, "pt") as file:
            return dict.fromkeys(file.keys(), single)

    def _inside(self, file: str) -> Path:
        path = (self.path / file).resolve()
        if self.path.resolve() not in path.parents:
            raise CheckpointError(f"{self.path / _INDEX}: {file!r} lies outside the checkpoint")
        return path

    def names(self) -> set[str]:
        return set(self._file_of)

    def _slice_of(self, name: str):
        if name not in self._file_of:
            raise CheckpointError(f"{self.path}: tensor {name} is missing")
        file = self._file_of[name]
        try:
            if file not in self._open:
                self._open[file] = safe_open(file, "pt")
            return self._open[file].get_slice(name)
        except (SafetensorError, FileNotFoundError) as reason:
            raise CheckpointError(f"{file}: cannot read tensor {name}: {reason}") from reason

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice_of(name).get_shape())

    def read(self, name: str, rows: slice, columns: slice | None = None) -> torch.Tensor:
        """A block of a tensor as a view of the mapped file: copy it, do not keep it."""
        stored = self._slice_of(name)
        return stored[rows] if columns is None else stored[rows, columns]

    def close(self) -> None:
        self._open.clear()


class HFWriter:
    """Writes tensors into ``model-0000k.safetensors`` files of bounded size and, last, a correct index.

    The directory appears under its name only when all of it is written: until then it is ``<name>.incomplete``.
    """

    def __init__(self, path: str | Path, max_file_bytes: int = 5 << 30) -> None:
        self.path = Path(path)
        self.max_file_bytes = max_file_bytes
        self._partial = self.path.with_name(self.path.name + ".incomplete")
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._files: list[list[str]] = []
        self._total_bytes = 0
        self._dtype: torch.dtype | None = None

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_file_bytes:
            self._flush()
        self._pending[name] = tensor.detach().to("cpu").contiguous()
        self._pending_bytes += size
        self._dtype = tensor.dtype

    def _say_dtype(self) -> None:
        """Readers take the dtype from config.json, which may come from a checkpoint in another one."""
        path = self._partial / "config.json"
        config = json.loads(path.read_text())
        key = "torch_dtype" if "torch_dtype" in config else "dtype"  # the older and the newer transformers' name
        config[key] = str(self._dtype).removeprefix("torch.")
        path.write_text(json.dumps(config, indent=2) + "\n")

    def _flush(self) -> None:
        save_file(self._pending, self._partial / f"part-{len(self._files)}", metadata={"format": "pt"})
        self._files.append(list(self._pending))
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def finish(self, carry_from: str | Path) -> None:
        """Write the last file and the index, carry config and tokenizer files over from ``carry_from``, and rename."""
        if self._pending:
            self._flush()
        count = len(self._files)
        weight_map = {}
        for k, names in enumerate(self._files):
            file = _SINGLE if count == 1 else f"model-{k + 1:05d}-of-{count:05d}.safetensors"
            os.rename(self._partial / f"part-{k}", self._partial / file)
            weight_map.update(dict.fromkeys(names, file))
        if count > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (self._partial / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
        for file in sorted(Path(carry_from).iterdir()):
            if file.is_file() and file.suffix in _CARRIED_SUFFIXES and not file.name.endswith("index.json"):
                shutil.copyfile(file, self._partial / file.name)
        self._say_dtype()
        if self.path.exists():
            shutil.rmtree(self.path)
        os.rename(self._partial, self.path)
