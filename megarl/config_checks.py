"""All checks of a config, and of them those whose numbers have to fit each other, the launch or this machine.

Contract: a check is a generator over a config that yields `Problem`s; it changes nothing and starts nothing. A
problem shows the arithmetic (`512 % 384 = 128`) and names the fields it rests on: `check` leaves out what rests on a
value that is wrong anyway. Most checks need the config alone; those under "this machine" read the model's directory
and megatron's source, and look for files and GPUs.
"""

import ast
import difflib
import importlib.util
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from megarl.config_values import OWNED_OVERRIDES, Problem, Problems, check_ranges, check_values

if TYPE_CHECKING:
    from megarl.config import Config
    from megarl.model.family import ModelSpec

WORLD = ("cluster.num_nodes", "cluster.gpus_per_node")
TP = "parallel.tensor_model_parallel_size"
PP = "parallel.pipeline_model_parallel_size"
EP = "parallel.expert_model_parallel_size"
ETP = "parallel.expert_tensor_parallel_size"
FIRST = "parallel.num_layers_in_first_pipeline_stage"
LAST = "parallel.num_layers_in_last_pipeline_stage"
ROLLOUT_TP = "rollout.tensor_parallel_size"
LENGTHS = ("data.max_prompt_length", "rollout.max_response_length")


def check(cfg: "Config", launched: int | None, refused: set[str], *, this_machine: bool) -> list[str]:
    """Every problem of a config, but for echoes of the values that were `refused` before.

    `launched` is the number of ranks that a launcher started; None before the launch.
    """
    ranges = list(check_ranges(cfg))  # no echoes here: a refused value left its default behind, which is in range
    refused = refused.union(*(problem.fields for problem in ranges))
    others = [*check_values(cfg), *_launch(cfg, launched), *_layout(cfg)]
    if cfg.algorithm == "grpo":
        others += [*_engines(cfg), *_grpo(cfg), *_lengths(cfg)]
    else:
        others += _examples(cfg)
    if this_machine:
        others += [*check_model(cfg), *_override_names(cfg), *_files(cfg), *_loggers(cfg)]
        if launched or cfg.cluster.num_nodes == 1:  # else the ranks will run elsewhere
            others += check_gpus(cfg, count_gpus(cfg.cluster.device))
    return [problem.text for problem in ranges] + [problem.text for problem in others if not _echo(problem, refused)]


def _echo(problem: Problem, refused: set[str]) -> bool:
    """Whether a field of the problem, or its whole section, was refused."""
    return any(field in refused or field.partition(".")[0] in refused for field in problem.fields)


# ---- sizes that have to fit each other ----


def _launch(cfg: "Config", launched: int | None) -> Problems:
    """A launcher started as many ranks as the recipe is made for."""
    nodes, per_node = cfg.cluster.num_nodes, cfg.cluster.gpus_per_node
    if launched is not None and launched != nodes * per_node:
        text = (
            f"{launched} ranks were launched, but cluster.num_nodes {nodes} x cluster.gpus_per_node {per_node} = "
            f"{nodes * per_node}"
        )
        yield Problem(text, WORLD)


