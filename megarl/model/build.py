"""From a ModelSpec to a megatron-core model on this rank: configuration, layers, the policy's own last step."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import finalize_model_grads
from megatron.core.extensions.transformer_engine import HAVE_TE, TENorm
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megarl.config import Config
from megarl.model.attention import PackedAttention, PackedSelfAttention, RMSNorm
from megarl.model.family import ModelSpec, UnsupportedModel
from megarl.model.heads import VocabShard, token_logprobs
from megarl.model.latent import LatentAttention, LocalLatentAttention, PackedRotary
from megarl.model.rope import attention_factor, inverse_frequencies
from megarl.model.router import routers, with_packed_router
from megarl.parallel.mesh import Mesh
from megarl.weights.names import canonical_parameters
from megarl.weights.rules import Shard
from megarl.weights.shard import padded_vocab
from megarl.weights.stream import first_expert

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def uses_transformer_engine(cfg: Config, device: torch.device) -> bool:
    """Transformer Engine where megatron could import it and has kernels: its attention takes packed sequences in 16 bit
    only. megarl's own attention and norms serve elsewhere. Raises RuntimeError where FP8 would silently be bf16."""
    uses: bool = device.type == "cuda" and cfg.model.dtype == "bf16" and HAVE_TE
    if cfg.fp8_cfg.enabled and not uses:
        raise RuntimeError(
            "fp8_cfg.enabled = true, but megatron-core finds no Transformer Engine on this rank: "
            "python -c 'import transformer_engine.pytorch' says why"
        )
    return uses


class PackedModel(GPTModel):
    """GPTModel of packed sequences."""

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """With the unfused rotary embedding, give every packed token its own angle (see `attention.packed_layout`)."""
        out = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        if self.config.apply_rope_fusion:
            return out
        decoder_input, rotary, *rest = out
        if rotary is None:  # latent attention has a rotary embedding of its own in every layer
            return out
        return (decoder_input, rotary[position_ids[0]], *rest)


class PolicyModel(PackedModel):
    """Its last stage returns ``[2, T]``: log-probability of each label and entropy of its distribution.

    Only tokens that ``loss_mask`` selects reach the head; the others' entries are 0. Without labels it returns logits,
    as GPTModel does.
    """

    def __init__(
        self,
        *,
        true_vocab_size: int,
        temperature: float,
        logprob_chunk_size: int,
        entropy_gradient: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.entropy_gradient = entropy_gradient
        self.true_vocab_size = true_vocab_size
        self.temperature = temperature
        self.logprob_chunk_size = logprob_chunk_size

    def _postprocess(
        self, hidden_states: Tensor, *, labels: Tensor | None = None, loss_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states=hidden_states, labels=labels, loss_mask=loss_mask, **kwargs)
        assert loss_mask is not None, "labels come with a loss_mask"
        tp = self.pg_collection.tp
        # Both regions sum the head's gradient over tensor parallelism on the way back.
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden_states, True, tp)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden_states, group=tp)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        chosen = loss_mask.view(-1).nonzero()[:, 0]
        shard = VocabShard.of(self.true_vocab_size, weight.shape[0], tp.rank(), tp)
        logps, entropy = token_logprobs(
            hidden[chosen, 0], weight, labels.view(-1)[chosen], shard, self.temperature, self.logprob_chunk_size
        )
        if not self.entropy_gradient:  # then backward leaves its part of the work out
            entropy = entropy.detach()
        zeros = hidden.new_zeros(hidden.shape[0], dtype=torch.float32)
        return torch.stack([zeros.index_copy(0, chosen, values) for values in (logps, entropy)])


