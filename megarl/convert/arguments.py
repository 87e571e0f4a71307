"""Does a Megatron checkpoint come from the model that config.json describes? Its ``args`` say how it was trained.

Shapes cannot tell: 8 heads of 64 and 4 of 128 have the same matrices, and a rotary embedding has none. A checkpoint
that was trained with another config, or with rows in an order that the rules do not know, would be converted to a model
that computes something else. Names and their meaning are Megatron-LM's (``megatron/training/arguments.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from megarl.convert.inert_pickle import Record
from megarl.model.family import ModelSpec

# Endings of arguments that move rows, or change what a weight means: no rule is for these. 0, False, None: not used.
_NO_RULE = ("apply_layernorm_1p", "zero_centered_gamma", "attention_output_gate", "glu_interleave_size")


def disagreements(common: dict[str, Any], spec: ModelSpec) -> list[str]:
    """What the ``args`` of a checkpoint's common state say otherwise than ``spec``, a line each naming the argument.

    None where the checkpoint has no ``args``; arguments that are not there, or are None, say nothing.
    """
    args = common.get("args")
    said: dict[str, Any] = args.fields() if isinstance(args, Record) else args if isinstance(args, dict) else {}
    used = sorted(name for name in said if name.endswith(_NO_RULE) and said[name])
    out = [f"args.{name} is {said[name]}: no rule is for such weights" for name in used]
    for name, expected in _expected(spec, said):
        value = said.get(name)
        if value is not None and not _equal(value, expected):
            out.append(f"args.{name} is {value}, config.json says {expected}")
    return out


def _equal(value: Any, expected: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float) or not isinstance(expected, int | float):
        return bool(value == expected)
    return math.isclose(value, expected, rel_tol=1e-6)


def _expected(spec: ModelSpec, said: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(argument, what it has to be) for a model. Megatron-LM fills in defaults before it saves."""
    for name in ("num_layers", "hidden_size", "num_attention_heads", "add_qkv_bias"):
        yield name, getattr(spec, name)
    yield "multi_latent_attention", spec.mla is not None
    yield "swiglu", spec.activation == "silu"
    yield "norm_epsilon", spec.layernorm_epsilon
    yield "normalization", "RMSNorm"
    yield "rotary_base", spec.rope.theta
    yield "rotary_percent", 1.0
    yield "untie_embeddings_and_output_weights", not spec.tied
    yield "add_bias_linear", spec.linear_bias
    if spec.mla is None:
        yield "kv_channels", spec.kv_channels
        yield "qk_layernorm", spec.qk_layernorm
        yield "use_rope_scaling", spec.rope.type == "llama3"
        grouped = spec.num_query_groups != spec.num_attention_heads
        if said.get("group_query_attention", grouped):
            yield "num_query_groups", spec.num_query_groups
        else:  # then num_query_groups has no meaning: each head is a group
            yield "group_query_attention", grouped
    else:
        for name in ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"):
            yield name, getattr(spec.mla, name)
    if not all(spec.is_moe(i) for i in range(spec.num_layers)):
        yield "ffn_hidden_size", spec.ffn_hidden_size
    if spec.moe:
        yield "num_experts", spec.moe.num_experts
        yield "moe_ffn_hidden_size", spec.moe.ffn_hidden_size
        yield "moe_router_topk", spec.moe.topk
        yield "moe_router_score_function", spec.moe.router_score_function
        if spec.moe.router_score_function == "softmax":
            yield "moe_router_pre_softmax", spec.moe.router_pre_softmax
        yield "moe_shared_expert_intermediate_size", spec.moe.shared_ffn_hidden_size or None
