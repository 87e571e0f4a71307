"""Seed-OSS: Llama with biases on query, key and value, and heads of a size of their own."""

from typing import Any

from megarl.model.families.qwen2 import WEIGHTS
from megarl.model.family import Family, UnsupportedModel, dense_decoder


def biases(hf: dict[str, Any]) -> dict[str, Any]:
    """config.json may ask for other biases than the published models have."""
    if not hf.get("attention_bias", True) or hf.get("attention_out_bias"):
        raise UnsupportedModel("attention_bias, attention_out_bias: only true, false is computed")
    return {"add_qkv_bias": True}


FAMILY = Family(
    name="seed_oss",
    hf_architectures=("SeedOssForCausalLM",),
    config=lambda hf: dense_decoder(hf) | biases(hf),
    weights=WEIGHTS,
)