class ValueModel(PackedModel):
    """Its last stage returns ``[2, T]``: a number for each token, of the model's state *before* the label, where
    ``loss_mask`` selects it, else 0; and zeros, where `PolicyModel` has entropies. In fp32."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.post_process:
            del self.output_layer  # the vocabulary's
            device, dtype = self.decoder.final_layernorm.weight.device, self.config.params_dtype
            self.value_head = torch.nn.Linear(self.config.hidden_size, 1, bias=False, device=device, dtype=dtype)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As any module's. Of a last stage megatron would go on to mark the vocabulary's head, which is not there."""
        last, self.post_process = self.post_process, False
        try:
            state: dict[str, Any] = super().sharded_state_dict(*args, **kwargs)
        finally:
            self.post_process = last
        return state

    def _postprocess(
        self, hidden_states: Tensor, *, labels: Tensor | None = None, loss_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        if not self.post_process:
            return hidden_states
        assert loss_mask is not None, "the engine gives labels and a loss_mask"
        hidden = hidden_states
        if self.config.sequence_parallel:
            # Every rank computes all values, so that each has its own tokens' gradient whole: nothing is to be summed.
            hidden = gather_from_sequence_parallel_region(hidden, False, self.pg_collection.tp)
        chosen = loss_mask.view(-1).nonzero()[:, 0]
        values = F.linear(hidden[chosen, 0].float(), self.value_head.weight.float())[:, 0]
        zeros = hidden.new_zeros(hidden.shape[0], dtype=torch.float32)
        return torch.stack([zeros.index_copy(0, chosen, values), zeros])


def transformer_config(cfg: Config, spec: ModelSpec, mesh: Mesh) -> TransformerConfig:
    """Megatron's configuration of the model. ``model.model_overrides`` has the last word."""
    engine = uses_transformer_engine(cfg, mesh.device)
    dtype = DTYPES[cfg.model.dtype]
    settings: dict[str, Any] = {
        # the architecture
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "ffn_hidden_size": spec.ffn_hidden_size,
        "num_attention_heads": spec.num_attention_heads,
        "num_query_groups": spec.num_query_groups,
        "kv_channels": spec.kv_channels,
        "normalization": "RMSNorm",
        "layernorm_epsilon": spec.layernorm_epsilon,
        "gated_linear_unit": True,
        "add_bias_linear": spec.linear_bias,
        "add_qkv_bias": spec.add_qkv_bias,
        "qk_layernorm": spec.qk_layernorm,
        "window_size": (spec.sliding_window - 1, 0) if spec.sliding_window else None,
        "window_attn_skip_freq": spec.full_attention_period,
        "softmax_type": "learnable" if spec.attention_sinks else "vanilla",
        "softmax_scale": _softmax_scale(spec),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # the layout
        "tensor_model_parallel_size": mesh.tp_size,
        "pipeline_model_parallel_size": mesh.pp_size,
        "context_parallel_size": mesh.cp_size,
        # Transformer Engine passes keys around a ring, but not for windows and sinks: there ranks exchange heads.
        "cp_comm_type": "a2a" if spec.sliding_window or spec.attention_sinks else "p2p",
        "expert_model_parallel_size": mesh.ep_size,
        "expert_tensor_parallel_size": mesh.etp_size,
        "sequence_parallel": cfg.parallel.sequence_parallel,
        "num_layers_in_first_pipeline_stage": cfg.parallel.num_layers_in_first_pipeline_stage,
        "num_layers_in_last_pipeline_stage": cfg.parallel.num_layers_in_last_pipeline_stage,
        "virtual_pipeline_model_parallel_size": cfg.parallel.virtual_pipeline_model_parallel_size,
        # Megatron's batched sends pair up wrongly between two stages that are each other's next and previous one.
        "overlap_p2p_comm": mesh.vpp_size > 1,
        "batch_p2p_comm": mesh.vpp_size == 1,
        # Stages tell each other the sizes of what they send; megatron refuses that with allgather, of dense models too.
        "variable_seq_lengths": cfg.parallel.moe_token_dispatcher_type == "alltoall",
        "moe_token_dispatcher_type": cfg.parallel.moe_token_dispatcher_type,
        # numbers and memory
        "bf16": dtype is torch.bfloat16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "recompute_granularity": cfg.model.recompute_granularity,
        "recompute_method": cfg.model.recompute_method,
        "recompute_num_layers": cfg.model.recompute_num_layers,
        **_fp8(cfg),
        # one division for the whole step, by the count that the engine's loss function reports
        "calculate_per_token_loss": True,
        "finalize_model_grads_func": finalize_model_grads,
        # every parameter is filled from a checkpoint: random numbers would only cost time and hide a gap
        "perform_initialization": False,
        "use_cpu_initialization": mesh.device.type == "cpu",
        # fusions that need CUDA kernels
        "apply_rope_fusion": engine and spec.mla is None,
        "bias_activation_fusion": engine,
        "bias_dropout_fusion": engine,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": False,
    }
    if cfg.model.recompute_modules:
        settings["recompute_modules"] = list(cfg.model.recompute_modules)
    settings |= _activation(spec) | _experts(cfg, spec, engine) | _latent_attention(spec)
    kind = TransformerConfig if spec.mla is None else MLATransformerConfig
    return kind(**settings | dict(cfg.model.model_overrides))


def _fp8(cfg: Config) -> dict[str, Any]:
    """Only Transformer Engine's layers look at it; the head, whose chunks are our own, and the router stay as they
    are."""
    f = cfg.fp8_cfg
    names = ("fp8", "fp8_recipe", "fp8_param", "first_last_layers_bf16")
    names += ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
    return {name: vars(f)[name] for name in names} if f.enabled else {}


def _softmax_scale(spec: ModelSpec) -> float | None:
    """YaRN lengthens rotated queries and keys by a factor. Where all of a head is rotated that is a factor of the
    logits, which no fused rotary embedding has to know. None means megatron's own scale."""
    factor = attention_factor(spec.rope)
    return None if spec.mla or factor == 1 else factor**2 / math.sqrt(spec.kv_channels)


def _activation(spec: ModelSpec) -> dict[str, Any]:
    if spec.activation == "gpt_oss":
        return {"activation_func": quick_gelu, "activation_func_clamp_value": 7.0, "glu_linear_offset": 1.0}
    return {"activation_func": F.silu}


def _experts(cfg: Config, spec: ModelSpec, engine: bool) -> dict[str, Any]:
    """Routing as the checkpoint's authors have it. Nothing balances the experts' load unless it is asked for:
    ``model.moe_aux_loss_coeff`` is 0, and so is ``moe_router_bias_update_rate``, an override."""
    if spec.moe is None:
        return {}
    moe = spec.moe
    return {
        "num_moe_experts": moe.num_experts,
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        "moe_layer_freq": [int(has_experts) for has_experts in moe.layers],
        "moe_router_topk": moe.topk,
        "moe_router_pre_softmax": moe.router_pre_softmax,
        "moe_router_score_function": moe.router_score_function,
        "moe_router_num_groups": moe.router_num_groups,
        "moe_router_group_topk": moe.router_group_topk,
        "moe_router_topk_scaling_factor": moe.router_topk_scaling_factor,
        "moe_router_enable_expert_bias": moe.router_expert_bias,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": cfg.model.moe_aux_loss_coeff,
        "moe_router_dtype": "fp32",  # in 16 bit near ties would choose other experts
        "moe_shared_expert_intermediate_size": moe.shared_ffn_hidden_size or None,
        "moe_grouped_gemm": engine,
    }


def _latent_attention(spec: ModelSpec) -> dict[str, Any]:
    """Of the rotary embedding's settings megatron uses two: `PackedRotary` does the rest."""
    if spec.mla is None:
        return {}
    mla, yarn = spec.mla, spec.rope.type == "yarn"
    return {
        "multi_latent_attention": True,
        "q_lora_rank": mla.q_lora_rank,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_head_dim": mla.qk_head_dim,
        "qk_pos_emb_head_dim": mla.qk_pos_emb_head_dim,
        "v_head_dim": mla.v_head_dim,
        "rope_type": "yarn" if yarn else "rope",
        # of the logits' scale, which DeepSeek's YaRN changes by itself
        "rotary_scaling_factor": spec.rope.factor,
        "mscale_all_dim": spec.rope.mscale_all_dim or 0.0,
    }


def layer_spec(
    cfg: Config, config: TransformerConfig, spec: ModelSpec, mesh: Mesh, chunk: int | None
) -> TransformerBlockSubmodules:
    """This stage's layers, of one chunk where it has several: Transformer Engine's, or megatron's local ones with our
    attention and norms in their places."""
    engine = uses_transformer_engine(cfg, mesh.device)
    first = get_transformer_layer_offset(config, vp_stage=chunk, pp_rank=mesh.pp_rank)
    held = range(first, first + get_num_layers_to_build(config, vp_stage=chunk, pp_rank=mesh.pp_rank))
    layer = _engine_layer if engine else _local_layer
    kinds = {moe: layer(spec, moe) for moe in {spec.is_moe(i) for i in held}}
    layers = [kinds[spec.is_moe(i)] for i in held]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=TENorm if engine else RMSNorm)


