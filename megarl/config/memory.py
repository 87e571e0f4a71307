"""Checks of what saves memory: activations that are computed again, and state that waits in host memory."""

from typing import TYPE_CHECKING

from megarl.config.values import Problem, Problems

if TYPE_CHECKING:
    from megarl.config import Config
    from megarl.model.family import ModelSpec

# Parts of a layer that megatron computes again in backward; and those of them that only Transformer Engine's kernels
# can: megatron-core 0.16 to 0.19 drops their output by a class that ends with a NameError where it is not installed.
# (It calls for the same class at "layernorm", which does nothing where its layers have the norms inside.)
RECOMPUTE_MODULES = ("core_attn", "mlp", "moe", "shared_experts", "moe_act", "mla_up_proj")
ENGINE_ONLY = ("moe_act", "mla_up_proj")


def check_memory(cfg: "Config") -> Problems:
    """What needs the config alone."""
    yield from _recompute(cfg)
    yield from _precision_aware(cfg)
    name, o = "optimizer.optimizer_offload_fraction", cfg.optimizer
    if o.optimizer_offload_fraction < 1 and not o.optimizer_cpu_offload:
        text = f"{name} = {o.optimizer_offload_fraction} would do nothing: optimizer.optimizer_cpu_offload = false"
        yield Problem(text, (name, "optimizer.optimizer_cpu_offload"))


def check_recompute(cfg: "Config", spec: "ModelSpec") -> Problems:
    """Parts that the model has."""
    has = {
        "mlp": spec.moe is None or not all(spec.moe.layers),
        "moe": spec.moe is not None,
        "moe_act": spec.moe is not None,
        "shared_experts": spec.moe is not None and spec.moe.shared_ffn_hidden_size > 0,
        "mla_up_proj": spec.mla is not None,
    }
    for name in cfg.model.recompute_modules:
        if not has.get(name, True):
            text = f"model.recompute_modules: the model has no {name} to compute again"
            yield Problem(text, ("model.path", "model.recompute_modules"))


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
    inside = [name for name in model.recompute_modules if name in ("moe_act", "shared_experts")]
    if "moe" in model.recompute_modules and inside:
        yield Problem(f"{path}modules: moe is all of a layer's experts, {inside} included: leave them out", fields)


def _precision_aware(cfg: "Config") -> Problems:
    """Moments in bf16, which only Transformer Engine's Adam has."""
    o, name = cfg.optimizer, "optimizer.use_precision_aware_optimizer"
    if not o.use_precision_aware_optimizer:
        return
    if not o.use_distributed_optimizer:
        yield Problem(
            f"{name} needs optimizer.use_distributed_optimizer", (name, "optimizer.use_distributed_optimizer")
        )
    if cfg.model.dtype != "bf16":
        text = f"{name} keeps the fp32 weights of a bf16 model, but model.dtype = {cfg.model.dtype}"
        yield Problem(text, (name, "model.dtype"))
    if o.optimizer_cpu_offload:
        text = f"{name} is Transformer Engine's Adam, and optimizer.optimizer_cpu_offload megarl's: leave one out"
        yield Problem(text, (name, "optimizer.optimizer_cpu_offload"))
    if "optimizer" in cfg.checkpoint.save_contents or cfg.checkpoint.resume_mode != "disable":
        text = f"{name}: checkpoints cannot hold its state; set checkpoint.save_contents=[hf]"
        fields = (name, "checkpoint.save_contents", "checkpoint.resume_mode")
        yield Problem(f"{text} and checkpoint.resume_mode=disable", fields)
