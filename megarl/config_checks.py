"""What a well-typed config can still get wrong: values out of range, and sizes that do not fit each other.

Contract: a check is a generator over a config that yields `Problem`s; it changes nothing and starts nothing. A
problem shows the arithmetic (`512 % 384 = 128`) and names the fields it rests on: `check` leaves out what rests on a
value that is wrong anyway. Most checks need the config alone; those under "this machine" read the model's directory
and look for files and GPUs.
"""

import difflib
import importlib.util
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megarl.config import Config
    from megarl.model.family import ModelSpec

# Where a number may lie. A field that is null is not checked.
RANGES = {
    "run.seed": "[0, 4294967295]",
    "run.max_num_steps": "[1, inf)",
    "run.max_num_epochs": "[1, inf)",
    "run.deadline_s": "(0, inf)",
    "cluster.num_nodes": "[1, inf)",
    "cluster.gpus_per_node": "[1, inf)",
    "model.logprob_chunk_size": "[1, inf)",
    "model.recompute_num_layers": "[1, inf)",
    "parallel.tensor_model_parallel_size": "[1, inf)",
    "parallel.pipeline_model_parallel_size": "[1, inf)",
    "parallel.num_layers_in_first_pipeline_stage": "[1, inf)",
    "parallel.num_layers_in_last_pipeline_stage": "[1, inf)",
    "optimizer.lr": "[0, inf)",
    "optimizer.min_lr": "[0, inf)",
    "optimizer.lr_warmup_iters": "[0, inf)",
    "optimizer.lr_decay_iters": "[1, inf)",
    "optimizer.weight_decay": "[0, inf)",
    "optimizer.adam_beta1": "[0, 1)",
    "optimizer.adam_beta2": "[0, 1)",
    "optimizer.adam_eps": "(0, inf)",
    "optimizer.clip_grad": "[0, inf)",
    "train.train_global_batch_size": "[1, inf)",
    "train.train_mb_tokens": "[1, inf)",
    "train.logprob_mb_tokens": "[1, inf)",
    "train.ppo_epochs": "[1, inf)",
    "data.max_prompt_length": "[1, inf)",
    "data.max_records": "[1, inf)",
    "rollout.num_prompts_per_step": "[1, inf)",
    "rollout.num_generations_per_prompt": "[1, inf)",
    "rollout.tensor_parallel_size": "[1, inf)",
    "rollout.max_response_length": "[1, inf)",
    "rollout.temperature": "[0, inf)",
    "rollout.top_p": "(0, 1]",
    "rollout.top_k": "[-1, inf)",
    "rollout.gpu_memory_utilization": "(0, 1]",
    "rollout.max_model_len": "[1, inf)",
    "rollout.max_num_seqs": "[1, inf)",
    "rollout.max_num_batched_tokens": "[1, inf)",
    "rollout.kv_cache_gb": "(0, inf)",
    "reward.workers": "[1, inf)",
    "reward.timeout_s": "(0, inf)",
    "advantage.eps": "[0, inf)",
    "loss.clip_ratio_low": "[0, 1]",
    "loss.clip_ratio_high": "[0, inf)",
    "loss.clip_ratio_c": "(1, inf)",
    "loss.kl_loss_coef": "[0, inf)",
    "loss.entropy_coef": "[0, inf)",
    "loss.truncated_importance_sampling_ratio": "(0, inf)",
    "validation.val_period": "[0, inf)",
    "validation.max_val_samples": "[1, inf)",
    "validation.val_temperature": "[0, inf)",
    "validation.val_top_p": "(0, 1]",
    "validation.val_num_generations_per_prompt": "[1, inf)",
    "weight_sync.bucket_size_mb": "[1, inf)",
    "weight_sync.max_gen_kl_error": "(0, inf)",
    "weight_sync.max_token_mult_prob_error": "(0, inf)",
    "checkpoint.save_period": "[0, inf)",
}
RECOMPUTE_MODULES = ("core_attn", "layernorm", "mlp")  # megatron's, less those of MoE and latent attention
WORLD = ("cluster.num_nodes", "cluster.gpus_per_node")
TP = "parallel.tensor_model_parallel_size"
PP = "parallel.pipeline_model_parallel_size"
FIRST = "parallel.num_layers_in_first_pipeline_stage"
LAST = "parallel.num_layers_in_last_pipeline_stage"
ROLLOUT_TP = "rollout.tensor_parallel_size"
LENGTHS = ("data.max_prompt_length", "rollout.max_response_length")