def _engine_layer(spec: ModelSpec, moe: bool) -> ModuleSpec:
    layer = get_gpt_layer_with_transformer_engine_spec(
        num_experts=spec.moe.num_experts if spec.moe and moe else None,
        moe_grouped_gemm=moe,
        qk_layernorm=spec.qk_layernorm,
        multi_latent_attention=spec.mla is not None,
    )
    layer.submodules.self_attention.module = LatentAttention if spec.mla else PackedSelfAttention
    return with_packed_router(layer) if moe else layer


def _local_layer(spec: ModelSpec, moe: bool) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(
        num_experts=spec.moe.num_experts if spec.moe and moe else None,
        qk_layernorm=spec.qk_layernorm,
        multi_latent_attention=spec.mla is not None,
        normalization="RMSNorm",
    )
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    layer.submodules.self_attention.module = LocalLatentAttention if spec.mla else PackedSelfAttention
    if spec.mla:
        attention.kv_layernorm = RMSNorm
        attention.q_layernorm = RMSNorm if spec.mla.q_lora_rank is not None else IdentityOp
    elif spec.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return with_packed_router(layer) if moe else layer


def build_model(cfg: Config, spec: ModelSpec, mesh: Mesh, temperature: float) -> PackedModel:
    """This rank's part of a model whose pipeline is not interleaved; see `build_chunks`."""
    [model] = build_chunks(cfg, spec, mesh, temperature)
    return model


