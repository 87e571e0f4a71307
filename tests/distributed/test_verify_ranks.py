"""`megarl verify` agrees with what is right, and finds what is wrong and where: bugs that peers have had, planted."""

from __future__ import annotations

import pytest

from megarl.algorithms import ALGORITHMS
from megarl.config import load
from megarl.verify.cases import cases_of
from megarl.verify.command import write_recipes
from megarl.verify.shrink import small_config, small_layout, write_models
from tests.distributed import verify_cases
from tests.marks import by_default
from tests.public_models import DEEPSEEK_V3, LLAMA_70B, QWEN3_30B_A3B

RECIPE = """
algorithm: grpo
cluster: {num_nodes: 8, gpus_per_node: 8}
model: {path: models/none}
data: {path: data/none.jsonl}
train: {train_global_batch_size: 512}
"""
# Every term of the policy loss.
TERMS = ["loss.kl_loss_coef=0.01", "loss.truncated_importance_sampling_type=tis", "loss.entropy_coef=0.01"]
CP2_TP2 = [
    *TERMS,
    "parallel.tensor_model_parallel_size=8",
    "parallel.sequence_parallel=true",
    "parallel.context_parallel_size=4",
    "parallel.pipeline_model_parallel_size=1",
]
EP2_TP2 = [
    *TERMS,
    "parallel.tensor_model_parallel_size=4",
    "parallel.sequence_parallel=true",
    "parallel.expert_model_parallel_size=8",
    "parallel.expert_tensor_parallel_size=1",
]
FULL = ["model.recompute_granularity=full", "model.recompute_method=uniform", "model.recompute_num_layers=4"]


def shrunk(folder, hf, overrides, max_ranks):
    """Write the small model and the recipes of its ranks; how many ranks the layout has."""
    (folder / "recipe.yaml").write_text(RECIPE)
    cfg = load([str(folder / "recipe.yaml"), *overrides], check_model=False)
    layout = small_layout(cfg, max_ranks)
    write_models(hf, layout, folder, seed=0)
    write_recipes(cfg, max_ranks, folder, "cpu")
    return layout.world_size


def wrong(ranks, folder, hf, overrides, bug="none", max_ranks=4):
    """What the layout gets wrong."""
    world = shrunk(folder, hf, overrides, max_ranks)
    ranks.run(verify_cases.truth, 1, recipe=str(folder / "one.yaml"), folder=str(folder))
    arguments = {"recipe": str(folder / "all.yaml"), "folder": str(folder), "bug": bug}
    rows, *_ = ranks.run(verify_cases.differences, world, **arguments)
    return {row.what.removeprefix("policy: ") for row in rows if not row.agrees}


