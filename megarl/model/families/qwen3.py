"""Qwen3 (dense): a norm on every query and key head instead of biases."""

from megarl.model.families.llama import ATTENTION as LLAMA_ATTENTION
from megarl.model.families.llama import DENSE_MLP, EMBED, FINAL
from megarl.model.families.qwen2 import full_attention
from megarl.model.family import Family, dense_decoder, no_attention_bias
from megarl.weights.rules import Copy, insert_after

_MCORE = "decoder.layers.{i}.self_attention."
_HF = "model.layers.{i}.self_attn."

ATTENTION = insert_after(
    LLAMA_ATTENTION,
    _MCORE + "linear_qkv.weight",
    Copy(_MCORE + "q_layernorm.weight", _HF + "q_norm.weight", ("kv_channels",)),
    Copy(_MCORE + "k_layernorm.weight", _HF + "k_norm.weight", ("kv_channels",)),
)

FAMILY = Family(
    name="qwen3",
    hf_architectures=("Qwen3ForCausalLM",),
    config=lambda hf: dense_decoder(hf) | full_attention(hf) | no_attention_bias(hf) | {"qk_layernorm": True},
    weights=(EMBED, *ATTENTION, *DENSE_MLP, *FINAL),
)