Problems = Iterator["Problem"]


@dataclass(frozen=True)
class Problem:
    """What is wrong, and the fields that say so (none: nothing could make it an echo)."""

    text: str
    fields: tuple[str, ...]


def check(cfg: "Config", world: int, refused: set[str], *, this_machine: bool) -> list[str]:
    """Every problem of a config for `world` ranks, but for echoes of the values that were `refused` before."""
    ranges = list(_ranges(cfg))  # no echoes here: a refused value left its default behind, which is in range
    refused = refused.union(*(problem.fields for problem in ranges))
    others = [*_run_folder(cfg), *_recompute(cfg), *_schedule(cfg), *_names(cfg), *_layout(cfg, world)]
    if cfg.algorithm == "grpo":
        others += [*_grpo(cfg), *_lengths(cfg)]
    if this_machine:
        others += [*check_model(cfg), *_files(cfg), *_devices(cfg)]
    return [problem.text for problem in ranges] + [problem.text for problem in others if not _echo(problem, refused)]


def _echo(problem: Problem, refused: set[str]) -> bool:
    """Whether a field of the problem, or its whole section, was refused."""
    return any(field in refused or field.partition(".")[0] in refused for field in problem.fields)


# ---- values on their own ----


def _ranges(cfg: "Config") -> Problems:
    for path, interval in RANGES.items():
        section, name = path.split(".")
        value = vars(vars(cfg)[section])[name]
        if value is not None and not in_interval(value, interval):
            yield Problem(f"{path} = {value} is outside {interval}", (path,))
    for i, function in enumerate(cfg.reward.functions):
        if not math.isfinite(function.weight):
            yield Problem(f"reward.functions[{i}].weight = {function.weight} is not finite", ("reward.functions",))
    if cfg.rollout.top_k == 0:
        yield Problem("rollout.top_k = 0 would keep no token; -1 keeps all", ("rollout.top_k",))


