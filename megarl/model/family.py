"""Model families. A family is one literal in one file under ``families/``: which HF architectures it serves, how their
config.json reads, and the list of weight rules. Adding one is adding a file and its line in `FAMILIES` below.

This module needs neither torch nor megatron: configs are checked, and conversions planned, without them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarl.weights.rules import CanonTensor, Rule, compile_rules


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of a model, as its config.json has it (transformers' ``rope_parameters``)."""

    theta: float
    type: str = "default"  # default | linear | llama3
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class ModelSpec:
    """The sizes and switches of one model, in megatron's names, read from its config.json."""

    family: Family
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    layernorm_epsilon: float
    tied: bool  # the LM head is the embedding
    rope: Rope
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    sliding_window: int | None = None  # keys a query sees, itself included

    def tensors(self) -> list[CanonTensor]:
        """Every weight, static, in streaming order."""
        rules = [r for r in self.family.weights if not (self.tied and r.mcore == OUTPUT_LAYER)]
        return compile_rules(tuple(rules), self)


OUTPUT_LAYER = "output_layer.weight"
EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Family:
    """One literal a family: see ``families/``."""

    name: str
    hf_architectures: tuple[str, ...]
    config: Callable[[dict[str, Any]], dict[str, Any]]  # config.json -> fields of ModelSpec
    weights: tuple[Rule, ...]
    ignored_hf: tuple[str, ...] = ()  # endings of HF names that hold no weight


class UnsupportedModel(ValueError):
    """The checkpoint's config.json asks for something no family here computes."""


def families() -> tuple[Family, ...]:
    from megarl.model.families import llama, mistral, qwen2, qwen3

    return (llama.FAMILY, mistral.FAMILY, qwen2.FAMILY, qwen3.FAMILY)


def supported_architectures() -> list[str]:
    """HF ``architectures`` that some family serves."""
    return [name for family in families() for name in family.hf_architectures]


def read_spec(model_path: str | Path) -> ModelSpec:
    """Read ``config.json`` of an HF directory.

    Raises FileNotFoundError without one, UnsupportedModel where no family computes what it asks for.
    """
    path = Path(model_path) / "config.json"
    hf = json.loads(path.read_text())
    wanted = hf.get("architectures") or ["(none)"]
    for family in families():
        if wanted[0] in family.hf_architectures:
            try:
                return ModelSpec(family=family, **family.config(hf))
            except KeyError as missing:
                raise UnsupportedModel(f"{path}: {missing} is missing") from missing
            except UnsupportedModel as reason:
                raise UnsupportedModel(f"{path}: {reason}") from None
    known = ", ".join(supported_architectures())
    raise UnsupportedModel(f"{path}: architecture {wanted[0]} is not supported; these are: {known}")


def dense_decoder(hf: dict[str, Any]) -> dict[str, Any]:
    """Fields that all dense decoders share; families add their differences with ``|``."""
    if hf.get("hidden_act", "silu") != "silu":
        raise UnsupportedModel(f"hidden_act {hf['hidden_act']!r}: only silu (SwiGLU) is computed")
    if hf.get("mlp_bias"):
        raise UnsupportedModel("mlp_bias: biases in the MLP are not computed")
    heads = hf["num_attention_heads"]
    return {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "ffn_hidden_size": hf["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": hf.get("num_key_value_heads") or heads,
        "kv_channels": hf.get("head_dim") or hf["hidden_size"] // heads,
        "vocab_size": hf["vocab_size"],
        "max_position_embeddings": hf["max_position_embeddings"],
        "layernorm_epsilon": hf["rms_norm_eps"],
        "tied": bool(hf.get("tie_word_embeddings", False)),
        "rope": read_rope(hf),
    }


def no_attention_bias(hf: dict[str, Any]) -> dict[str, Any]:
    """For families whose config.json may ask for attention biases, which also puts one on the output projection."""
    if hf.get("attention_bias"):
        raise UnsupportedModel("attention_bias: biases on every attention projection are not computed")
    return {}


def read_rope(hf: dict[str, Any]) -> Rope:
    """Both spellings of config.json: ``rope_parameters`` (transformers 5) and ``rope_theta`` with ``rope_scaling``."""
    said = hf.get("rope_parameters") or {}
    scaling = said or hf.get("rope_scaling") or {}
    theta = float(said.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if float(scaling.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UnsupportedModel("partial_rotary_factor: rotary embedding of a part of the head is not computed")
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, float(scaling["factor"]))
    if kind == "llama3":
        low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
        return Rope(theta, kind, float(scaling["factor"]), low, high, int(scaling["original_max_position_embeddings"]))
    raise UnsupportedModel(f"rope type {kind!r}: only default, linear and llama3 are computed")
