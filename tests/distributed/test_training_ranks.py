"""Whole runs on two ranks with real vLLM rollouts: SFT and GRPO on every layout, and what a run leaves behind."""

from __future__ import annotations

import json
import math

import pytest
import torch

from megarl.observe.metrics import read_metrics
from tests.distributed import train_cases

LAYOUTS = {
    "TP2": ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
    "DP2": [],
    "PP2": ["parallel.pipeline_model_parallel_size=2"],
}
RECIPE = """
cluster: {{gpus_per_node: 2, device: cpu}}
run: {{root: {root}, max_num_steps: 2}}
model: {{path: {model}, dtype: fp32}}
optimizer: {{lr: 1.0e-3}}
train: {{train_global_batch_size: 16, train_mb_tokens: 200, logprob_mb_tokens: 300}}
data: {{path: {data}, val_path: {data}, apply_chat_template: false, max_prompt_length: 8}}
rollout: {{num_prompts_per_step: 8, num_generations_per_prompt: 4, max_response_length: 6, kv_cache_gb: 0.02}}
reward: {{workers: 1, functions: [{{name: "tests.fixtures.digits:even"}}]}}
loss: {{kl_loss_coef: 0.01, truncated_importance_sampling_type: tis}}
validation: {{max_val_samples: 8}}
weight_sync: {{bucket_size_mb: 1, max_gen_kl_error: 1.0e-9}}
"""
SFT = [
    "algorithm=sft",
    "loss.kl_loss_coef=0",
    "loss.truncated_importance_sampling_type=none",
    "data.val_path=null",
    "validation.max_val_samples=null",
    "loss.kl_loss_coef=0",
    "loss.truncated_importance_sampling_type=none",
    "optimizer.lr=1.0e-2",
    "run.max_num_steps=4",
]


@pytest.fixture(scope="module")
def recipe(tiny_chat_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    data = folder / "train.jsonl"
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b), "response": str(a + b)} for a in range(8) for b in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(root=folder / "runs", model=tiny_chat_model, data=data))
    return path


def run(ranks, recipe, name, overrides, world=2):
    outcomes = ranks.run(train_cases.train, world, recipe=str(recipe), overrides=[f"run.name={name}", *overrides])
    folder = recipe.parent / "runs" / name
    return outcomes, read_metrics(folder), folder


def test_sft_has_the_same_loss_curve_on_every_layout(ranks, recipe):
    curves = {}
    for name, layout in LAYOUTS.items():
        _, records, _ = run(ranks, recipe, f"sft-{name}", [*SFT, *layout])
        curves[name] = [record["actor/loss"] for record in records]
        assert len(curves[name]) == 4 and curves[name][-1] < curves[name][0]
    for name in LAYOUTS:
        assert curves[name] == pytest.approx(curves["DP2"], rel=1e-4)


