"""FLOPs of every kind of model, added up by hand in the comments; published counts where there are any."""

import json
from pathlib import Path
from typing import Any

import pytest

from megarl.model.family import read_spec
from megarl.model.flops import ModelFlops

TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 16,
    "vocab_size": 10,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}
LLAMA = {"architectures": ["LlamaForCausalLM"]}
EXPERTS = {"num_experts_per_tok": 2}
LATENT = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_key_value_heads": 2,
    "q_lora_rank": 6,
    "kv_lora_rank": 5,
    "qk_nope_head_dim": 3,
    "qk_rope_head_dim": 2,
    "v_head_dim": 4,
    "moe_intermediate_size": 7,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}
# DeepSeek-V3 and Qwen3-235B-A22B, as their config.json have them.
V3 = LATENT | {
    "num_hidden_layers": 61,
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "intermediate_size": 18432,
    "vocab_size": 129280,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "routed_scaling_factor": 2.5,
}
QWEN3_235B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_hidden_layers": 94,
    "hidden_size": 4096,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 151936,
}


def flops(tmp_path: Path, **hf: Any) -> ModelFlops:
    (tmp_path / "config.json").write_text(json.dumps(TINY | hf))
    return ModelFlops.of(read_spec(tmp_path))


def test_a_dense_model(tmp_path: Path) -> None:
    found = flops(tmp_path, **LLAMA)
    # q and o 8x8, k and v 8x4, gated MLP 3x8x16: 576 a layer; head 8x10
    assert found.matmul_parameters == 2 * (2 * 64 + 2 * 32 + 384) + 80 == 1232
    # lengths 3 and 1: 4 tokens; causal attention 2 * layers * (heads * head_dim) * (9 + 1)
    assert found.forward([3, 1]) == 2 * 1232 * 4 + 2 * 2 * 8 * 10
    assert found.train([3, 1]) == 3 * found.forward([3, 1])


def test_experts_that_a_token_goes_to(tmp_path: Path) -> None:
    # Mixtral: 192 of attention, a router of 8x4, 2 of 4 experts of 3x8x16
    mixtral = flops(tmp_path, architectures=["MixtralForCausalLM"], num_local_experts=4, **EXPERTS)
    assert mixtral.matmul_parameters == 2 * (192 + 32 + 2 * 384) + 80
    # Qwen3-MoE: experts of 3x8x5, and a first layer without any
    sizes = {"num_experts": 4, "moe_intermediate_size": 5, "mlp_only_layers": [0], "norm_topk_prob": True}
    qwen = flops(tmp_path, architectures=["Qwen3MoeForCausalLM"], head_dim=4, **sizes, **EXPERTS)
    assert qwen.matmul_parameters == (192 + 384) + (192 + 32 + 2 * 120) + 80


def test_latent_attention_and_a_shared_expert(tmp_path: Path) -> None:
    found = flops(tmp_path, **LATENT, **EXPERTS)
    # q 8x6 and 6x(2 heads x 5), kv down 8x(5+2), up 5x(2 x (3+4)), out (2x4)x8
    attention = 48 + 60 + 56 + 70 + 64
    # a dense layer 3x8x16; router 8x4, 2 experts and the shared one of 3x8x7
    assert found.matmul_parameters == 2 * attention + 384 + (32 + 3 * 168) + 80
    # scores over 3 + 2 dimensions, values of 4: 2 FLOPs each, 2 heads, 2 layers, half of 6 x 6 pairs
    assert found.cost(6) == 2 * found.matmul_parameters * 6 + 2 * 2 * 2 * (5 + 4) * 18


def test_a_sliding_window_in_every_other_layer(tmp_path: Path) -> None:
    sizes = {"head_dim": 4, "num_local_experts": 4, "sliding_window": 4, "swiglu_limit": 7.0, "hidden_act": "silu"}
    found = flops(tmp_path, architectures=["GptOssForCausalLM"], attention_bias=True, **sizes, **EXPERTS)
    # a pair costs 2 x 2 heads x 8 = 32; of 10 tokens 10^2/2 = 50 pairs in one layer, 4 x 10 - 4^2/2 = 32 in the other
    assert found.cost(10) - 2 * found.matmul_parameters * 10 == 32 * 50 + 32 * 32
    assert found.cost(3) - 2 * found.matmul_parameters * 3 == 2 * 32 * 4.5


def test_a_scalar_head(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY | LLAMA))
    spec = read_spec(tmp_path)
    assert ModelFlops.of(spec).matmul_parameters - ModelFlops.of(spec.with_scalar_head()).matmul_parameters == 8 * 9


@pytest.mark.parametrize(
    ("hf", "activated"),
    [
        (V3, 37e9),  # "37B activated for each token" (2412.19437), of which 0.93 B are the embedding
        (QWEN3_235B, 22e9),  # 22B activated (2505.09388), of which 0.62 B are the embedding
    ],
    ids=["DeepSeek-V3", "Qwen3-235B-A22B"],
)
def test_published_counts_of_activated_parameters(tmp_path: Path, hf: dict[str, Any], activated: float) -> None:
    embedding = hf["hidden_size"] * hf["vocab_size"]
    assert flops(tmp_path, **hf).matmul_parameters + embedding == pytest.approx(activated, rel=0.02)


def test_the_closed_form_of_llama_70b(tmp_path: Path) -> None:
    """6 FLOPs a parameter and 6 x layers x width a token of context: 449 GFLOP a token at 8k."""
    sizes = {"num_hidden_layers": 80, "hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8}
    found = flops(tmp_path, **LLAMA, **sizes, intermediate_size=28672, vocab_size=128256)
    assert found.train([8192]) / 8192 == pytest.approx(449e9, rel=0.01)
