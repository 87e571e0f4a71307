"""What vLLM has to be told about a model, so that it computes what config.json says.

Facts are of vllm 0.32.0. DeepSeek's own checkpoints need none of it: they name how experts are scored, and their rotary
embedding is YaRN's.
"""

from __future__ import annotations

import json
from typing import Any

from megarl.model.family import ModelSpec

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def option(name: str, value: Any) -> list[str]:
    """An argument of ``EngineArgs`` as a server's command line has it."""
    if value is None or value is False:
        return []
    flag = "--" + name.replace("_", "-")
    if value is True:
        return [flag]
    return [flag, json.dumps(value) if isinstance(value, dict) else str(value)]


def model_arguments(spec: ModelSpec, *, on_cpu: bool) -> dict[str, Any]:
    """Arguments of vLLM's ``EngineArgs`` for this model."""
    if spec.mla is None:
        return {}
    arguments: dict[str, Any] = {"hf_overrides": _router(spec)} if spec.moe else {}
    if on_cpu:
        # The CPU kernel takes [tokens, heads * head_size] and is given [tokens, heads, head_size]: it turns the first
        # tokens' heads by the angles of the first positions, and leaves all others as they are
        # (`RotaryEmbedding.forward_cpu`, called by layers/mla.py; `DeepseekScalingRotaryEmbedding` has no such kernel).
        arguments["compilation_config"] = {"custom_ops": ["-rotary_embedding"]}
    return arguments


def _router(spec: ModelSpec) -> dict[str, Any]:
    """Keys of config.json that vLLM's DeepSeek reads, and transformers 5 does not write, or writes as null.

    Without ``scoring_func``, vLLM scores DeepSeek-V3's experts by softmax; without ``topk_method``, it has no place for
    the experts' bias; without groups, it stops at an assertion.
    """
    moe = spec.moe
    assert moe is not None
    return {
        "scoring_func": moe.router_score_function,
        "topk_method": "noaux_tc" if moe.router_expert_bias else "greedy",
        "n_group": moe.router_num_groups or 1,
        "topk_group": moe.router_group_topk or 1,
        "routed_scaling_factor": moe.router_topk_scaling_factor or 1.0,
    }


def missing_cpu_kernel(config: Any) -> str | None:
    """Why vLLM's CPU attention cannot do this model, if it cannot: it would die inside a kernel."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend

    model = config.model_config
    size = model.get_head_size()
    if model.use_mla:
        sizes = CPUMLABackend.get_supported_head_sizes()
        what = f"a latent of size {size} (kv_lora_rank + qk_rope_head_dim)"
    else:
        sizes = CPUAttentionBackend.get_supported_head_sizes()
        what = f"attention heads of size {size} (head_dim, or hidden_size / num_attention_heads)"
    return None if size in sizes else f"{model.model} has {what}; vLLM's CPU attention knows {sizes}"


def missing_cpu_quantization(spec: ModelSpec, quantization: str | None) -> str | None:
    """Why vLLM's CPU build cannot quantise this model so, if it cannot: it would die at the first layer."""
    if quantization is None or (quantization == "fp8_per_channel" and spec.moe is None):
        return None
    return (
        f"rollout.quantization={quantization}: on CPUs vLLM can quantise models without experts to fp8_per_channel, and"
        " nothing else"
    )
