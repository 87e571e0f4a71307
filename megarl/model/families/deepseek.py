"""DeepSeek-V2, V3 and R1: multi-head latent attention, shared and routed experts, multi-token-prediction layers."""

from __future__ import annotations

from typing import Any

from megarl.model.families.llama import DENSE_MLP, EMBED, FINAL
from megarl.model.families.qwen3_moe import EXPERT_MLP
from megarl.model.family import MLA, Family, MoE, UnsupportedModel, dense_decoder, no_attention_bias
from megarl.weights.rules import Copy, GateUp, Layers, Shard, only, renamed

_MCORE = "decoder.layers.{i}."
_HF = "model.layers.{i}."
_ATTN = _MCORE + "self_attention."
_HF_ATTN = _HF + "self_attn."
_MTP = "mtp.layers.{k}."

ATTENTION = (
    Copy(_MCORE + "input_layernorm.weight", _HF + "input_layernorm.weight", ("hidden_size",)),
    Copy(
        _ATTN + "linear_q_proj.weight",
        _HF_ATTN + "q_proj.weight",
        ("mla_query_size", "hidden_size"),
        Shard.COLUMN,
        when="no_q_lora",
    ),
    Copy(
        _ATTN + "linear_q_down_proj.weight",
        _HF_ATTN + "q_a_proj.weight",
        ("q_lora_rank", "hidden_size"),
        when="q_lora",
    ),
    Copy(
        _ATTN + "linear_kv_down_proj.weight",
        _HF_ATTN + "kv_a_proj_with_mqa.weight",
        ("mla_kv_down_size", "hidden_size"),
    ),
    Copy(
        _ATTN + "linear_q_up_proj.layer_norm_weight",
        _HF_ATTN + "q_a_layernorm.weight",
        ("q_lora_rank",),
        when="q_lora",
    ),
    Copy(
        _ATTN + "linear_q_up_proj.weight",
        _HF_ATTN + "q_b_proj.weight",
        ("mla_query_size", "q_lora_rank"),
        Shard.COLUMN,
        when="q_lora",
    ),
    Copy(_ATTN + "linear_kv_up_proj.layer_norm_weight", _HF_ATTN + "kv_a_layernorm.weight", ("kv_lora_rank",)),
    Copy(
        _ATTN + "linear_kv_up_proj.weight",
        _HF_ATTN + "kv_b_proj.weight",
        ("mla_kv_up_size", "kv_lora_rank"),
        Shard.COLUMN,
    ),
    Copy(_ATTN + "linear_proj.weight", _HF_ATTN + "o_proj.weight", ("hidden_size", "mla_value_size"), Shard.ROW),
)

_EXPERT_BIAS = Copy(
    _MCORE + "mlp.router.expert_bias",
    _HF + "mlp.gate.e_score_correction_bias",
    ("num_experts",),
    keep_fp32=True,
    when="expert_bias",
)
_SHARED = (
    GateUp(
        _MCORE + "mlp.shared_experts.linear_fc1.weight",
        _HF + "mlp.shared_experts.{part}_proj.weight",
        "shared_ffn_hidden_size",
        when="shared_experts",
    ),
    Copy(
        _MCORE + "mlp.shared_experts.linear_fc2.weight",
        _HF + "mlp.shared_experts.down_proj.weight",
        ("hidden_size", "shared_ffn_hidden_size"),
        Shard.ROW,
        when="shared_experts",
    ),
)
MOE_MLP = (*EXPERT_MLP[:2], _EXPERT_BIAS, *EXPERT_MLP[2:], *_SHARED)

# A multi-token-prediction layer is a decoder layer with experts behind two norms and a projection.
MTP = (
    Copy(_MTP + "enorm.weight", _HF + "enorm.weight", ("hidden_size",)),
    Copy(_MTP + "hnorm.weight", _HF + "hnorm.weight", ("hidden_size",)),
    Copy(_MTP + "eh_proj.weight", _HF + "eh_proj.weight", ("hidden_size", "two_hidden_size"), Shard.COLUMN),
    *renamed((*ATTENTION, *MOE_MLP), (_MCORE, _MTP + "mtp_model_layer."), (_HF, _HF)),
    Copy(_MTP + "final_layernorm.weight", _HF + "shared_head.norm.weight", ("hidden_size",)),
)


