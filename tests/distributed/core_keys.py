"""Keys and shapes of a plain megatron-core model's checkpoint: its local layers, none of megarl's modules.

Run by `RankPool` on one rank. Nothing is saved: a sharded state dict says it all.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megarl.model.family import ModelSpec, read_spec

Shapes = dict[str, tuple[int, ...]]


def core_keys(model: str, stacked: bool, list_of_kinds: bool = False) -> tuple[Shapes, set[str]]:
    """({key: global shape} of every tensor, unique keys of every ``_extra_state``), as saved by one rank.

    ``list_of_kinds``: ``moe_layer_freq`` lists the layers also where all are alike.
    """
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megarl.parallel.cpu import megatron_on_cpu

    dist.init_process_group("gloo")
    with megatron_on_cpu():
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(0, force_reset_rng=True)
        metadata = {"non_homogeneous_layers": not stacked}
        metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
        built = _build(read_spec(model), as_list=list_of_kinds or not stacked)
        state = built.sharded_state_dict(metadata=metadata)
        apply_factories(state)
    shapes: Shapes = {}
    objects: set[str] = set()
    pending: list[Any] = [state]
    while pending:
        value = pending.pop()
        if isinstance(value, ShardedTensor):
            shapes[value.key] = tuple(value.global_shape)
        elif isinstance(value, ShardedObject):
            objects.add(value.unique_key)
        elif isinstance(value, dict | list):
            pending += value.values() if isinstance(value, dict) else value
    return shapes, objects


def _build(spec: ModelSpec, as_list: bool) -> torch.nn.Module:
    from megatron.core.fusions.fused_bias_geglu import quick_gelu
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    from megarl.model.latent import LatentAttention

    class Attention(DotProductAttention):
        """Megatron's local attention has one size of heads; this one computes nothing, and its keys are the same."""

        def __init__(self, *args: Any, k_channels: int = 0, v_channels: int = 0, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    settings: dict[str, Any] = {
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "ffn_hidden_size": spec.ffn_hidden_size,
        "num_attention_heads": spec.num_attention_heads,
        "num_query_groups": spec.num_query_groups,
        "kv_channels": spec.kv_channels,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu if spec.activation == "silu" else quick_gelu,
        "add_bias_linear": spec.linear_bias,
        "add_qkv_bias": spec.add_qkv_bias,
        "qk_layernorm": spec.qk_layernorm,
        "softmax_type": "learnable" if spec.attention_sinks else "vanilla",
        "use_cpu_initialization": True,
        "bias_activation_fusion": False,
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": False,
        "mtp_num_layers": spec.mtp_num_layers or None,
    }
    if spec.moe:
        settings |= {
            "num_moe_experts": spec.moe.num_experts,
            "moe_ffn_hidden_size": spec.moe.ffn_hidden_size,
            "moe_router_topk": spec.moe.topk,
            "moe_layer_freq": [int(each) for each in spec.moe.layers] if as_list else 1,
            "moe_grouped_gemm": False,
            "moe_router_score_function": spec.moe.router_score_function,
            "moe_router_enable_expert_bias": spec.moe.router_expert_bias,
            "moe_shared_expert_intermediate_size": spec.moe.shared_ffn_hidden_size or None,
        }
    if spec.mla:
        settings |= {"multi_latent_attention": True, "q_lora_rank": spec.mla.q_lora_rank}
        settings |= {"kv_lora_rank": spec.mla.kv_lora_rank, "qk_head_dim": spec.mla.qk_head_dim}
        settings |= {"qk_pos_emb_head_dim": spec.mla.qk_pos_emb_head_dim, "v_head_dim": spec.mla.v_head_dim}
        settings |= {"rope_type": "rope", "apply_rope_fusion": False}
    config = (MLATransformerConfig if spec.mla else TransformerConfig)(**settings)
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    for layer in block.layer_specs:
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = Attention
        if spec.mla and spec.mla.q_lora_rank is None:
            # Without Transformer Engine 0.19 cannot build this; the subclass builds what the specification says.
            attention.q_layernorm = IdentityOp
            layer.submodules.self_attention.module = LatentAttention
    mtp = get_gpt_mtp_block_spec(config, block, use_transformer_engine=False) if spec.mtp_num_layers else None
    return GPTModel(
        config=config,
        transformer_layer_spec=block,
        mtp_block_spec=mtp,
        vocab_size=spec.vocab_size,
        max_sequence_length=spec.max_position_embeddings,
        share_embeddings_and_output_weights=spec.tied,
        position_embedding_type="rope",
    )