def in_interval(value: float, interval: str) -> bool:
    """Whether a number lies in an interval written as "[0, 1)"; NaN lies in none."""
    low, high = map(float, interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below


def _run_folder(cfg: "Config") -> Problems:
    """A run's folder is right inside `run.root`, also when a symbolic link has its name."""
    name, root = cfg.run.name, Path(cfg.run.root).resolve()
    if not name or name in (".", "..") or re.search(r"[/\\\x00-\x1f]", name):
        yield Problem(f"run.name = {name!r} must be a plain folder name, without / or \\", ("run.name",))
    elif (folder := (root / name).resolve()).parent != root:
        text = f"run.name = {name!r}: {root / name} leads out of run.root, to {folder}"
        yield Problem(text, ("run.name", "run.root"))


def _recompute(cfg: "Config") -> Problems:
    """Megatron's rules for activation recomputation."""
    model, path = cfg.model, "model.recompute_"
    granularity = f"{path}granularity = {model.recompute_granularity or 'null'}"
    fields = (f"{path}granularity", f"{path}method", f"{path}num_layers", f"{path}modules")
    full = {"method": model.recompute_method, "num_layers": model.recompute_num_layers}
    for name, value in full.items():
        if model.recompute_granularity == "full" and value is None:
            yield Problem(f"{granularity} needs {path}{name}", fields)
        elif model.recompute_granularity != "full" and value is not None:
            yield Problem(f"{path}{name} = {value} goes with full recompute, but {granularity}", fields)
    if model.recompute_granularity != "selective" and model.recompute_modules:
        yield Problem(f"{path}modules goes with selective recompute, but {granularity}", fields)
    if model.recompute_granularity == "selective" and not model.recompute_modules:
        yield Problem(f"{granularity} needs {path}modules, of {', '.join(RECOMPUTE_MODULES)}", fields)
    if unknown := [name for name in model.recompute_modules if name not in RECOMPUTE_MODULES]:
        yield Problem(f"{path}modules: {unknown} are not among {', '.join(RECOMPUTE_MODULES)}", fields)


def _schedule(cfg: "Config") -> Problems:
    optimizer = cfg.optimizer
    if optimizer.min_lr > optimizer.lr:
        text = f"optimizer.min_lr = {optimizer.min_lr} is above optimizer.lr = {optimizer.lr}"
        yield Problem(text, ("optimizer.min_lr", "optimizer.lr"))
    if optimizer.lr_decay_iters is not None and optimizer.lr_warmup_iters >= optimizer.lr_decay_iters:
        yield Problem(
            f"optimizer.lr_warmup_iters = {optimizer.lr_warmup_iters} leaves nothing of "
            f"optimizer.lr_decay_iters = {optimizer.lr_decay_iters}",
            ("optimizer.lr_warmup_iters", "optimizer.lr_decay_iters"),
        )
    if cfg.validation.val_period > 0 and cfg.data.val_path is None:
        text = f"validation.val_period = {cfg.validation.val_period}, but there is no data.val_path to validate on"
        yield Problem(text, ("validation.val_period", "data.val_path"))


def _names(cfg: "Config") -> Problems:
    """Names that refer to something elsewhere in the code."""
    from megarl.rewards import REWARDS

    if cfg.data.adapter is not None:
        from megarl.data.adapters import ADAPTERS  # brings the readers' libraries, which take a second

        if cfg.data.adapter not in ADAPTERS:
            text = f"data.adapter = {cfg.data.adapter!r} is not one of {', '.join(ADAPTERS)}"
            yield Problem(text, ("data.adapter",))
    names = [function.name for function in cfg.reward.functions]
    if not names and cfg.algorithm == "grpo":
        yield Problem("reward.functions is empty: grpo needs a reward", ("reward.functions",))
    for name in names:
        if name not in REWARDS and ":" not in name:
            near = difflib.get_close_matches(name, REWARDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(REWARDS)}, or package.module:function"
            yield Problem(f"reward.functions: unknown reward {name!r}; {hint}", ())
    if twice := sorted({name for name in names if names.count(name) > 1}):
        yield Problem(f"reward.functions has {', '.join(twice)} more than once", ())


# ---- sizes that have to fit each other ----


def _layout(cfg: "Config", world: int) -> Problems:
    """Ranks over tensor, pipeline and data parallelism, and over vLLM engines."""
    tp, pp = cfg.parallel.tensor_model_parallel_size, cfg.parallel.pipeline_model_parallel_size
    rollout_tp, batch = cfg.rollout.tensor_parallel_size, cfg.train.train_global_batch_size
    if rest := _remainder(world, tp * pp):
        text = f"{world} ranks cannot be divided by {TP} {tp} x {PP} {pp} = {tp * pp}: {world} % {tp * pp} = {rest}"
        yield Problem(text, (*WORLD, TP, PP))
    elif batch < (replicas := world // max(1, tp * pp)):
        yield Problem(
            f"train.train_global_batch_size = {batch} sequences are too few for {replicas} data-parallel ranks: "
            f"{world} ranks / ({TP} {tp} x {PP} {pp}) = {replicas}",
            (*WORLD, TP, PP, "train.train_global_batch_size"),
        )
    if cfg.algorithm == "grpo" and (rest := _remainder(world, rollout_tp)):
        text = f"{world} ranks cannot be divided by {ROLLOUT_TP} {rollout_tp}: {world} % {rollout_tp} = {rest}"
        yield Problem(text, (*WORLD, ROLLOUT_TP))
    if cfg.parallel.sequence_parallel and tp == 1:
        text = f"parallel.sequence_parallel divides activations over tensor-parallel ranks, but {TP} = 1"
        yield Problem(text, ("parallel.sequence_parallel", TP))
    for path, layers in ((FIRST, _first(cfg)), (LAST, _last(cfg))):
        if layers is not None and pp == 1:
            yield Problem(f"{path} = {layers} needs more than one stage, but {PP} = 1", (path, PP))


def _grpo(cfg: "Config") -> Problems:
    """Groups and batches of a step."""
    rollout, batch = cfg.rollout, cfg.train.train_global_batch_size
    prompts, group = rollout.num_prompts_per_step, rollout.num_generations_per_prompt
    if rest := _remainder(prompts * group, batch):
        yield Problem(
            f"rollout.num_prompts_per_step {prompts} x rollout.num_generations_per_prompt {group} = {prompts * group} "
            f"sequences a step do not make whole updates of train.train_global_batch_size {batch} sequences: "
            f"{prompts * group} % {batch} = {rest}",
            (
                "rollout.num_prompts_per_step",
                "rollout.num_generations_per_prompt",
                "train.train_global_batch_size",
            ),
        )
    if group == 1:
        text = "rollout.num_generations_per_prompt = 1: a group of one is its own mean, so every advantage is r - r = 0"
        yield Problem(text, ("rollout.num_generations_per_prompt",))
    if rollout.temperature == 0:
        text = "rollout.temperature = 0: greedy samples of a group are all alike and have no log-probs; use 1.0"
        yield Problem(text, ("rollout.temperature",))
    if rollout.max_num_batched_tokens is not None and rollout.max_num_batched_tokens < rollout.max_num_seqs:
        yield Problem(
            f"rollout.max_num_batched_tokens = {rollout.max_num_batched_tokens} is less than a token for each of "
            f"rollout.max_num_seqs = {rollout.max_num_seqs}",
            ("rollout.max_num_batched_tokens", "rollout.max_num_seqs"),
        )


def _lengths(cfg: "Config") -> Problems:
    """The longest sequence has to fit vLLM's plan and every microbatch."""
    longest, words = _longest(cfg)
    limits = {
        "rollout.max_model_len": cfg.rollout.max_model_len,
        "train.train_mb_tokens": cfg.train.train_mb_tokens,
        "train.logprob_mb_tokens": cfg.train.logprob_mb_tokens,
    }
    for path, limit in limits.items():
        if limit is not None and limit < longest:
            yield Problem(f"{path} = {limit} is less than the longest sequence: {words}", (path, *LENGTHS))


# ---- this machine ----


def check_model(cfg: "Config") -> Problems:
    """The model's config.json: a family that is computed here, and sizes that the layout can divide."""
    from megarl.model.family import read_spec

    folder = Path(cfg.model.path)
    if not folder.is_dir():
        text = f"model.path = {cfg.model.path!r} is not a folder; it takes a Hugging Face directory on this machine"
        yield Problem(text, ("model.path",))
        return
    if not (folder / "config.json").is_file():
        yield Problem(f"model.path = {cfg.model.path!r} has no config.json", ("model.path",))
        return
    try:
        spec = read_spec(folder)
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:  # whatever odd JSON leads to
        yield Problem(f"model.path = {cfg.model.path!r}: {type(error).__name__}: {error}", ("model.path",))
        return
    yield from _model_tensors(cfg, spec)
    yield from _model_layers(cfg, spec)
    if cfg.algorithm == "grpo":
        yield from _model_positions(cfg, spec)


def _model_tensors(cfg: "Config", spec: "ModelSpec") -> Problems:
    """Heads and MLP over tensor-parallel ranks, of the policy and of vLLM."""
    sizes = {TP: cfg.parallel.tensor_model_parallel_size}
    if cfg.algorithm == "grpo":
        sizes[ROLLOUT_TP] = cfg.rollout.tensor_parallel_size
    heads, kv_heads = spec.num_attention_heads, spec.num_query_groups
    for path, tp in sizes.items():
        for what, size in (("attention heads", heads), ("MLP columns", spec.ffn_hidden_size)):
            if rest := _remainder(size, tp):
                text = f"the model's {size} {what} cannot be divided by {path} {tp}: {size} % {tp} = {rest}"
                yield Problem(text, ("model.path", path))
        if _remainder(kv_heads, tp) and _remainder(tp, kv_heads):
            yield Problem(
                f"the model's {kv_heads} key/value heads and {path} {tp} do not divide one another: "
                f"{kv_heads} % {tp} = {kv_heads % tp}, {tp} % {kv_heads} = {tp % kv_heads}",
                ("model.path", path),
            )


def _model_layers(cfg: "Config", spec: "ModelSpec") -> Problems:
    """Layers over pipeline stages: the first and last may be set apart, those between are alike."""
    stages = cfg.parallel.pipeline_model_parallel_size
    apart = [layers for layers in (_first(cfg), _last(cfg)) if layers is not None]
    if stages == 1:
        return
    middle, between = spec.num_layers - sum(apart), stages - len(apart)
    minus = "".join(f" - {layers}" for layers in apart)
    words = f"the model's {spec.num_layers} layers{minus} = {middle}" if apart else f"the model's {middle} layers"
    if between <= 0:
        if middle != 0:
            yield Problem(f"{words}: {PP} {stages} leaves no stage for them", ("model.path", PP, FIRST, LAST))
    elif middle < between or middle % between:
        count = f"{PP} {stages}" + (f" - {len(apart)} = {between}" if apart else "")
        text = f"{words} cannot be divided over {count} stages: {middle} % {between} = {middle % between}"
        yield Problem(text, ("model.path", PP, FIRST, LAST))


def _model_positions(cfg: "Config", spec: "ModelSpec") -> Problems:
    longest, words = _longest(cfg)
    if longest > spec.max_position_embeddings:
        text = f"the model's max_position_embeddings = {spec.max_position_embeddings} is less than {words}"
        yield Problem(text, ("model.path", *LENGTHS))
    if cfg.rollout.max_model_len is not None and cfg.rollout.max_model_len > spec.max_position_embeddings:
        yield Problem(
            f"rollout.max_model_len = {cfg.rollout.max_model_len} is more than the model's "
            f"max_position_embeddings = {spec.max_position_embeddings}",
            ("model.path", "rollout.max_model_len"),
        )


def _files(cfg: "Config") -> Problems:
    """Data files exist; a path without a known ending is the name of a `datasets` data set."""
    for path, value in (("data.path", cfg.data.path), ("data.val_path", cfg.data.val_path)):
        if value and value.endswith((".jsonl", ".json", ".parquet")) and not Path(value).is_file():
            yield Problem(f"{path} = {value!r}: there is no such file", (path,))


def _devices(cfg: "Config") -> Problems:
    if cfg.logger.wandb_enabled and importlib.util.find_spec("wandb") is None:
        text = "logger.wandb_enabled = true, but wandb is not installed: pip install wandb"
        yield Problem(text, ("logger.wandb_enabled",))
    if cfg.cluster.device != "cuda":
        return
    import torch  # takes seconds, so only where it is asked for

    if not torch.cuda.is_available():
        text = "cluster.device = cuda, but torch finds no CUDA device (`megarl doctor` says more)"
        yield Problem(text, ("cluster.device",))
    elif (found := torch.cuda.device_count()) < cfg.cluster.gpus_per_node:
        text = f"cluster.gpus_per_node = {cfg.cluster.gpus_per_node}, but this machine has {found}"
        yield Problem(text, ("cluster.device", "cluster.gpus_per_node"))


# ---- small sums ----


def _remainder(value: int, divisor: int) -> int:
    """value % divisor; 0 where the divisor is out of range, which is a problem of its own."""
    return value % divisor if divisor > 0 else 0


def _first(cfg: "Config") -> int | None:
    return cfg.parallel.num_layers_in_first_pipeline_stage


def _last(cfg: "Config") -> int | None:
    return cfg.parallel.num_layers_in_last_pipeline_stage


def _longest(cfg: "Config") -> tuple[int, str]:
    """Tokens of the longest sequence, and how they come about."""
    prompt, response = cfg.data.max_prompt_length, cfg.rollout.max_response_length
    words = f"data.max_prompt_length {prompt} + rollout.max_response_length {response} = {prompt + response}"
    return prompt + response, words
