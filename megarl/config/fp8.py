"""Checks of FP8 training: what its recipe needs of the GPU, of CUDA, of Transformer Engine, and of the model's sizes.

They run before any model is built, and are pure: what the machine has comes as a `Machine`, which `this_machine` finds.
Versions and shapes are those of Transformer Engine's documentation ("Using FP8 with Transformer Engine") and of
megatron-core 0.16's ``fp8_utils``; TP, CP and SP are the recipe's layout.
"""

import importlib.metadata
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megarl.config.sizes import TP
from megarl.config.values import Problem, Problems

if TYPE_CHECKING:
    from megarl.config import Config
    from megarl.model.family import ModelSpec

Version = tuple[int, ...]


@dataclass(frozen=True)
class Machine:
    """What ranks of this machine compute on. None: there is none."""

    device: str  # cpu | cuda
    capability: Version | None = None  # CUDA compute capability: (9, 0) is Hopper
    cuda: Version | None = None  # that torch was built for
    transformer_engine: Version | None = None


@dataclass(frozen=True)
class Needs:
    """Of one ``fp8_recipe``."""

    name: str  # Transformer Engine's
    capability: Version
    gpu: str
    cuda: Version
    transformer_engine: Version
    multiple: int  # of both dimensions of every matrix
    tokens: int  # of the number of tokens that a rank multiplies


NEEDS = {
    "delayed": Needs("DelayedScaling", (8, 9), "Ada", (12, 1), (1, 0), 16, 16),
    "tensorwise": Needs("Float8CurrentScaling", (8, 9), "Ada", (12, 1), (2, 2), 16, 16),
    # Blocks of 128 lie along the tokens too, where the weights' gradient is summed over these.
    "blockwise": Needs("Float8BlockScaling", (9, 0), "Hopper", (12, 9), (2, 3), 16, 128),
    "mxfp8": Needs("MXFP8BlockScaling", (10, 0), "Blackwell", (12, 8), (2, 1), 32, 32),
}
FIELDS = ("fp8_cfg.enabled", "fp8_cfg.fp8_recipe")


def this_machine(device: str) -> Machine:
    """What is here, for ``cluster.device``; torch is asked for it, which takes seconds to import."""
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        return Machine("cpu", transformer_engine=engine_version())
    cuda = version(torch.version.cuda or "0")
    return Machine("cuda", torch.cuda.get_device_capability(), cuda, engine_version())


def engine_version() -> Version | None:
    """Of Transformer Engine, whose wheels have one name for each CUDA; None where it is not installed."""
    try:
        return version(importlib.metadata.version("transformer-engine"))
    except importlib.metadata.PackageNotFoundError:
        return None


def version(text: str) -> Version:
    """The first two numbers of "12.8" or "2.3.0+abc"."""
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2] if part.isdigit())


def tokens_multiple(cfg: "Config") -> int:
    """What a rank's tokens are padded to a multiple of, for the matrices of FP8; 1 without it."""
    return NEEDS[cfg.fp8_cfg.fp8_recipe].tokens if cfg.fp8_cfg.enabled else 1


def check_fp8_values(cfg: "Config") -> Problems:
    """What needs the config alone."""
    f, recipe = cfg.fp8_cfg, f"fp8_cfg.fp8_recipe = {cfg.fp8_cfg.fp8_recipe}"
    if cfg.rollout.quantization is not None and _no_correction(cfg):
        text = f"rollout.quantization = {cfg.rollout.quantization}: vLLM then samples from another policy than the one "
        yield Problem(
            f"{text}that is trained, and nothing corrects for it: set loss.truncated_importance_sampling_type=tis",
            ("rollout.quantization", "loss.truncated_importance_sampling_type", "loss.use_rollout_logps", "algorithm"),
        )
    if not f.enabled:
        if names := [name for name in ("fp8_param", "first_last_layers_bf16", "metrics") if vars(f)[name]]:
            text = f"{', '.join(f'fp8_cfg.{name}' for name in names)} would do nothing: fp8_cfg.enabled = false"
            yield Problem(text, ("fp8_cfg.enabled", *(f"fp8_cfg.{name}" for name in names)))
        return
    if cfg.model.dtype != "bf16":
        text = f"fp8_cfg.enabled = true needs model.dtype = bf16, of which FP8 is the matrices' part: {cfg.model.dtype}"
        yield Problem(text, ("fp8_cfg.enabled", "model.dtype"))
    if f.first_last_layers_bf16 and f.fp8_recipe == "delayed":
        text = f"{recipe}: megatron-core has one scale's history for all layers, and none of them in BF16"
        yield Problem(f"{text} (fp8_cfg.first_last_layers_bf16)", (*FIELDS, "fp8_cfg.first_last_layers_bf16"))
    if f.fp8_recipe == "delayed" and "moe_act" in cfg.model.recompute_modules:
        text = f"{recipe} does not go with model.recompute_modules moe_act (megatron-core)"
        yield Problem(text, (*FIELDS, "model.recompute_modules"))
    if f.fp8_param:
        yield from _fp8_parameters(cfg)


