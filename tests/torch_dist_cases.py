"""A small torch_dist checkpoint for tests."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarl.convert.torch_dist_reader import TorchDistReader
from megarl.convert.torch_dist_writer import StoredTensor, TorchDistWriter

TENSORS = {"a.weight": torch.arange(60.0).view(12, 5), "b.bias": torch.arange(7, dtype=torch.bfloat16)}
TENSORS["stack"] = torch.arange(2 * 3 * 4 * 5, dtype=torch.bfloat16).view(2, 3, 4, 5)


def save(path: Path, tensors: dict[str, Tensor] = TENSORS, files: int = 1, **finish: Any) -> Path:
    """Write whole tensors in chunks of two rows."""
    declared = [StoredTensor(key, tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()]
    writer = TorchDistWriter(path, declared)
    opened = [writer.chunk_file(number) for number in range(files)]
    count = 0
    for key, tensor in tensors.items():
        for start in range(0, tensor.shape[0], 2):
            part = tensor[start : start + 2]
            opened[count % files].write(key, (start, *[0] * (tensor.dim() - 1)), part.shape, part)
            count += 1
    return writer.finish([file.finish() for file in opened], {"iteration": 3}, **finish)


def change_metadata(folder: Path, change: Callable[[Any], None]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def read_all(folder: Path) -> dict[str, Tensor]:
    reader = TorchDistReader(folder)
    out = {}
    for key, (shape, _) in reader.keys().items():
        leading = [range(n) for n in shape[:-2]]
        entries = [()] if not leading else [(i, j) for i in leading[0] for j in leading[1]]
        out[key] = torch.stack([reader.read(key, index) for index in entries]).view(shape)
    return out
