"""`megarl verify-resume`: a recipe of any settings is tried as it can be, one that resumes passes, one that does not is
found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megarl.checkpoint.verify import compare, left_out, small_recipe
from megarl.config import load, save
from megarl.verify.shrink import small_layout, write_small_model
from tests.public_models import LLAMA_70B, QWEN3_30B_A3B

ROOT = Path(__file__).parents[2]
# Whole ones, of runs that sample by themselves.
RECIPES = sorted(path for path in (ROOT / "examples").glob("*.yaml") if "mode: remote" not in path.read_text())
RECIPE = """
algorithm: {algorithm}
cluster: {{gpus_per_node: 2, num_nodes: 4, device: cpu}}
model: {{path: {model}, dtype: fp32}}
parallel: {{tensor_model_parallel_size: 2, pipeline_model_parallel_size: 2}}
optimizer: {{lr: 1.0e-2}}
train: {{train_global_batch_size: 64, train_mb_tokens: 200, logprob_mb_tokens: 300}}
data: {{path: {data}, apply_chat_template: false, max_prompt_length: 8}}
rollout: {{num_prompts_per_step: 16, num_generations_per_prompt: 8, max_response_length: 16}}
reward: {{workers: 1, functions: [{{name: "{reward}"}}]}}
checkpoint: {{keep_last: 1, resume_mode: disable, save_period: 1, checkpoint_must_save_by: "00:00:00:01"}}
guard: {{on_bad_steps: rollback}}
"""
# As a user of GPUs has it.
LARGE = """
algorithm: {algorithm}
cluster: {{gpus_per_node: 8, num_nodes: 2}}
model: {{path: {folder}/model}}
data: {{path: {folder}/rows.jsonl}}
"""


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_becomes_one_that_is_small_and_saves(recipe, tmp_path, monkeypatch):
    for name in ("WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    cfg = load([str(recipe), "data.path=rows.jsonl"], check_model=False)
    small = small_recipe(cfg, small_layout(cfg, 8), tmp_path, 4)
    save(small, tmp_path / "small.yaml")
    again = load([str(tmp_path / "small.yaml"), "cluster.device=cpu"], check_model=False)
    assert again.cluster.num_nodes == 1 and again.cluster.gpus_per_node <= 8
    assert again.checkpoint.resume_mode == "auto" and not again.logger.wandb_enabled


FP8 = ["fp8_cfg.enabled=true", "fp8_cfg.first_last_layers_bf16=true"]


@pytest.mark.parametrize(
    "hf, algorithm, settings, left_out_of_it",
    [
        (LLAMA_70B, "grpo", [*FP8, "fp8_cfg.num_layers_at_start_in_bf16=3"], "fp8_cfg"),
        (
            QWEN3_30B_A3B,
            "grpo",
            ["model.recompute_granularity=selective", "model.recompute_modules=[moe_act]"],
            "moe_act",
        ),
        (
            LLAMA_70B,
            "grpo",
            [
                "parallel.context_parallel_size=8",
                "data.max_prompt_length=16384",
                "train.train_mb_tokens=4096",
                "train.logprob_mb_tokens=4096",
            ],
            None,
        ),
        (
            LLAMA_70B,
            "ppo",
            ["critic.own_layout=true", "critic.parallel.tensor_model_parallel_size=8"],
            "critic.own_layout",
        ),
        (
            LLAMA_70B,
            "sft",
            [
                "parallel.pipeline_model_parallel_size=2",
                "model.recompute_granularity=full",
                "model.recompute_method=uniform",
                "model.recompute_num_layers=4",
            ],
            None,
        ),
        (LLAMA_70B, "grpo", ["rollout.dynamic_sampling=true"], "rollout.dynamic_sampling"),
    ],
    ids=["fp8", "moe_act", "context", "critic", "uniform", "dynamic_sampling"],
)
def test_what_only_large_models_have_is_made_small_or_left_out(
    tmp_path, monkeypatch, hf, algorithm, settings, left_out_of_it
):
    """The small recipe is one that its ranks accept, with the small model at hand."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(LARGE.format(algorithm=algorithm, folder=tmp_path))
    (tmp_path / "rows.jsonl").touch()
    cfg = load([str(recipe), *settings], check_model=False)
    layout = small_layout(cfg, 8)
    write_small_model(hf, layout, tmp_path / "model", 0, {"max_position_embeddings": hf["max_position_embeddings"]})
    small = small_recipe(cfg, layout, tmp_path, 4)
    save(small, tmp_path / "small.yaml")
    load([str(tmp_path / "small.yaml")])
    said = left_out(cfg, small)
    assert [line.split(":")[0] for line in said if left_out_of_it in line] if left_out_of_it else said == []


def test_numbers_that_differ_are_named():
    straight = {1: {"a": 1.0, "b": float("nan")}, 2: {"a": 2.0}}
    assert compare(straight, {1: {"a": 1.0, "b": float("nan")}, 2: {"a": 2.0}}) == []
    assert compare(straight, {1: {"a": 1.0}, 2: {"a": 2.0000001}}) == [
        "step 1 b: nan straight, None resumed",
        "step 2 a: 2.0 straight, 2.0000001 resumed",
    ]


def verify_resume(model, folder, *more, algorithm="sft", reward="tests.fixtures.digits:even"):
    rows = [{"prompt": f"{a}+{b}=", "response": str(a + b), "answer": "1"} for a in range(5) for b in range(5)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(algorithm=algorithm, model=model, data=folder / "rows.jsonl", reward=reward))
    command = [sys.executable, "-m", "megarl", "verify-resume", str(recipe), *more]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.slow
def test_a_recipe_that_resumes_passes(tiny_chat_model, tmp_path):
    """Its own settings would prove nothing: it keeps one checkpoint, resumes from none, stops after a second, and needs
    four machines."""
    done = verify_resume(tiny_chat_model, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "as TP2 PP2 DP2 on 8 ranks" in done.stdout
    assert "4 steps straight, and 2 + 2 with a stop: every number is the same, bit for bit" in done.stdout


@pytest.mark.slow
def test_a_reward_that_changes_its_mind_is_found(tiny_chat_model, tmp_path):
    settings = ["parallel.tensor_model_parallel_size=1", "parallel.pipeline_model_parallel_size=1", "--max-ranks=1"]
    reward = "tests.fixtures.misbehaving:by_the_clock"
    done = verify_resume(tiny_chat_model, tmp_path, *settings, "--steps=2", algorithm="grpo", reward=reward)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "numbers differ" in done.stdout and "reward/mean:" in done.stdout


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--steps=1"], "leaves nothing before or after the stop"),
        (["--max-ranks=2"], "needs 4 ranks"),
    ],
)
def test_what_cannot_be_tried_is_said(tiny_chat_model, tmp_path, more, said):
    done = verify_resume(tiny_chat_model, tmp_path, *more)
    assert done.returncode == 2 and said in done.stderr
