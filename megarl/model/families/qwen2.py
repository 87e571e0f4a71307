"""Qwen2 and Qwen2.5: biases on query, key and value; the small sizes tie the head to the embedding."""

from typing import Any

from megarl.model.families.llama import DENSE_WEIGHTS
from megarl.model.family import Family, UnsupportedModel, dense_decoder
from megarl.weights.rules import QKV, insert_after

_LINEAR_QKV = "decoder.layers.{i}.self_attention.linear_qkv."


def full_attention(hf: dict[str, Any]) -> dict[str, Any]:
    """Qwen can use a sliding window in its upper layers only (``max_window_layers``), which is not computed."""
    if hf.get("use_sliding_window"):
        raise UnsupportedModel("use_sliding_window: a sliding window in some layers only is not computed")
    return {}


WEIGHTS = insert_after(
    DENSE_WEIGHTS,
    _LINEAR_QKV + "weight",
    QKV(_LINEAR_QKV + "bias", "model.layers.{i}.self_attn.{qkv}_proj.bias", bias=True),
)

FAMILY = Family(
    name="qwen2",
    hf_architectures=("Qwen2ForCausalLM",),
    config=lambda hf: dense_decoder(hf) | full_attention(hf) | {"add_qkv_bias": True},
    weights=WEIGHTS,
)
