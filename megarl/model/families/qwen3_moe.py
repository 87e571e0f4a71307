"""Qwen3 with experts (30B-A3B, 235B-A22B), and `EXPERT_MLP`, the experts of most families."""

from __future__ import annotations

from typing import Any

from megarl.model.families.llama import DENSE_MLP, EMBED, FINAL
from megarl.model.families.qwen2 import full_attention
from megarl.model.families.qwen3 import ATTENTION
from megarl.model.family import Family, MoE, dense_decoder, no_attention_bias
from megarl.weights.rules import Copy, GateUp, Layers, Shard, only

_MCORE = "decoder.layers.{i}."
_HF = "model.layers.{i}."
_EXPERT = _MCORE + "mlp.experts.experts.{e}."

EXPERT_MLP = only(
    (
        Copy(_MCORE + "pre_mlp_layernorm.weight", _HF + "post_attention_layernorm.weight", ("hidden_size",)),
        Copy(_MCORE + "mlp.router.weight", _HF + "mlp.gate.weight", ("num_experts", "hidden_size")),
        GateUp(_EXPERT + "linear_fc1.weight", _HF + "mlp.experts.{e}.{part}_proj.weight", "moe_ffn_hidden_size"),
        Copy(
            _EXPERT + "linear_fc2.weight",
            _HF + "mlp.experts.{e}.down_proj.weight",
            ("hidden_size", "moe_ffn_hidden_size"),
            Shard.ROW,
        ),
    ),
    Layers.MOE,
)


def experts(hf: dict[str, Any]) -> dict[str, Any]:
    """``decoder_sparse_step`` and ``mlp_only_layers`` say which layers have experts."""
    step, dense = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or []
    layers = tuple(i not in dense and (i + 1) % step == 0 for i in range(hf["num_hidden_layers"]))
    moe = MoE(
        num_experts=hf.get("num_experts") or hf["num_local_experts"],  # the older and the newer transformers' name
        ffn_hidden_size=hf["moe_intermediate_size"],
        topk=hf["num_experts_per_tok"],
        layers=layers,
        router_pre_softmax=not hf.get("norm_topk_prob", False),
    )
    return {"moe": moe, "qk_layernorm": True}


FAMILY = Family(
    name="qwen3_moe",
    hf_architectures=("Qwen3MoeForCausalLM",),
    config=lambda hf: dense_decoder(hf) | full_attention(hf) | no_attention_bias(hf) | experts(hf),
    weights=(EMBED, *ATTENTION, *only(DENSE_MLP, Layers.DENSE), *EXPERT_MLP, *FINAL),
)
