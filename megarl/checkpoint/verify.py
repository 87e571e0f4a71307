"""`megarl verify-resume`: the proof, for a user's own recipe, that a run which stops and resumes is the same run.

The recipe runs as it is, data, rewards, loss and the kinds of parallelism included, but for a random model of its
family, batches and responses that are as small (`megarl.verify.shrink`): once straight, and once until half-way and
then on from that checkpoint. Every number that the two report has to be the same, to the last bit; a reward that
answers the same question differently is found here.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megarl.config import ClusterConfig, Config, ConfigError, FP8Config, LoggerConfig, ParallelConfig, load, save
from megarl.config.algorithm import ON_POLICY
from megarl.config.machine import count_gpus
from megarl.observe.metrics import read_metrics
from megarl.verify.shrink import SmallLayout, small_layout, small_recomputation, write_small_model

# Numbers of the clock, and of when a thread had written.
UNLIKE = ("timing_s/", "perf/", "checkpoint/")
PROMPTS, SAMPLES, TOKENS = 4, 4, 16  # of a step: at most so many prompts, samples of each, tokens of a response
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)
# Of config.json: what the tokenizer's ids and the data's lengths need.
_OF_THE_TOKENIZER = ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


def verify(cfg: Config, steps: int, max_ranks: int = 8) -> int:
    """Print what differs. Returns 0 if nothing does, 1 if something does or a run failed, 2 for a recipe that cannot be
    tried."""
    if steps < 2:
        print(f"megarl verify-resume: --steps {steps} leaves nothing before or after the stop", file=sys.stderr)
        return 2
    if cfg.rollout.mode == "remote":
        print("megarl verify-resume: rollout.mode=remote: what servers sample depends on when they do", file=sys.stderr)
        return 2
    try:
        source = Path(cfg.model.path)
        hf = json.loads((source / "config.json").read_text())
        layout = small_layout(cfg, max_ranks)
    except (FileNotFoundError, ValueError) as error:
        print(f"megarl verify-resume: {error}", file=sys.stderr)
        return 2
    half = steps // 2
    with tempfile.TemporaryDirectory(prefix="megarl-verify-") as scratch:
        root = Path(scratch)
        for name in ("model", "teacher"):
            kept = {key: hf[key] for key in _OF_THE_TOKENIZER if key in hf}
            write_small_model(hf, layout, root / name, cfg.run.seed + (name == "teacher"), kept)
            _copy_tokenizer(source, root / name)
        small = small_recipe(cfg, layout, root, steps)
        save(small, root / "recipe.yaml")
        try:
            load([str(root / "recipe.yaml")])
        except ConfigError as error:
            print(f"megarl verify-resume: made small, the recipe does not hold: {error}", file=sys.stderr)
            return 2
        print(f"{hf['architectures'][0]}, made small, as {layout.describe()} on {layout.world_size} ranks", flush=True)
        for line in left_out(cfg, small):
            print(f"  left out: {line}", flush=True)
        for name, period in (("straight", steps + 1), ("resumed", half), ("resumed", half)):
            second = (root / name).exists()
            if second:
                _forget_the_end(root / name, half)
            said, failed = _train(root / "recipe.yaml", [f"run.name={name}", f"checkpoint.save_period={period}"])
            if not failed and second and f"resumed from step {half}:" not in said:
                failed, said = True, f"it did not resume from step {half}, but began again:\n{said}"
            if failed:
                print(f"megarl verify-resume: the {name} run failed:\n{said[-3000:]}", file=sys.stderr)
                return 1
        straight, resumed = (_numbers(root / name) for name in ("straight", "resumed"))
    different = compare(straight, resumed)
    for line in different[:20]:
        print(line)
    where = f"{steps} steps straight, and {half} + {steps - half} with a stop"
    print(f"{where}: " + (f"{len(different)} numbers differ" if different else "every number is the same, bit for bit"))
    return 1 if different else 0


def small_recipe(cfg: Config, layout: SmallLayout, root: Path, steps: int) -> Config:
    """The recipe with the small models in ``root``, for so many steps. What would keep the proof from proving anything
    is set: where checkpoints go, what they hold, which stay, and that the run goes on from them."""
    device = "cuda" if count_gpus(cfg.cluster.device) >= layout.world_size else "cpu"
    fp8 = cfg.fp8_cfg if device == "cuda" else FP8Config()
    ends = {name: min(vars(fp8)[name], 1) for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")}
    # Fewer context-parallel ranks have to hold the same sequences.
    shared = -(-cfg.parallel.context_parallel_size // layout.parallel.context_parallel_size)
    budgets = {name: shared * vars(cfg.train)[name] for name in ("train_mb_tokens", "logprob_mb_tokens")}
    r, prompts = cfg.rollout, min(cfg.rollout.num_prompts_per_step, PROMPTS)
    samples = min(r.num_generations_per_prompt, SAMPLES)
    units, small_units = r.num_prompts_per_step, prompts  # what updates are counted in: pairs, or samples
    if cfg.algorithm != "online_dpo":
        units, small_units = units * r.num_generations_per_prompt, small_units * samples
    batch = min(cfg.train.train_global_batch_size, 2 * PROMPTS)
    if cfg.algorithm in ON_POLICY:
        several = units > cfg.train.train_global_batch_size and small_units % 2 == 0
        batch = small_units // 2 if several else small_units
    return dataclasses.replace(
        cfg,
        cluster=ClusterConfig(num_nodes=1, gpus_per_node=layout.world_size, device=device),
        run=dataclasses.replace(cfg.run, root=str(root), max_num_steps=steps, max_num_epochs=1_000_000),
        model=small_recomputation(
            dataclasses.replace(cfg.model, path=str(root / "model")), transformer_engine=device == "cuda"
        ),
        fp8_cfg=dataclasses.replace(fp8, **ends),
        parallel=layout.parallel,
        train=dataclasses.replace(cfg.train, train_global_batch_size=batch, **budgets),
        rollout=dataclasses.replace(
            r,
            num_prompts_per_step=prompts,
            num_generations_per_prompt=samples,
            max_response_length=min(r.max_response_length, TOKENS),
            response_length_stages=[],
            tensor_parallel_size=min(r.tensor_parallel_size, 2, layout.world_size),
            max_model_len=None,
            max_num_batched_tokens=None,
            kv_cache_gb=min(r.kv_cache_gb, 0.1),
            quantization=None,
            # Of a random model's responses no group may have different rewards.
            dynamic_sampling=False,
            dynamic_sampling_min_reward=None,
            dynamic_sampling_max_reward=None,
            dynamic_sampling_refill=False,
        ),
        reward=dataclasses.replace(cfg.reward, overlong_buffer_len=min(cfg.reward.overlong_buffer_len, TOKENS // 2)),
        critic=dataclasses.replace(cfg.critic, path=None, own_layout=False, parallel=ParallelConfig()),
        prime=dataclasses.replace(cfg.prime, path=None),
        teacher=dataclasses.replace(cfg.teacher, path=str(root / "teacher") if cfg.teacher.path else None),
        validation=dataclasses.replace(cfg.validation, max_val_samples=2 * PROMPTS if cfg.data.val_path else None),
        # Random models may sample and compute further apart than the user's; that is `megarl verify`'s matter.
        weight_sync=dataclasses.replace(cfg.weight_sync, max_gen_kl_error=None, max_token_mult_prob_error=None),
        checkpoint=dataclasses.replace(
            cfg.checkpoint,
            save_at_end=False,
            save_contents=["model", "optimizer"],
            keep_last=1000,
            resume_mode="auto",
            resume_from_path=None,
            checkpoint_must_save_by=None,
            on_save_error="stop",
        ),
        logger=LoggerConfig(),
    )


def left_out(cfg: Config, small: Config) -> list[str]:
    """What of the recipe the proof is not about."""
    modules = [name for name in cfg.model.recompute_modules if name not in small.model.recompute_modules]
    parts = {
        "fp8_cfg, which needs GPUs": cfg.fp8_cfg.enabled and not small.fp8_cfg.enabled,
        f"model.recompute_modules {', '.join(modules)}, which need Transformer Engine": bool(modules),
        "rollout.dynamic_sampling: a random model's groups may all have one reward": cfg.rollout.dynamic_sampling,
        "critic.own_layout: its critic lies as its policy does": cfg.critic.own_layout,
    }
    return [line for line, is_so in parts.items() if is_so]


def _copy_tokenizer(source: Path, target: Path) -> None:
    for pattern in _TOKENIZER:
        for path in source.glob(pattern):
            shutil.copy(path, target)


def _train(recipe: Path, overrides: Sequence[str]) -> tuple[str, bool]:
    """Run it as `megarl train` does: (what it printed, whether it failed)."""
    command = [sys.executable, "-m", "megarl", "train", str(recipe), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr, done.returncode != 0


def _forget_the_end(run: Path, step: int) -> None:
    """Leave the run as a kill after ``step`` would have: with that checkpoint as its newest."""
    from megarl.checkpoint.folder import CHECKPOINTS, discard, finished, point, step_of

    for folder in finished(run / CHECKPOINTS):
        if step_of(folder) != step:
            discard(folder)
    point(run / CHECKPOINTS, step)


def _numbers(run: Path) -> dict[int, dict[str, Any]]:
    records = read_metrics(run)
    return {r["step"]: {k: v for k, v in r.items() if not k.startswith(UNLIKE)} for r in records}


def compare(straight: dict[int, dict[str, Any]], resumed: dict[int, dict[str, Any]]) -> list[str]:
    """Every number that the two do not share, as a line; NaN equals NaN."""
    lines = []
    for step in sorted({*straight, *resumed}):
        theirs, ours = straight.get(step, {}), resumed.get(step, {})
        for name in sorted({*theirs, *ours}):
            a, b = theirs.get(name), ours.get(name)
            if a != b and not (a != a and b != b):
                lines.append(f"step {step} {name}: {a} straight, {b} resumed")
    return lines
