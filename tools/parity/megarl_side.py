"""megarl's side of tools/compare_trl.py: ``megarl_side.py <folder> <method> ...``.

Writes <folder>/megarl.json as trl_side.py writes trl.json. Methods that learn from data run as `megarl.train` runs
them; those that sample run the steps of their loop between sampling and the push, on the completions of the file.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from methods import BATCH, GROUP, MAX_COMPLETION, METHODS, STEPS, Method, read

from megarl.algorithms import ALGORITHMS
from megarl.algorithms.credit import ESTIMATORS, Step, give
from megarl.algorithms.onpolicy import attach
from megarl.config import Config, load
from megarl.data.records import Sample
from megarl.data.tokenizer import load_tokenizer
from megarl.losses.policy import grpo
from megarl.model.engine import Engine
from megarl.model.family import read_spec
from megarl.observe.metrics import read_metrics
from megarl.observe.run import Run
from megarl.parallel.mesh import Mesh, build_mesh

RECIPE = """
cluster: {{device: cpu}}
run: {{root: {folder}/megarl, max_num_steps: {steps}}}
model: {{path: {model}, dtype: fp32}}
optimizer: {{lr: 1.0e-3, weight_decay: 0.0, clip_grad: 1.0}}
train: {{train_global_batch_size: {batch}, train_mb_tokens: 64, logprob_mb_tokens: 64}}
data: {{path: {data}, apply_chat_template: false, max_prompt_length: 12, shuffle: false}}
rollout: {{max_response_length: {longest}, num_prompts_per_step: {prompts}, num_generations_per_prompt: {group}}}
checkpoint: {{save_at_end: false}}
"""
Curves = dict[str, list[float]]


def config(folder: Path, name: str, method: Method) -> Config:
    data = "labels-reversed" if method.data == "labels" else method.data
    recipe = folder / "megarl.yaml"
    model = folder / ("classifier" if method.trainer.endswith(":RewardTrainer") else "model")
    recipe.write_text(
        RECIPE.format(
            folder=folder,
            model=model,
            data=folder / f"{data}.jsonl",
            steps=STEPS,
            batch=BATCH,
            longest=MAX_COMPLETION,
            prompts=BATCH // GROUP,
            group=GROUP,
        )
    )
    settings = [f"{key}={json.dumps(value)}" for key, value in method.megarl.items()]
    return load([str(recipe), f"run.name={name.replace(' ', '-')}", *settings])


def from_data(cfg: Config, mesh: Mesh) -> Curves:
    """The loop itself."""
    run = Run(cfg, mesh.rank, mesh.world_size, mesh.describe())
    ALGORITHMS[cfg.algorithm](cfg, run, mesh)
    run.finish()
    records = read_metrics(run.dir)
    return {key: [record[f"actor/{key}"] for record in records] for key in ("loss", "grad_norm")}


def from_completions(cfg: Config, mesh: Mesh, folder: Path, updates: int) -> Curves:
    """Log-probabilities, advantages and updates of `megarl.algorithms.grpo`."""
    tokenizer = load_tokenizer(cfg.model)
    policy = Engine(cfg, mesh, read_spec(cfg.model.path), temperature=1.0, total_updates=STEPS)
    reference = policy.weights()
    rows = read(folder, "groups")
    found: Curves = {"loss": [], "grad_norm": []}
    per_step = BATCH // GROUP
    for at in range(0, STEPS // updates * per_step, per_step):
        samples = [
            Sample(row["prompt"], k, [*(prompt := tokenizer(row["prompt"])["input_ids"]), *ids], len(prompt), row=n)
            for n, (row, k, ids) in enumerate(
                (row, k, ids) for row in rows[at : at + per_step] for k, ids in enumerate(row["completions"])
            )
        ]
        with policy.holding(reference):
            attach("ref_logps", policy, samples)
        attach("old_logps", policy, samples)
        scores = torch.tensor([reward for row in rows[at : at + per_step] for reward in row["rewards"]])
        groups = torch.arange(len(samples)) // GROUP
        cut = torch.zeros(len(samples), dtype=torch.bool)  # all end in EOS, or just before the limit
        step = Step(cfg.advantage, scores, groups, cut, samples, mesh, cfg.advantage.kl_coef)
        give(step, ESTIMATORS[cfg.advantage.adv_estimator](step))
        for _ in range(updates):
            metrics = policy.step(samples, partial(grpo, cfg=cfg.loss), loss_agg_mode=cfg.loss.loss_agg_mode)
            for key in found:
                found[key].append(metrics[key])
    return found


def main(folder: Path, names: list[str]) -> None:
    found: dict[str, Any] = {}
    mesh = None
    for name in names:
        method = METHODS[name]
        cfg = config(folder, name, method)
        mesh = mesh or build_mesh(cfg)
        if method.samples:
            found[name] = from_completions(cfg, mesh, folder, method.updates_per_rollout)
        else:
            found[name] = from_data(cfg, mesh)
        (folder / "megarl.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
