"""`megarl verify` agrees with what is right, and finds what is wrong and where: bugs that peers have had, planted."""

from __future__ import annotations

import dataclasses

import pytest

from megarl.config import load, save
from megarl.verify.command import _NOT_DIVIDED, agrees, small_recipe
from megarl.verify.measure import compare
from megarl.verify.shrink import SmallLayout, small_config, small_layout, write_small_model
from tests.distributed import verify_cases

# config.json of models of public sizes, as far as they matter.
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
RECIPE = """
algorithm: grpo
cluster: {num_nodes: 8, gpus_per_node: 8}
model: {path: models/none}
data: {path: data/none.jsonl}
train: {train_global_batch_size: 512}
loss: {kl_loss_coef: 0.01, truncated_importance_sampling_type: tis, entropy_coef: 0.01}
optimizer: {clip_grad: 0.0}
"""


def folders(tmp_path, hf, overrides, max_ranks=4):
    """Recipes of the one rank and of the small layout, and the layout."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    cfg = load([str(recipe), *overrides], check_model=False)
    layout = small_layout(cfg, max_ranks)
    (tmp_path / "data.jsonl").touch()
    write_small_model(hf, layout, tmp_path / "model", seed=0)
    one = SmallLayout(dataclasses.replace(layout.parallel, **_NOT_DIVIDED), dp=1)
    for name, sizes in (("one", one), ("all", layout)):
        save(small_recipe(cfg, sizes, tmp_path), tmp_path / f"{name}.yaml")
    return str(tmp_path / "one.yaml"), str(tmp_path / "all.yaml"), layout


def differences(ranks, tmp_path, hf, overrides, bug="none"):
    one, several, layout = folders(tmp_path, hf, overrides)
    (truth,) = ranks.run(verify_cases.measured, 1, recipe=one)
    found = ranks.run(verify_cases.measured, layout.world_size, recipe=several, bug=bug)
    rows = [dataclasses.asdict(row) for measured in found for row in compare(truth, measured, 1e-5)]
    return {row["what"] for row in rows if not agrees(row)}


CP2_TP2 = [
    "parallel.tensor_model_parallel_size=8",
    "parallel.sequence_parallel=true",
    "parallel.context_parallel_size=4",
    "parallel.pipeline_model_parallel_size=1",
]
EP2_TP2 = [
    "parallel.tensor_model_parallel_size=4",
    "parallel.sequence_parallel=true",
    "parallel.expert_model_parallel_size=8",
    "parallel.expert_tensor_parallel_size=1",
]


def test_what_composes_in_the_recipe_composes_in_the_small_layout(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    uneven = ["parallel.pipeline_model_parallel_size=4", "parallel.num_layers_in_first_pipeline_stage=19"]
    cfg = load([str(recipe), *CP2_TP2[:3], *uneven, "cluster.num_nodes=16"], check_model=False)
    assert small_layout(cfg, 8).describe() == "TP2 PP2 CP2 SP uneven stages"
    with pytest.raises(ValueError, match="needs 8 ranks, more than --max-ranks 4"):
        small_layout(cfg, 4)
    small = small_config(QWEN3_30B_A3B, small_layout(cfg, 8))
    assert (small["num_attention_heads"], small["num_key_value_heads"]) == (4, 2)  # two shards have some of their own
    assert (small["num_experts"], small["num_experts_per_tok"], small["head_dim"]) == (8, 2, 32)


def test_right_layouts_agree(ranks, tmp_path):
    assert differences(ranks, tmp_path, LLAMA_70B, CP2_TP2) == set()


def test_experts_agree(ranks, tmp_path):
    assert differences(ranks, tmp_path, QWEN3_30B_A3B, EP2_TP2) == set()


@pytest.mark.slow
def test_a_loss_scaled_by_cp_is_found(ranks, tmp_path):
    """Gradients are half as large; losses and log-probs are as they were."""
    wrong = differences(ranks, tmp_path, LLAMA_70B, CP2_TP2, "loss scaled by CP")
    assert "gradient norm" in wrong and "loss" not in wrong and "log-probs" not in wrong
    assert len(wrong) == 1 + 39  # every tensor


@pytest.mark.slow
def test_a_shifted_label_is_found(ranks, tmp_path):
    assert {"loss", "log-probs"} <= differences(ranks, tmp_path, LLAMA_70B, CP2_TP2, "label shifted by one")


@pytest.mark.slow
def test_a_norm_that_is_not_reduced_is_found(ranks, tmp_path):
    wrong = differences(ranks, tmp_path, LLAMA_70B, CP2_TP2, "norms not reduced over SP")
    assert {what for what in wrong if what.startswith("model.")} == {
        *(
            f"model.layers.{i}.{norm}.weight"
            for i in range(4)
            for norm in ("input_layernorm", "post_attention_layernorm")
        ),
        "model.norm.weight",
    }


def test_a_router_gradient_counted_twice_is_found(ranks, tmp_path):
    wrong = differences(ranks, tmp_path, QWEN3_30B_A3B, EP2_TP2, "router gradient counted twice")
    assert {what for what in wrong if what.startswith("model.")} == {
        f"model.layers.{i}.mlp.gate.weight" for i in range(4)
    }
