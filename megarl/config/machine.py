"""Checks of a config against this machine: the model's directory, data files, megatron-core, GPUs."""

import ast
import dataclasses
import difflib
import importlib.util
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from megarl.config.algorithm import ON_POLICY
from megarl.config.critic import critic_as_policy, of_critic
from megarl.config.fp8 import Version, check_fp8_machine, check_fp8_model, said, this_machine
from megarl.config.memory import ENGINE_ONLY, check_recompute
from megarl.config.remote import engines_beside
from megarl.config.sizes import (
    CP,
    DISPATCHER,
    EP,
    ETP,
    FIRST,
    LAST,
    LENGTHS,
    PP,
    ROLLOUT_TP,
    TP,
    VPP,
    expert_tensor_parallel,
    first_stage,
    last_stage,
    longest_sequence,
    remainder,
)
from megarl.config.values import OWNED_OVERRIDES, Problem, Problems

if TYPE_CHECKING:
    from megarl.config import Config
    from megarl.model.family import ModelSpec


def check_machine(cfg: "Config", launched: int | None) -> Problems:
    """All of them; GPUs only where the ranks will run here."""
    yield from check_model(cfg)
    if cfg.algorithm == "ppo" and (cfg.critic.path is not None or cfg.critic.own_layout):
        critic = critic_as_policy(cfg)
        yield from of_critic(check_model(dataclasses.replace(critic, algorithm="reward_model")))  # it samples nothing
    yield from _override_names(cfg)
    yield from _files(cfg)
    yield from _loggers(cfg)
    if launched or cfg.cluster.num_nodes == 1:
        yield from check_gpus(cfg, count_gpus(cfg.cluster.device))
        yield from _transformer_engine(cfg)


def _transformer_engine(cfg: "Config") -> Problems:
    """What only its layers and its Adam can, and what FP8 needs of this machine."""
    modules = [name for name in cfg.model.recompute_modules if name in ENGINE_ONLY]
    precision_aware = cfg.optimizer.use_precision_aware_optimizer
    if not (cfg.fp8_cfg.enabled or modules or precision_aware):
        return
    machine = this_machine(cfg.cluster.device)
    yield from check_fp8_machine(cfg, machine)
    if machine.device == "cuda" and machine.transformer_engine and cfg.model.dtype == "bf16":
        return
    lack = "which need CUDA, model.dtype = bf16 and Transformer Engine installed"
    for name in modules:
        text = f"model.recompute_modules: megatron-core computes {name} again in Transformer Engine's layers only"
        yield Problem(f"{text}, {lack}", ("model.recompute_modules", "cluster.device", "model.dtype"))
    if precision_aware:
        name = "optimizer.use_precision_aware_optimizer"
        yield Problem(f"{name}: only Transformer Engine's FusedAdam keeps moments in bf16, {lack}", (name,))


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
    yield from _model_context(cfg, spec)
    yield from _model_layers(cfg, spec)
    yield from _recomputed_units(cfg, spec)
    yield from check_recompute(cfg, spec)
    yield from check_fp8_model(cfg, spec)
    if cfg.algorithm in ON_POLICY:
        yield from _model_positions(cfg, spec)


def _model_tensors(cfg: "Config", spec: "ModelSpec") -> Problems:
    """Heads and MLP over tensor-parallel ranks, of the policy and of vLLM."""
    sizes = {TP: cfg.parallel.tensor_model_parallel_size}
    if cfg.algorithm in ON_POLICY:
        sizes[ROLLOUT_TP] = cfg.rollout.tensor_parallel_size
    heads, kv_heads = spec.num_attention_heads, spec.num_query_groups
    for path, tp in sizes.items():
        for what, size in (("attention heads", heads), *_mlps(spec)):
            if rest := remainder(size, tp):
                text = f"the model's {size} {what} cannot be divided by {path} {tp}: {size} % {tp} = {rest}"
                yield Problem(text, ("model.path", path))
        if remainder(kv_heads, tp) and remainder(tp, kv_heads):
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
    ep, etp = cfg.parallel.expert_model_parallel_size, expert_tensor_parallel(cfg)
    if spec.moe is None:
        for path, size in ((EP, ep), (ETP, cfg.parallel.expert_tensor_parallel_size or 1)):
            if size > 1:
                yield Problem(f"{path} = {size}, but the model has no experts", ("model.path", path))
        asked = {
            "model.freeze_router = true": cfg.model.freeze_router,
            f"model.moe_aux_loss_coeff = {cfg.model.moe_aux_loss_coeff}": cfg.model.moe_aux_loss_coeff > 0,
            f"{DISPATCHER} = allgather": cfg.parallel.moe_token_dispatcher_type == "allgather",
            "rollout.router_replay = true": cfg.rollout.router_replay,
        }
        for text in (text for text, wish in asked.items() if wish):
            yield Problem(f"{text}, but the model has no experts", ("model.path", text.split()[0]))
        return
    experts, columns = spec.moe.num_experts, spec.moe.ffn_hidden_size
    if rest := remainder(experts, ep):
        text = f"the model's {experts} experts cannot be divided by {EP} {ep}: {experts} % {ep} = {rest}"
        yield Problem(text, ("model.path", EP))
    if rest := remainder(columns, etp):
        text = f"the experts' {columns} columns cannot be divided by {ETP} {etp}: {columns} % {etp} = {rest}"
        yield Problem(text, ("model.path", ETP, TP))
    if spec.linear_bias and etp > 1:
        text = f"the model's experts have biases, which megatron-core does not divide: {ETP} is {etp}, set it to 1"
        yield Problem(text, ("model.path", ETP, TP))