def latent_attention(hf: dict[str, Any]) -> dict[str, Any]:
    mla = MLA(
        q_lora_rank=hf["q_lora_rank"],
        kv_lora_rank=hf["kv_lora_rank"],
        qk_head_dim=hf["qk_nope_head_dim"],
        qk_pos_emb_head_dim=hf["qk_rope_head_dim"],
        v_head_dim=hf["v_head_dim"],
    )
    return {"mla": mla, "kv_channels": mla.v_head_dim, "qk_layernorm": True}


def experts(hf: dict[str, Any]) -> dict[str, Any]:
    """V2 scores experts by softmax, V3 by sigmoid with a bias for balance that only chooses (``noaux_tc``)."""
    method = hf.get("topk_method") or ("noaux_tc" if "DeepseekV3ForCausalLM" in hf["architectures"] else "greedy")
    if method not in ("greedy", "group_limited_greedy", "noaux_tc"):
        raise UnsupportedModel(f"topk_method {method!r}: only greedy, group_limited_greedy and noaux_tc are known")
    biased = method == "noaux_tc"
    grouped = method != "greedy" and (hf.get("n_group") or 1) > 1
    topk, dense = hf["num_experts_per_tok"], hf["first_k_dense_replace"]
    period = hf.get("moe_layer_freq") or 1
    moe = MoE(
        num_experts=hf["n_routed_experts"],
        ffn_hidden_size=hf["moe_intermediate_size"],
        topk=topk,
        layers=tuple(i >= dense and i % period == 0 for i in range(hf["num_hidden_layers"])),
        router_pre_softmax=not biased,
        router_score_function="sigmoid" if biased else "softmax",
        router_num_groups=hf["n_group"] if grouped else None,
        router_group_topk=hf["topk_group"] if grouped else None,
        router_topk_scaling_factor=hf.get("routed_scaling_factor"),
        router_expert_bias=biased,
        shared_ffn_hidden_size=hf["moe_intermediate_size"] * (hf.get("n_shared_experts") or 0),
    )
    layers = hf.get("num_nextn_predict_layers") or 0
    return {
        "moe": moe,
        "not_computed": not_computed(hf, biased, grouped),
        "mtp_num_layers": layers,
        "mtp_in_checkpoint": layers,
    }


def not_computed(hf: dict[str, Any], biased: bool, grouped: bool) -> tuple[str, ...]:
    """Megatron scores a group of experts by the sum of its best topk / group_topk; V3 by its best two, V2 by its best
    one. Megatron normalises sigmoid scores always, and HF's V2 never."""
    refused = []
    topk, scored_by = hf["num_experts_per_tok"], 2 if biased else 1
    if grouped and topk / hf["topk_group"] != scored_by:
        refused.append(
            f"groups of experts scored by their best {scored_by} where megatron takes {topk} / {hf['topk_group']}"
        )
    if bool(hf.get("norm_topk_prob", biased)) != biased:
        refused.append(f"norm_topk_prob {hf['norm_topk_prob']}")
    if not hf.get("rope_interleave", True):
        refused.append("rope_interleave false")
    return tuple(refused)


FAMILY = Family(
    name="deepseek",
    hf_architectures=("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"),
    config=lambda hf: dense_decoder(hf) | no_attention_bias(hf) | latent_attention(hf) | experts(hf),
    weights=(
        EMBED,
        *ATTENTION,
        *only(DENSE_MLP, Layers.DENSE),
        *only(MOE_MLP, Layers.MOE),
        *only(MTP, Layers.MTP),
        *FINAL,
    ),
    ignored_hf=("rotary_emb.inv_freq",),
    duplicates=(
        ("model.layers.{i}.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.layers.{i}.shared_head.head.weight", "lm_head.weight"),
    ),
)