def _layout(cfg: "Config") -> Problems:
    """Ranks over tensor, pipeline and data parallelism."""
    world, batch = _world(cfg), cfg.train.train_global_batch_size
    tp, pp = cfg.parallel.tensor_model_parallel_size, cfg.parallel.pipeline_model_parallel_size
    if rest := _remainder(world, tp * pp):
        text = f"{world} ranks cannot be divided by {TP} {tp} x {PP} {pp} = {tp * pp}: {world} % {tp * pp} = {rest}"
        yield Problem(text, (*WORLD, TP, PP))
    else:
        yield from _expert_layout(cfg)
    if not rest and batch < (replicas := world // max(1, tp * pp)):
        yield Problem(
            f"train.train_global_batch_size = {batch} sequences are too few for {replicas} data-parallel ranks: "
            f"{world} ranks / ({TP} {tp} x {PP} {pp}) = {replicas}",
            (*WORLD, TP, PP, "train.train_global_batch_size"),
        )
    if cfg.parallel.sequence_parallel and tp == 1:
        text = f"parallel.sequence_parallel divides activations over tensor-parallel ranks, but {TP} = 1"
        yield Problem(text, ("parallel.sequence_parallel", TP))
    for path, layers in ((FIRST, _first(cfg)), (LAST, _last(cfg))):
        if layers is not None and pp == 1:
            yield Problem(f"{path} = {layers} needs more than one stage, but {PP} = 1", (path, PP))


def _expert_layout(cfg: "Config") -> Problems:
    """Ranks over expert and pipeline parallelism. One model's experts and the rest of it are to be on the same ranks,
    so that the ranks of the smaller share lie within those of the larger."""
    world, tp, pp = _world(cfg), cfg.parallel.tensor_model_parallel_size, cfg.parallel.pipeline_model_parallel_size
    ep, etp = cfg.parallel.expert_model_parallel_size, _etp(cfg)
    fields = (*WORLD, TP, PP, EP, ETP)
    if rest := _remainder(world, ep * etp * pp):
        text = f"{world} ranks cannot be divided by {EP} {ep} x {ETP} {etp} x {PP} {pp} = {ep * etp * pp}"
        yield Problem(f"{text}: {world} % {ep * etp * pp} = {rest}", fields)
    elif _remainder(tp, ep * etp) and _remainder(ep * etp, tp):
        yield Problem(
            f"{TP} {tp} and {EP} {ep} x {ETP} {etp} = {ep * etp} do not divide one another: "
            f"{tp} % {ep * etp} = {tp % (ep * etp)}, {ep * etp} % {tp} = {ep * etp % tp}",
            fields,
        )


def _engines(cfg: "Config") -> Problems:
    """Ranks over vLLM engines: several to a node, or several nodes to an engine, but none across part of a node."""
    world, per_node, tp = _world(cfg), cfg.cluster.gpus_per_node, cfg.rollout.tensor_parallel_size
    if rest := _remainder(world, tp):
        text = f"{world} ranks cannot be divided by {ROLLOUT_TP} {tp}: {world} % {tp} = {rest}"
        yield Problem(text, (*WORLD, ROLLOUT_TP))
    elif _remainder(per_node, tp) and _remainder(tp, per_node):
        yield Problem(
            f"cluster.gpus_per_node {per_node} and {ROLLOUT_TP} {tp} do not divide one another: an engine would have "
            f"part of a node ({per_node} % {tp} = {per_node % tp}, {tp} % {per_node} = {tp % per_node})",
            (*WORLD, ROLLOUT_TP),
        )


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


def _examples(cfg: "Config") -> Problems:
    """The longest prompt leaves room to learn something; longer examples are dropped or refused as they are read."""
    prompt, budget = cfg.data.max_prompt_length, cfg.train.train_mb_tokens
    sides = 2 if cfg.algorithm == "preference" else 1
    if budget < sides * (prompt + 1):
        what, times = ("pair", "2 x (") if sides == 2 else ("example", "")
        yield Problem(
            f"train.train_mb_tokens = {budget} is less than the shortest {what} with the longest prompt: "
            f"{times}data.max_prompt_length {prompt} + 1 token of response{')' * (sides - 1)} = {sides * (prompt + 1)}",
            ("train.train_mb_tokens", "data.max_prompt_length"),
        )


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
    for reason in spec.untrainable():
        yield Problem(f"model.path = {cfg.model.path!r} converts, but cannot be trained: {reason}", ("model.path",))
    yield from _model_tensors(cfg, spec)
    yield from _model_experts(cfg, spec)
    tp = cfg.parallel.tensor_model_parallel_size
    if tp > 1 and not cfg.parallel.sequence_parallel and (spec.moe or spec.mla):
        what = "experts" if spec.moe else "latent attention"
        text = f"{TP} = {tp} of a model with {what}: megatron-core trains it with parallel.sequence_parallel only"
        yield Problem(text, ("model.path", "parallel.sequence_parallel", TP))
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
        for what, size in (("attention heads", heads), *_mlps(spec)):
            if rest := _remainder(size, tp):
                text = f"the model's {size} {what} cannot be divided by {path} {tp}: {size} % {tp} = {rest}"
                yield Problem(text, ("model.path", path))
        if _remainder(kv_heads, tp) and _remainder(tp, kv_heads):
            yield Problem(
                f"the model's {kv_heads} key/value heads and {path} {tp} do not divide one another: "
                f"{kv_heads} % {tp} = {kv_heads % tp}, {tp} % {kv_heads} = {tp % kv_heads}",
                ("model.path", path),
            )


def _mlps(spec: "ModelSpec") -> list[tuple[str, int]]:
    """The MLPs that tensor parallelism divides: those of layers without experts, and the experts' shared one."""
    if spec.moe is None:
        return [("MLP columns", spec.ffn_hidden_size)]
    dense = [("MLP columns", spec.ffn_hidden_size)] if not all(spec.moe.layers) else []
    return dense + [("shared expert's columns", size) for size in [spec.moe.shared_ffn_hidden_size] if size]


def _model_experts(cfg: "Config", spec: "ModelSpec") -> Problems:
    """Experts over expert-parallel ranks, and their matrices over expert-tensor-parallel ones."""
    ep, etp = cfg.parallel.expert_model_parallel_size, _etp(cfg)
    if spec.moe is None:
        for path, size in ((EP, ep), (ETP, cfg.parallel.expert_tensor_parallel_size or 1)):
            if size > 1:
                yield Problem(f"{path} = {size}, but the model has no experts", ("model.path", path))
        return
    experts, columns = spec.moe.num_experts, spec.moe.ffn_hidden_size
    if rest := _remainder(experts, ep):
        text = f"the model's {experts} experts cannot be divided by {EP} {ep}: {experts} % {ep} = {rest}"
        yield Problem(text, ("model.path", EP))
    if rest := _remainder(columns, etp):
        text = f"the experts' {columns} columns cannot be divided by {ETP} {etp}: {columns} % {etp} = {rest}"
        yield Problem(text, ("model.path", ETP, TP))
    if spec.linear_bias and etp > 1:
        text = f"the model's experts have biases, which megatron-core does not divide: {ETP} is {etp}, set it to 1"
        yield Problem(text, ("model.path", ETP, TP))


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
    named = {"data.path": cfg.data.path, "data.val_path": cfg.data.val_path, "data.pass_rates": cfg.data.pass_rates}
    for path, value in named.items():
        if value and value.endswith((".jsonl", ".json", ".parquet")) and not Path(value).is_file():
            yield Problem(f"{path} = {value!r}: there is no such file", (path,))


def _loggers(cfg: "Config") -> Problems:
    if cfg.logger.wandb_enabled and importlib.util.find_spec("wandb") is None:
        text = "logger.wandb_enabled = true, but wandb is not installed: pip install wandb"
        yield Problem(text, ("logger.wandb_enabled",))


def _override_names(cfg: "Config") -> Problems:
    """Overrides name fields of the megatron-core that is installed; `megarl doctor` says if there is none."""
    names = [name for name in cfg.model.model_overrides if name not in OWNED_OVERRIDES]
    known = transformer_config_fields() if names else []
    for name in names:
        if known and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            text = f"model.model_overrides.{name}: megatron-core's TransformerConfig has no such field{hint}"
            yield Problem(text, ("model.model_overrides",))


def transformer_config_fields() -> list[str]:
    """Names of the fields of megatron's TransformerConfig; none without megatron-core.

    They are parsed from its source, which takes 0.05 s: importing it would import torch, for seconds.
    """
    if importlib.util.find_spec("megatron") is None or (spec := importlib.util.find_spec("megatron.core")) is None:
        return []
    files = {
        "model_parallel_config.py": "ModelParallelConfig",
        "transformer/transformer_config.py": "TransformerConfig",
    }
    names = []
    for (file, wanted), folder in itertools.product(files.items(), spec.submodule_search_locations or []):
        for node in ast.parse((Path(folder) / file).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == wanted:
                names += [ast.unparse(line.target) for line in node.body if isinstance(line, ast.AnnAssign)]
    return names


def count_gpus(device: str) -> int:
    """GPUs that torch can use here; 0 for `cluster.device` cpu.

    torch takes seconds to import. With `auto` it is asked only where a driver has left its device files (/dev/dxg is
    that of Windows' Linux), so that a CPU run does not wait for it.
    """
    driver = Path("/dev/dxg").exists() or any(Path("/dev").glob("nvidia*"))
    if device == "cpu" or (device == "auto" and not driver):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def check_gpus(cfg: "Config", found: int) -> Problems:
    """Every rank of this machine has a GPU of its own; `auto` without any GPU is a CPU run."""
    device, ranks = cfg.cluster.device, cfg.cluster.gpus_per_node
    if device == "cuda" and found == 0:
        text = "cluster.device = cuda, but torch finds no CUDA device (`megarl doctor` says more)"
        yield Problem(text, ("cluster.device",))
    elif device != "cpu" and 0 < found < ranks:
        yield Problem(
            f"cluster.gpus_per_node = {ranks} ranks need a GPU each, but torch finds {found} on this machine: "
            "take fewer ranks, or cluster.device=cpu",
            ("cluster.device", "cluster.gpus_per_node"),
        )


# ---- small sums ----


def _remainder(value: int, divisor: int) -> int:
    """value % divisor; 0 where the divisor is out of range, which is a problem of its own."""
    return value % divisor if divisor > 0 else 0


def _world(cfg: "Config") -> int:
    return cfg.cluster.num_nodes * cfg.cluster.gpus_per_node


def _etp(cfg: "Config") -> int:
    return cfg.parallel.expert_tensor_parallel_size or cfg.parallel.tensor_model_parallel_size


def _first(cfg: "Config") -> int | None:
    return cfg.parallel.num_layers_in_first_pipeline_stage


def _last(cfg: "Config") -> int | None:
    return cfg.parallel.num_layers_in_last_pipeline_stage


def _longest(cfg: "Config") -> tuple[int, str]:
    """Tokens of the longest sequence, and how they come about."""
    prompt, response = cfg.data.max_prompt_length, cfg.rollout.max_response_length
    words = f"data.max_prompt_length {prompt} + rollout.max_response_length {response} = {prompt + response}"
    return prompt + response, words