def _model_context(cfg: "Config", spec: "ModelSpec") -> Problems:
    """What only Transformer Engine's attention is particular about, where this machine has it."""
    if (spec.sliding_window or spec.attention_sinks) and cfg.model.dtype == "bf16" and count_gpus(cfg.cluster.device):
        yield from check_windows(cfg, spec, this_machine(cfg.cluster.device).transformer_engine)


def check_windows(cfg: "Config", spec: "ModelSpec", engine: Version | None) -> Problems:
    """Sliding windows and sinks in packed sequences, by the version of Transformer Engine; None: there is none, and
    megarl's own attention takes all of it.

    Versions are of its pull requests 2220 (windows over context parallelism) and 2568 (sinks, with cuDNN 9.18). There
    ranks exchange heads, so that each of a context-parallel group takes as many.
    """
    cp, tp = cfg.parallel.context_parallel_size, cfg.parallel.tensor_model_parallel_size
    if engine is None or not (spec.attention_sinks or cp > 1):
        return
    what, needed = ("attention sinks", (2, 13)) if spec.attention_sinks else ("sliding windows", (2, 11))
    over = f" over {CP} = {cp} ranks" if cp > 1 else ""
    if engine < needed:
        text = f"a model with {what} and packed sequences{over} needs Transformer Engine {said(needed)} or later"
        yield Problem(f"{text}, and here is {said(engine)}", ("model.path", CP))
    heads = max(spec.num_query_groups // max(tp, 1), 1)
    if rest := remainder(heads, cp):
        text = f"a model with {what}: {CP} = {cp} ranks share the {heads} key/value heads of a tensor-parallel rank"
        yield Problem(f"{text}, and {heads} % {cp} = {rest}", ("model.path", CP, TP))


def _model_layers(cfg: "Config", spec: "ModelSpec") -> Problems:
    """Layers over pipeline stages: the first and last may be set apart, those between are alike."""
    stages = cfg.parallel.pipeline_model_parallel_size
    apart = [layers for layers in (first_stage(cfg), last_stage(cfg)) if layers is not None]
    if stages == 1:
        return
    middle, between = spec.num_layers - sum(apart), stages - len(apart)
    minus = "".join(f" - {layers}" for layers in apart)
    words = f"the model's {spec.num_layers} layers{minus} = {middle}" if apart else f"the model's {middle} layers"
    chunks = cfg.parallel.virtual_pipeline_model_parallel_size or 1
    for layers in (*apart, *([middle // between] if between > 0 and middle % between == 0 else [])):
        if rest := remainder(layers, chunks):
            text = f"a stage's {layers} layers cannot be divided over {VPP} {chunks}: {layers} % {chunks} = {rest}"
            yield Problem(text, ("model.path", PP, VPP, FIRST, LAST))
    if between <= 0:
        if middle != 0:
            yield Problem(f"{words}: {PP} {stages} leaves no stage for them", ("model.path", PP, FIRST, LAST))
    elif middle < between or middle % between:
        count = f"{PP} {stages}" + (f" - {len(apart)} = {between}" if apart else "")
        text = f"{words} cannot be divided over {count} stages: {middle} % {between} = {middle % between}"
        yield Problem(text, ("model.path", PP, FIRST, LAST))


def _recomputed_units(cfg: "Config", spec: "ModelSpec") -> Problems:
    """Units of layers that are computed again: megatron counts on, past a stage's last layer."""
    unit = cfg.model.recompute_num_layers
    if cfg.model.recompute_method != "uniform" or not unit:
        return
    p = cfg.parallel
    apart = [layers for layers in (first_stage(cfg), last_stage(cfg)) if layers is not None]
    between = p.pipeline_model_parallel_size - len(apart)
    each = [(spec.num_layers - sum(apart)) // between] if between > 0 else []
    chunks = p.virtual_pipeline_model_parallel_size or 1
    for layers in sorted({layers // chunks for layers in (*apart, *each)}):
        if rest := remainder(layers, unit):
            text = f"a stage's {layers} layers cannot be divided into units of model.recompute_num_layers {unit}"
            yield Problem(f"{text}: {layers} % {unit} = {rest}", ("model.path", PP, VPP, "model.recompute_num_layers"))


def _model_positions(cfg: "Config", spec: "ModelSpec") -> Problems:
    longest, words = longest_sequence(cfg)
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
    """Every rank of this machine has a GPU of its own, and so has every server beside them; `auto` without any GPU is a
    CPU run."""
    device, ranks = cfg.cluster.device, cfg.cluster.gpus_per_node
    beside = engines_beside(cfg) * cfg.rollout.tensor_parallel_size
    if device == "cuda" and found == 0:
        text = "cluster.device = cuda, but torch finds no CUDA device (`megarl doctor` says more)"
        yield Problem(text, ("cluster.device",))
    elif device != "cpu" and 0 < found < ranks:
        yield Problem(
            f"cluster.gpus_per_node = {ranks} ranks need a GPU each, but torch finds {found} on this machine: "
            "take fewer ranks, or cluster.device=cpu",
            ("cluster.device", "cluster.gpus_per_node"),
        )
    elif device != "cpu" and 0 < found < ranks + beside:
        yield Problem(
            f"cluster.gpus_per_node = {ranks} ranks and rollout.num_engines {engines_beside(cfg)} x {ROLLOUT_TP} "
            f"{cfg.rollout.tensor_parallel_size} = {beside} need a GPU each, but torch finds {found} on this machine",
            ("cluster.device", "cluster.gpus_per_node", "rollout.num_engines", ROLLOUT_TP),
        )