def test_a_context_parallel_group_holds_what_one_rank_could_not(ranks, recipe, tmp_path):
    """Of 4 characters + = + 36 + EOS = 42 tokens; a rank holds 24, the two of a group 48. It is learnt, not dropped."""
    data = tmp_path / "long.jsonl"
    rows = [{"prompt": "12+3=", "response": "7" * n} for n in (36, 2, 3)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [f"data.path={data}", "train.train_global_batch_size=3", "train.train_mb_tokens=24"]
    layout = ["parallel.context_parallel_size=2", "run.max_num_steps=1"]
    outcomes, records, _ = run(ranks, recipe, "sft-long", [*SFT, *settings, *layout])
    assert outcomes == ["done", "done"]
    assert records[-1]["perf/total_num_tokens"] == sum(5 + n + 1 for n in (36, 2, 3))
    assert records[-1]["actor/tokens"] == sum(n + 1 for n in (36, 2, 3))


def test_grpo_is_the_same_step_on_every_layout(ranks, recipe):
    """Rollouts do not depend on the trainer's layout, so the first step's numbers are the same ones."""
    first = {}
    for name, layout in LAYOUTS.items():
        outcomes, records, _ = run(ranks, recipe, f"grpo-{name}", layout)
        assert outcomes == ["done", "done"]
        assert [record["step"] for record in records] == [0, 1, 2]
        assert all(record["gen_kl_error"] < 1e-9 for record in records[1:])  # vLLM computes what megatron computes
        first[name] = records[1]
    for name in LAYOUTS:
        for key in (
            "reward/mean",
            "response_length/mean",
            "actor/pg_loss",
            "actor/kl_loss",
            "actor/entropy",
            "actor/grad_norm",
        ):
            assert first[name][key] == pytest.approx(first["DP2"][key], rel=1e-4, abs=1e-7), (name, key)


@pytest.mark.slow
def test_two_engines_of_two_ranks_and_several_updates_per_rollout(ranks, recipe):
    """32 samples are two updates of 16, twice over: the ratio to the old policy leaves 1, and its KL 0."""
    layout = ["cluster.gpus_per_node=4", *LAYOUTS["TP2"], "rollout.tensor_parallel_size=2", "train.ppo_epochs=2"]
    outcomes, records, _ = run(ranks, recipe, "four", [*layout, "run.max_num_steps=1"], world=4)
    assert outcomes == ["done"] * 4
    assert records[-1]["gen_kl_error"] < 1e-9 and records[-1]["actor/ppo_kl"] != 0


def test_what_a_run_leaves_behind(ranks, recipe):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megarl.config import load

    layout = LAYOUTS["TP2"]
    _, records, folder = run(
        ranks, recipe, "artefacts", [*layout, "rollout.tensor_parallel_size=2", "run.max_num_steps=1"]
    )
    assert (folder / "reward.png").stat().st_size > 1000
    assert any(file.name.startswith("events") for file in (folder / "tensorboard").iterdir())
    assert (
        load([str(folder / "config.yaml")]).rollout.tensor_parallel_size == 2
    )  # the resolved config is a recipe again
    assert all(math.isfinite(value) for record in records for value in record.values())
    assert {"timing_s/generate", "timing_s/train", "timing_s/sync", "perf/throughput", "val/accuracy"} <= records[
        -1
    ].keys()
    exported = AutoModelForCausalLM.from_pretrained(folder / "hf" / "final", dtype=torch.float32)
    assert AutoTokenizer.from_pretrained(folder / "hf" / "final").eos_token == "<eos>"
    start = AutoModelForCausalLM.from_pretrained(load([str(folder / "config.yaml")]).model.path, dtype=torch.float32)
    pairs = zip(exported.parameters(), start.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
    # vLLM loads it as well, and computes what megatron does: another run starts from it.
    again = [*layout, f"model.path={folder / 'hf' / 'final'}", "run.max_num_steps=1", "validation.val_at_start=false"]
    outcomes, records, _ = run(ranks, recipe, "again", again)
    assert outcomes == ["done", "done"] and records[-1]["gen_kl_error"] < 1e-9


def test_groups_with_a_broken_reward_are_dropped_and_the_rest_trains(ranks, recipe):
    broken = ["reward.functions=[{name: 'tests.fixtures.digits:raises_on_seven'}]", "run.max_num_steps=1"]
    outcomes, records, _ = run(
        ranks, recipe, "dropped", [*broken, "validation.val_at_start=false", "validation.val_at_end=false"]
    )
    assert outcomes == ["done", "done"]
    assert records[-1]["reward/errors"] > 0 and math.isfinite(records[-1]["actor/loss"])


def test_abort_names_the_prompt_and_the_sample(ranks, recipe):
    broken = ["reward.functions=[{name: 'tests.fixtures.digits:raises_on_seven'}]", "reward.on_error=abort"]
    only_seven = [*broken, "rollout.num_prompts_per_step=64", "train.train_global_batch_size=256"]
    outcomes, _, _ = run(ranks, recipe, "aborted", [*only_seven, "validation.val_at_start=false"])
    assert any("train.jsonl:" in outcome and "ValueError" in outcome for outcome in outcomes)
