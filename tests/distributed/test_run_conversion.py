"""A training run's checkpoint, converted by the command, is the Hugging Face directory that the run itself exports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megarl.cli import main
from tests.convert_cases import assert_same, load_hf
from tests.distributed import resume_cases
from tests.distributed.ranks import RankPool

RECIPE = """
cluster: {{gpus_per_node: {world}, device: cpu}}
run: {{root: {root}, max_num_steps: 2}}
model: {{path: {model}, dtype: bf16}}
optimizer: {{lr: 1.0e-2}}
train: {{train_global_batch_size: 8, train_mb_tokens: 200, logprob_mb_tokens: 300}}
data: {{path: {data}, apply_chat_template: false, max_prompt_length: 8}}
rollout: {{num_prompts_per_step: 4, num_generations_per_prompt: 4, max_response_length: 6, kv_cache_gb: 0.02}}
reward: {{workers: 1, functions: [{{name: "tests.fixtures.digits:even"}}]}}
"""
LAYOUTS = {
    "TP2": (2, ["parallel.tensor_model_parallel_size=2"]),
    "PP2": (2, ["parallel.pipeline_model_parallel_size=2"]),
    "1 rank": (1, []),
}


def convert(*args: object) -> None:
    assert main(["convert", *map(str, args)]) == 0


@pytest.mark.parametrize(
    "algorithm, layout",
    [("sft", "TP2"), ("reward_model", "PP2"), pytest.param("ppo", "1 rank", marks=pytest.mark.slow)],
)
def test_a_runs_checkpoint_is_its_export(
    ranks: RankPool, tiny_chat_model: Path, tmp_path: Path, algorithm: str, layout: str
) -> None:
    rows = [(f"{a}+{b}=", str(a + b), str(a + b + 1)) for a in range(4) for b in range(4)]
    names = ("prompt", "chosen", "rejected")
    data = tmp_path / "rows.jsonl"
    records = [dict(zip(names, row, strict=True)) | {"response": row[1], "answer": row[1]} for row in rows]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    world, overrides = LAYOUTS[layout]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(world=world, root=tmp_path / "runs", model=tiny_chat_model, data=data))
    overrides = [*overrides, "run.name=it", f"algorithm={algorithm}"]
    assert ranks.run(resume_cases.train, world, recipe=str(recipe), overrides=overrides) == [None] * world
    checkpoint, export = tmp_path / "runs" / "it" / "checkpoints", tmp_path / "runs" / "it" / "hf" / "final"
    exported = load_hf(export)
    convert("mcore2hf", checkpoint, tmp_path / "weights", "--config-from", tiny_chat_model)
    assert_same(exported, load_hf(tmp_path / "weights"))
    # The optimizer's fp32 weights, of which the model's are roundings; at this learning rate not the same numbers.
    convert("mcore2hf", checkpoint, tmp_path / "masters", "--config-from", tiny_chat_model, "--from-master")
    masters = load_hf(tmp_path / "masters")
    assert all(tensor.dtype == torch.float32 for tensor in masters.values())
    assert_same(exported, {name: tensor.to(exported[name].dtype) for name, tensor in masters.items()})
    assert any(not torch.equal(tensor, exported[name].float()) for name, tensor in masters.items())
    if algorithm == "ppo":
        convert("mcore2hf", checkpoint, tmp_path / "critic", "--config-from", tiny_chat_model, "--part", "critic")
        critic = load_hf(tmp_path / "critic")
        assert critic.keys() == exported.keys() | {"score.weight"} and critic["score.weight"].any()
