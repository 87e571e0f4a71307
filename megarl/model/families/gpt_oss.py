"""gpt-oss: attention sinks, a sliding window in every other layer, experts with biases whose matrices HF stacks."""

from __future__ import annotations

from typing import Any

from megarl.model.families.llama import ATTENTION, EMBED, FINAL
from megarl.model.family import Family, MoE, UnsupportedModel, dense_decoder
from megarl.weights.rules import QKV, Copy, Layers, Shard, StackedGateUp, insert_after, only

_MCORE = "decoder.layers.{i}."
_HF = "model.layers.{i}."
_EXPERT = _MCORE + "mlp.experts.experts.{e}."
_LINEAR_QKV = _MCORE + "self_attention.linear_qkv."

_ATTENTION = (
    *insert_after(
        ATTENTION, _LINEAR_QKV + "weight", QKV(_LINEAR_QKV + "bias", _HF + "self_attn.{qkv}_proj.bias", bias=True)
    ),
    Copy(_MCORE + "self_attention.linear_proj.bias", _HF + "self_attn.o_proj.bias", ("hidden_size",)),
    Copy(
        _MCORE + "self_attention.core_attention.softmax_offset",
        _HF + "self_attn.sinks",
        ("num_attention_heads",),
        Shard.COLUMN,
    ),
)
_EXPERTS = (
    Copy(_MCORE + "pre_mlp_layernorm.weight", _HF + "post_attention_layernorm.weight", ("hidden_size",)),
    Copy(_MCORE + "mlp.router.weight", _HF + "mlp.router.weight", ("num_experts", "hidden_size")),
    Copy(_MCORE + "mlp.router.bias", _HF + "mlp.router.bias", ("num_experts",)),
    StackedGateUp(_EXPERT + "linear_fc1.weight", _HF + "mlp.experts.gate_up_proj"),
    StackedGateUp(_EXPERT + "linear_fc1.bias", _HF + "mlp.experts.gate_up_proj_bias", bias=True),
    Copy(
        _EXPERT + "linear_fc2.weight",
        _HF + "mlp.experts.down_proj",
        ("hidden_size", "moe_ffn_hidden_size"),
        Shard.ROW,
        stacked=True,
        transposed=True,
    ),
    Copy(_EXPERT + "linear_fc2.bias", _HF + "mlp.experts.down_proj_bias", ("hidden_size",), stacked=True),
)


def differences(hf: dict[str, Any]) -> dict[str, Any]:
    kinds = hf.get("layer_types")
    expected = ["sliding_attention", "full_attention"] * hf["num_hidden_layers"]
    if kinds is not None and kinds != expected[: hf["num_hidden_layers"]]:
        raise UnsupportedModel(f"layer_types {kinds}: only sliding and full attention in turn are computed")
    if not hf.get("attention_bias", True):
        raise UnsupportedModel("attention_bias: gpt-oss without biases is not computed")
    for name, computed in (("swiglu_limit", 7.0), ("swiglu_alpha", 1.702)):
        if hf.get(name, computed) != computed:
            raise UnsupportedModel(f"{name} {hf[name]}: only {computed} is computed")
    moe = MoE(
        num_experts=hf["num_local_experts"],
        ffn_hidden_size=hf["intermediate_size"],
        topk=hf.get("num_experts_per_tok") or hf["experts_per_token"],
        layers=(True,) * hf["num_hidden_layers"],
        router_bias=True,
    )
    return {
        "moe": moe,
        "add_qkv_bias": True,
        "linear_bias": True,
        "attention_sinks": True,
        "activation": "gpt_oss",
        "sliding_window": hf.get("sliding_window"),
        "full_attention_period": 2,
    }


FAMILY = Family(
    name="gpt_oss",
    hf_architectures=("GptOssForCausalLM",),
    config=lambda hf: dense_decoder(hf) | differences(hf),
    weights=(EMBED, *_ATTENTION, *only(_EXPERTS, Layers.MOE), *FINAL),
)
