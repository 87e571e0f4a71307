"""Checkpoints of every family for the converter's tests: a config.json, and random bits for weights.

No transformers needed: names and shapes are the rules', and any bits will do, NaNs among them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megarl.model.family import read_spec
from tests.test_rules import MODELS

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 37,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}
FAMILIES = sorted(MODELS)
CARRIED = {"generation_config.json": {"eos_token_id": 1}, "tokenizer_config.json": {"model_max_length": 64}}


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).squeeze(-1)


def make_hf(path: Path, family: str, dtype: torch.dtype = torch.bfloat16, files: int = 2, **changes: Any) -> Path:
    """A directory as the hub has it: sharded, with an index, a tokenizer's file, and MTP copies where the family keeps
    some."""
    path.mkdir(parents=True)
    config = SIZES | MODELS[family] | {"dtype": str(dtype).removeprefix("torch.")} | changes
    (path / "config.json").write_text(json.dumps(config))
    for name, content in CARRIED.items():
        (path / name).write_text(json.dumps(content))
    spec = read_spec(path)
    generator = torch.Generator().manual_seed(len(family))
    tensors: dict[str, torch.Tensor] = {}
    for tensor in spec.tensors():
        for name, shape in tensor.hf_shapes().items():
            if name not in tensors:
                own = torch.float32 if tensor.keep_fp32 else dtype
                tensors[name] = random_bits(shape, own, generator)
    for copy, original in spec.duplicates().items():
        tensors[copy] = tensors[original].clone()
    save_hf(path, tensors, files)
    return path


def save_hf(path: Path, tensors: dict[str, torch.Tensor], files: int = 2) -> None:
    names = sorted(tensors)
    shares = [names[k::files] for k in range(files)]
    of = {name: f"model-{k + 1:05d}-of-{files:05d}.safetensors" for k, share in enumerate(shares) for name in share}
    for share in shares:
        save_file({name: tensors[name] for name in share}, path / of[share[0]], metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": of}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def load_hf(path: Path) -> dict[str, torch.Tensor]:
    """All stored tensors of a directory, whatever the index says."""
    out = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            out |= {name: opened.get_tensor(name).clone() for name in opened.keys()}
    return out


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and tensor.shape == b[name].shape, name
        assert torch.equal(tensor.contiguous().view(torch.uint8), b[name].contiguous().view(torch.uint8)), name