def _fp8_parameters(cfg: "Config") -> Problems:
    """FP8 parameters are read as bf16 where weights are sent, and are no plain memory elsewhere."""
    other = {
        "offload.params = true": (cfg.offload.params, ("offload.params",)),
        "a reference model (loss.kl_loss_coef, advantage.kl_coef)": (
            cfg.loss.kl_loss_coef > 0 or cfg.advantage.kl_coef > 0,
            ("loss.kl_loss_coef", "advantage.kl_coef"),
        ),
        "checkpoints of the model (checkpoint.save_contents)": (
            "model" in cfg.checkpoint.save_contents,
            ("checkpoint.save_contents",),
        ),
    }
    for what, (wanted, fields) in other.items():
        if wanted:
            text = f"fp8_cfg.fp8_param = true does not go with {what}: the parameters are no plain tensors"
            yield Problem(text, ("fp8_cfg.fp8_param", *fields))
    if not cfg.optimizer.use_distributed_optimizer:
        text = "fp8_cfg.fp8_param = true needs optimizer.use_distributed_optimizer, which keeps the fp32 weights"
        yield Problem(text, ("fp8_cfg.fp8_param", "optimizer.use_distributed_optimizer"))


def _no_correction(cfg: "Config") -> bool:
    """Whether nothing weighs samples by policy / rollout probability, in a loop whose loss could."""
    loss = cfg.loss
    corrects = loss.truncated_importance_sampling_type != "none" or loss.use_rollout_logps
    return cfg.algorithm in ("grpo", "ppo", "remax", "prime", "distillation") and not corrects


def check_fp8_machine(cfg: "Config", machine: Machine) -> Problems:
    """What the recipe needs and the machine lacks."""
    if not cfg.fp8_cfg.enabled:
        return
    needs = NEEDS[cfg.fp8_cfg.fp8_recipe]
    recipe = f"fp8_cfg.fp8_recipe = {cfg.fp8_cfg.fp8_recipe}"
    fields = (*FIELDS, "cluster.device")
    if machine.device != "cuda":
        text = "fp8_cfg.enabled = true needs a CUDA device: FP8 matrices are multiplied by Transformer Engine's kernels"
        yield Problem(f"{text}, and there is none here; set fp8_cfg.enabled=false", fields)
        return
    if machine.transformer_engine is None:
        text = "fp8_cfg.enabled = true needs Transformer Engine, which is not installed: "
        yield Problem(text + "pip install --no-build-isolation transformer-engine[pytorch]", fields)
    elif machine.transformer_engine < needs.transformer_engine:
        found, wanted = said(machine.transformer_engine), said(needs.transformer_engine)
        yield Problem(f"{recipe} ({needs.name}) needs Transformer Engine {wanted}, and here is {found}", fields)
    if machine.capability is not None and machine.capability < needs.capability:
        wanted = f"{needs.gpu} or later (compute capability {said(needs.capability)})"
        yield Problem(f"{recipe} needs {wanted}, and this GPU has {said(machine.capability)}", fields)
    if machine.cuda is not None and machine.cuda < needs.cuda:
        text = f"{recipe} needs CUDA {said(needs.cuda)}, and torch was built for {said(machine.cuda)}"
        yield Problem(text, fields)


def check_fp8_model(cfg: "Config", spec: "ModelSpec") -> Problems:
    """Every matrix's dimensions, as tensor parallelism leaves them, are multiples of what the recipe takes."""
    f = cfg.fp8_cfg
    if not f.enabled:
        return
    multiple = NEEDS[f.fp8_recipe].multiple
    for what, size, shards in _dimensions(cfg, spec):
        if size % shards == 0 and (rest := size // shards % multiple):
            over = f" / {TP} {shards} = {size // shards}" if shards > 1 else ""
            text = f"fp8_cfg.fp8_recipe = {f.fp8_recipe} needs dimensions that are multiples of {multiple}"
            yield Problem(
                f"{text}: the model's {what} {size}{over}, % {multiple} = {rest}", ("model.path", TP, *FIELDS)
            )
    if f.first_last_layers_bf16:
        stage = spec.num_layers // cfg.parallel.pipeline_model_parallel_size
        for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
            if vars(f)[name] > stage:
                text = f"fp8_cfg.{name} = {vars(f)[name]} is more than the {stage} layers of a pipeline stage"
                yield Problem(text, ("model.path", f"fp8_cfg.{name}", "parallel.pipeline_model_parallel_size"))


def _dimensions(cfg: "Config", spec: "ModelSpec") -> list[tuple[str, int, int]]:
    """(what, its size, ranks that share it) of every linear layer's inputs and outputs."""
    from megarl.config.sizes import expert_tensor_parallel

    tp, etp = cfg.parallel.tensor_model_parallel_size, expert_tensor_parallel(cfg)
    heads = spec.num_attention_heads
    out = [("hidden size", spec.hidden_size, 1)]
    if spec.mla is None:
        key_values = 2 * max(spec.num_query_groups, tp) * spec.kv_channels
        out += [("queries", heads * spec.kv_channels, tp), ("keys and values", key_values, tp)]
    else:
        mla = spec.mla
        ranks = [("query's rank", mla.q_lora_rank, 1)] if mla.q_lora_rank else []
        out += [*ranks, ("key and value's rank", mla.kv_lora_rank, 1)]
        out += [("latent down projection", mla.kv_lora_rank + mla.qk_pos_emb_head_dim, 1)]
        out += [("queries", heads * (mla.qk_head_dim + mla.qk_pos_emb_head_dim), tp)]
        out += [("values", heads * mla.v_head_dim, tp)]
    if spec.moe is None or not all(spec.moe.layers):
        out += [("MLP columns", spec.ffn_hidden_size, tp)]
    if spec.moe:
        out += [("experts' columns", spec.moe.ffn_hidden_size, etp)]
        shared = spec.moe.shared_ffn_hidden_size
        out += [("shared expert's columns", shared, tp)] if shared else []
    return out


def said(version: Version) -> str:
    """As it is written."""
    return ".".join(map(str, version))