def build_chunks(cfg: Config, spec: ModelSpec, mesh: Mesh, temperature: float) -> list[PackedModel]:
    """This rank's parts of the model, on its device, with uninitialised weights: `load_hf` fills every one of them. An
    interleaved pipeline has several a rank: chunk k of stage p comes after chunk k of the stages before it.

    Raises UnsupportedModel for what converts but is not computed: multi-token prediction (`ModelSpec.without_mtp` drops
    it), and what `ModelSpec.untrainable` names.
    """
    refused = (*spec.untrainable(), *(["multi-token-prediction layers"] if spec.mtp_num_layers else []))
    if refused:
        raise UnsupportedModel(f"a {spec.family.name} model with {'; '.join(refused)} converts, but cannot be trained")
    config = transformer_config(cfg, spec, mesh)
    chunks = [None] if mesh.vpp_size == 1 else list(range(mesh.vpp_size))
    return [_build_chunk(cfg, config, spec, mesh, temperature, chunk) for chunk in chunks]


def _build_chunk(
    cfg: Config, config: TransformerConfig, spec: ModelSpec, mesh: Mesh, temperature: float, chunk: int | None
) -> PackedModel:
    parts = {
        "config": config,
        "transformer_layer_spec": layer_spec(cfg, config, spec, mesh, chunk),
        "vocab_size": padded_vocab(spec.vocab_size, mesh.tp_size),
        "max_sequence_length": spec.max_position_embeddings,
        "pre_process": mesh.is_first_stage and not chunk,
        "post_process": mesh.is_last_stage and chunk in (None, mesh.vpp_size - 1),
        "share_embeddings_and_output_weights": spec.tied,
        "position_embedding_type": "rope",
        "pg_collection": mesh.groups,
        "vp_stage": chunk,
    }
    if spec.scalar_head:
        model: PackedModel = ValueModel(**parts)
    else:
        model = PolicyModel(
            **parts,
            true_vocab_size=spec.vocab_size,
            temperature=temperature,
            logprob_chunk_size=cfg.model.logprob_chunk_size,
            entropy_gradient=cfg.loss.entropy_coef != 0,
        )
    # One formula for every rope type, not megatron's: theirs hard-codes Llama 3's constants.
    if spec.mla:
        for layer in model.decoder.layers:
            rotary = PackedRotary(spec.rope, spec.mla.qk_pos_emb_head_dim, mesh.device)
            layer.self_attention.rotary_pos_emb = rotary
    else:
        model.rotary_pos_emb.inv_freq = inverse_frequencies(spec.rope, spec.kv_channels).to(mesh.device)
    for module in model.modules():
        # Each rank has all of an expert with biases, so there is nothing to sum. Megatron adds the bias in place, which
        # autograd forbids of a sum's result.
        if spec.linear_bias and isinstance(module, RowParallelLinear) and module.is_expert:
            module.explicit_expert_comm = True
    for router in routers(model):
        assert spec.moe is not None, "a router is of a layer with experts"
        router.place = sum(spec.moe.layers[: router.layer_number - 1])
        for parameter in router.parameters():
            parameter.requires_grad_(not cfg.model.freeze_router)
    mark_shards(model, spec, mesh)
    return model.to(mesh.device)


def mark_shards(model: PackedModel, spec: ModelSpec, mesh: Mesh) -> None:
    """Tell megatron which parameters tensor parallelism cuts, as its own initialisation, which we leave out, would
    have, and which are experts'.

    Without the mark a parameter counts as a replica: the gradient norm would be that of the first tensor-parallel rank.
    """
    shards = {tensor.name: tensor for tensor in spec.tensors()}
    # Else they are like the rest: megatron's two layouts are one.
    apart = mesh.ep_size > 1 or mesh.etp_size != mesh.tp_size
    for name, parameter in canonical_parameters(model, spec, first_expert(spec, mesh)):
        tensor = shards[name]
        if tensor.shard is not Shard.REPLICATED:
            parameter.tensor_model_parallel = True
            parameter.partition_dim = 1 if tensor.shard is Shard.ROW else 0
            parameter.partition_stride = tensor.stride
        if tensor.expert is not None and apart:
            # Reduced over the experts' replicas. Megatron goes by EP alone, but ETP < TP also makes replicas of them.
            parameter.allreduce = False
            # No rank of the tensor-parallel group has this expert's tokens, or this expert, again. Megatron-core 0.16.1
            # and 0.19.2 sum biases with sequence parallelism over it, and 0.16.1 counts them on its first rank only.
            parameter.sequence_parallel = False
            parameter.tensor_model_parallel = True