def test_what_composes_in_the_recipe_composes_in_the_small_layout(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    uneven = ["parallel.pipeline_model_parallel_size=4", "parallel.num_layers_in_first_pipeline_stage=19"]
    cfg = load([str(recipe), *CP2_TP2[:6], *uneven, "cluster.num_nodes=16"], check_model=False)
    assert small_layout(cfg, 8).describe() == "TP2 PP2 CP2 SP uneven stages"
    with pytest.raises(ValueError, match="needs 8 ranks, more than --max-ranks 4"):
        small_layout(cfg, 4)
    small = small_config(QWEN3_30B_A3B, small_layout(cfg, 8))
    assert (small["num_attention_heads"], small["num_key_value_heads"]) == (4, 2)  # two shards have some of their own
    assert (small["num_experts"], small["num_experts_per_tok"], small["head_dim"]) == (8, 2, 32)


def test_right_layouts_agree(ranks, tmp_path):
    assert wrong(ranks, tmp_path, LLAMA_70B, [*CP2_TP2, *FULL]) == set()


def test_experts_agree(ranks, tmp_path):
    assert wrong(ranks, tmp_path, QWEN3_30B_A3B, EP2_TP2) == set()


@pytest.mark.slow
def test_latent_attention_agrees(ranks, tmp_path):
    stages = ["parallel.pipeline_model_parallel_size=4", "parallel.context_parallel_size=2"]
    assert wrong(ranks, tmp_path, DEEPSEEK_V3, stages) == set()


# Of every algorithm, a loss with all it asks for; of preference and unpaired those that need more than others.
LOSSES = {
    "sft": [],
    "preference": [],
    "preference: longpo": ["preference.loss=longpo", "data.reference_prompt_key=short"],
    "preference: rpo_sq": ["preference.loss=rpo_sq"],
    "preference: bco_pair": ["preference.loss=bco_pair"],
    "preference: simpo": ["preference.loss=simpo"],
    "unpaired": ["preference.loss=kto"],
    "unpaired: bco": ["preference.loss=bco", "preference.bco_density_ratio=true"],
    "reward_model": ["preference.margin_from_scores=true", "preference.center_rewards_coef=0.1"],
    "grpo": [*TERMS, "rollout.response_length_stages=[{first_step: 1, max_response_length: 512}]"],
    "ppo": ["loss.loss_agg_mode=seq-mean-token-sum-norm"],
    "remax": ["rollout.temperature=0.7", "loss.loss_agg_mode=seq-mean-token-sum"],
    "prime": [],
    "online_dpo": ["train.train_global_batch_size=64"],
    "distillation": ["teacher.path=models/none", "loss.policy_loss=reinforce"],
}


def test_every_algorithm_has_its_losses():
    assert {name.partition(":")[0] for name in LOSSES} == ALGORITHMS.keys()


@pytest.mark.parametrize("name", by_default("ppo", "preference", "unpaired", of=LOSSES))
def test_every_loss_agrees(ranks, tmp_path, name):
    """Over context parallelism, which only a loss of whole sequences survives, and several microbatches."""
    overrides = [f"algorithm={name.partition(':')[0]}", *LOSSES[name], "parallel.context_parallel_size=2"]
    assert wrong(ranks, tmp_path, LLAMA_70B, overrides, max_ranks=2) == set()


def test_models_beside_the_policy_are_compared_too(tmp_path):
    expected = {
        "ppo": [("policy", False), ("critic", True)],
        "prime": [("policy", False), ("process reward model", False)],
        "reward_model": [("reward model", True)],
    }
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    for algorithm, models in expected.items():
        cfg = load([str(tmp_path / "recipe.yaml"), f"algorithm={algorithm}"], check_model=False)
        assert [(case.name, case.scalar_head) for case in cases_of(cfg)] == models


# ---- planted bugs ----


@pytest.mark.slow
def test_a_loss_scaled_by_cp_is_found(ranks, tmp_path):
    """Gradients are half as large; losses and log-probs are as they were."""
    found = wrong(ranks, tmp_path, LLAMA_70B, CP2_TP2, "loss scaled by CP")
    assert "gradient norm" in found and "loss" not in found and "log-probs" not in found
    assert len(found) == 1 + 39  # every tensor


@pytest.mark.slow
def test_a_shifted_label_is_found(ranks, tmp_path):
    assert {"loss", "log-probs"} <= wrong(ranks, tmp_path, LLAMA_70B, CP2_TP2, "label shifted by one")


@pytest.mark.slow
def test_a_norm_that_is_not_reduced_is_found(ranks, tmp_path):
    found = wrong(ranks, tmp_path, LLAMA_70B, CP2_TP2, "norms not reduced over SP")
    assert {what for what in found if what.startswith("model.")} == {
        *(
            f"model.layers.{i}.{norm}.weight"
            for i in range(4)
            for norm in ("input_layernorm", "post_attention_layernorm")
        ),
        "model.norm.weight",
    }


def test_a_router_gradient_counted_twice_is_found(ranks, tmp_path):
    found = wrong(ranks, tmp_path, QWEN3_30B_A3B, EP2_TP2, "router gradient counted twice")
    assert {what for what in found if what.startswith("model.")} == {
        f"model.layers.{i}.mlp.gate.weight" for i in range(4)
    }


# On one rank against one rank: the truth does neither.
ALONE = ["cluster.num_nodes=1", "cluster.gpus_per_node=1"]


def test_attention_over_the_whole_pack_is_found(ranks, tmp_path):
    found = wrong(ranks, tmp_path, LLAMA_70B, ALONE, "attention over the whole pack")
    assert {"loss", "log-probs", "gradient norm"} <= found


def test_a_mean_of_microbatches_means_is_found(ranks, tmp_path):
    found = wrong(ranks, tmp_path, LLAMA_70B, ALONE, "mean of microbatches' means")
    assert "log-probs" not in found and "gradient norm" in found
