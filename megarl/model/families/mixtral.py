"""Mixtral: Mistral's attention; every layer has experts, whose matrices are called w1 (gate), w3 (up) and w2 (down)."""

from __future__ import annotations

from typing import Any

from megarl.model.families.llama import ATTENTION, EMBED, FINAL
from megarl.model.family import Family, MoE, dense_decoder
from megarl.weights.rules import Copy, GateUp, Layers, Shard, only

_MCORE = "decoder.layers.{i}."
_HF = "model.layers.{i}."
_EXPERT = _MCORE + "mlp.experts.experts.{e}."
_HF_EXPERTS = _HF + "block_sparse_moe.experts.{e}."


def experts(hf: dict[str, Any]) -> dict[str, Any]:
    """Softmax over the chosen experts only: ``router_pre_softmax`` would give perfect weights and wrong logits."""
    moe = MoE(
        num_experts=hf["num_local_experts"],
        ffn_hidden_size=hf["intermediate_size"],
        topk=hf["num_experts_per_tok"],
        layers=(True,) * hf["num_hidden_layers"],
    )
    return {"moe": moe, "sliding_window": hf.get("sliding_window")}


EXPERT_MLP = only(
    (
        Copy(_MCORE + "pre_mlp_layernorm.weight", _HF + "post_attention_layernorm.weight", ("hidden_size",)),
        Copy(_MCORE + "mlp.router.weight", _HF + "block_sparse_moe.gate.weight", ("num_experts", "hidden_size")),
        GateUp(_EXPERT + "linear_fc1.weight", _HF_EXPERTS + "{part}.weight", "moe_ffn_hidden_size", ("w1", "w3")),
        Copy(
            _EXPERT + "linear_fc2.weight",
            _HF_EXPERTS + "w2.weight",
            ("hidden_size", "moe_ffn_hidden_size"),
            Shard.ROW,
        ),
    ),
    Layers.MOE,
)

FAMILY = Family(
    name="mixtral",
    hf_architectures=("MixtralForCausalLM",),
    config=lambda hf: dense_decoder(hf) | experts(hf),
    weights=(EMBED, *ATTENTION, *EXPERT_MLP, *FINAL),
)
