"""What a config's values can get wrong on their own: numbers out of range, names of nothing, settings without effect.

Contract: a check is a generator over a config that yields `Problem`s; it changes nothing and starts nothing. A
problem names the fields it rests on, so that `checks.check` can leave out what rests on a value that is wrong
anyway. Sizes that have to fit each other, and this machine, are in checks.py and machine.py.
"""

import difflib
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from megarl.config.algorithm import ON_POLICY

if TYPE_CHECKING:
    from megarl.config import Config

Problems = Iterator["Problem"]


@dataclass(frozen=True)
class Problem:
    """What is wrong, and the fields that say so (none: nothing could make it an echo)."""

    text: str
    fields: tuple[str, ...]


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
    "model.moe_aux_loss_coeff": "[0, inf)",
    "fp8_cfg.num_layers_at_start_in_bf16": "[0, inf)",
    "fp8_cfg.num_layers_at_end_in_bf16": "[0, inf)",
    "parallel.tensor_model_parallel_size": "[1, inf)",
    "parallel.pipeline_model_parallel_size": "[1, inf)",
    "parallel.virtual_pipeline_model_parallel_size": "[2, inf)",
    "parallel.context_parallel_size": "[1, inf)",
    "parallel.expert_model_parallel_size": "[1, inf)",
    "parallel.expert_tensor_parallel_size": "[1, inf)",
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
    "optimizer.optimizer_offload_fraction": "(0, 1]",
    "train.train_global_batch_size": "[1, inf)",
    "train.train_mb_tokens": "[1, inf)",
    "train.logprob_mb_tokens": "[1, inf)",
    "train.ppo_epochs": "[1, inf)",
    "data.max_prompt_length": "[1, inf)",
    "data.max_records": "[1, inf)",
    "data.min_pass_rate": "[0, 1]",
    "data.max_pass_rate": "[0, 1]",
    "rollout.num_prompts_per_step": "[1, inf)",
    "rollout.num_generations_per_prompt": "[1, inf)",
    "rollout.tensor_parallel_size": "[1, inf)",
    "rollout.dynamic_sampling_max_gen_batches": "[1, inf)",
    "rollout.dynamic_sampling_min_reward": "(-inf, inf)",
    "rollout.dynamic_sampling_max_reward": "(-inf, inf)",
    "reward.missing_eos_penalty": "[0, inf)",
    "reward.length_penalty": "[0, inf)",
    "prime.beta": "(0, inf)",
    "prime.process_coef": "[0, inf)",
    "prime.outcome_coef": "[0, inf)",
    "rollout.max_response_length": "[1, inf)",
    "rollout.temperature": "[0.01, 2]",
    "rollout.top_p": "(0, 1]",
    "rollout.top_k": "[-1, inf)",
    "rollout.gpu_memory_utilization": "(0, 1]",
    "rollout.max_model_len": "[1, inf)",
    "rollout.max_num_seqs": "[1, inf)",
    "rollout.max_num_batched_tokens": "[1, inf)",
    "rollout.kv_cache_gb": "(0, inf)",
    "rollout.max_staleness": "[0, inf)",
    "rollout.num_engines": "[0, inf)",
    "rollout.num_nodes": "[0, inf)",
    "rollout.min_engines": "[1, inf)",
    "rollout.engine_timeout_s": "(0, inf)",
    "rollout.max_concurrent": "[1, inf)",
    "rollout.oversample": "[0, inf)",
    "rollout.max_turns": "[1, inf)",
    "rollout.turn_timeout_s": "(0, inf)",
    "rollout.episode_timeout_s": "(0, inf)",
    "reward.workers": "[1, inf)",
    "reward.timeout_s": "(0, inf)",
    "reward.overlong_buffer_len": "[0, inf)",
    "reward.overlong_buffer_penalty": "[0, inf)",
    "advantage.eps": "[0, inf)",
    "advantage.gamma": "[0, 1]",
    "advantage.gae_lambda": "[0, 1]",
    "advantage.kl_coef": "[0, inf)",
    "advantage.max_difference": "(0, inf)",
    "advantage.kl_target": "(0, inf)",
    "advantage.kl_horizon": "[1, inf)",
    "critic.critic_warmup_steps": "[0, inf)",
    "loss.clip_ratio_low": "[0, 1]",
    "loss.clip_ratio_high": "[0, inf)",
    "loss.clip_ratio_c": "(1, inf)",
    "loss.kl_loss_coef": "[0, inf)",
    "loss.entropy_coef": "[0, inf)",
    "loss.value_clip": "(0, inf)",
    "loss.truncated_importance_sampling_ratio": "(0, inf)",
    "loss.truncated_importance_sampling_ratio_min": "[0, inf)",
    "preference.beta": "(0, inf)",
    "preference.label_smoothing": "[0, 0.5)",
    "preference.dpop_lambda": "[0, inf)",
    "preference.rpo_eta": "(0, inf)",
    "preference.simpo_gamma": "[0, inf)",
    "preference.longpo_lambda": "(0, inf)",
    "preference.sft_loss_coef": "[0, inf)",
    "preference.kto_desirable_weight": "[0, inf)",
    "preference.kto_undesirable_weight": "[0, inf)",
    "preference.center_rewards_coef": "[0, inf)",
    "validation.val_period": "[0, inf)",
    "validation.max_val_samples": "[1, inf)",
    "validation.val_temperature": "[0, 2]",
    "validation.val_top_p": "(0, 1]",
    "validation.val_num_generations_per_prompt": "[1, inf)",
    "weight_sync.bucket_size_mb": "[1, inf)",
    "weight_sync.max_gen_kl_error": "(0, inf)",
    "weight_sync.max_token_mult_prob_error": "(1, inf)",
    "checkpoint.save_period": "[0, inf)",
    "checkpoint.keep_last": "[1, inf)",
    "checkpoint.keep_every": "[0, inf)",
    "checkpoint.keep_top_k": "[0, inf)",
    "guard.max_bad_steps": "[1, inf)",
    "guard.spike_sigmas": "(0, inf)",
    "guard.spike_window": "[5, inf)",
    "guard.max_rollbacks": "[0, inf)",
    "run.stop_grace_s": "(0, inf)",
}
# Fields of megatron's TransformerConfig that are not the model's: what to do instead of overriding them.
_UNUSED = "megarl does not divide models this way"
_ENGINE = "megarl's engine depends on its own value"
OWNED_OVERRIDES = {
    "tensor_model_parallel_size": "set parallel.tensor_model_parallel_size",
    "pipeline_model_parallel_size": "set parallel.pipeline_model_parallel_size",
    "sequence_parallel": "set parallel.sequence_parallel",
    "num_layers_in_first_pipeline_stage": "set parallel.num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage": "set parallel.num_layers_in_last_pipeline_stage",
    **dict.fromkeys(("bf16", "fp16", "params_dtype", "pipeline_dtype"), "set model.dtype"),
    **dict.fromkeys(("enable_autocast", "autocast_dtype"), "set model.dtype"),
    **dict.fromkeys(("fp8", "fp4", "fp4_param"), "set fp8_cfg.fp8 and fp8_cfg.enabled"),
    "fp8_recipe": "set fp8_cfg.fp8_recipe",
    "fp8_param": "set fp8_cfg.fp8_param",
    "first_last_layers_bf16": "set fp8_cfg.first_last_layers_bf16",
    "num_layers_at_start_in_bf16": "set fp8_cfg.num_layers_at_start_in_bf16",
    "num_layers_at_end_in_bf16": "set fp8_cfg.num_layers_at_end_in_bf16",
    "recompute_granularity": "set model.recompute_granularity",
    "recompute_method": "set model.recompute_method",
    "recompute_num_layers": "set model.recompute_num_layers",
    "recompute_modules": "set model.recompute_modules",
    "context_parallel_size": "set parallel.context_parallel_size",
    "hierarchical_context_parallel_sizes": _UNUSED,
    "hybrid_context_parallel": _UNUSED,
    "expert_model_parallel_size": "set parallel.expert_model_parallel_size",
    "expert_tensor_parallel_size": "set parallel.expert_tensor_parallel_size",
    "virtual_pipeline_model_parallel_size": "set parallel.virtual_pipeline_model_parallel_size",
    "pipeline_model_parallel_layout": _UNUSED,
    "account_for_embedding_in_pipeline_split": _UNUSED,
    "account_for_loss_in_pipeline_split": _UNUSED,
    "calculate_per_token_loss": _ENGINE,
    "finalize_model_grads_func": _ENGINE,
    "grad_scale_func": _ENGINE,
    "no_sync_func": _ENGINE,
    "grad_sync_func": _ENGINE,
    "param_sync_func": _ENGINE,
    "variable_seq_lengths": _ENGINE,
    # Set otherwise, an interleaved pipeline of two stages has wrong gradients, and nothing says so.
    **dict.fromkeys(("overlap_p2p_comm", "batch_p2p_comm"), _ENGINE),
    "moe_token_dispatcher_type": "set parallel.moe_token_dispatcher_type",
    "moe_aux_loss_coeff": "set model.moe_aux_loss_coeff",
    "moe_router_load_balancing_type": "model.moe_aux_loss_coeff is of aux_loss, the one that megarl counts right",
    "moe_z_loss_coeff": "megatron's z-loss is not counted by tokens here; model.moe_aux_loss_coeff is",
    "moe_enable_routing_replay": "set rollout.router_replay",
    "perform_initialization": _ENGINE,
    "use_cpu_initialization": _ENGINE,
}


def check_values(cfg: "Config") -> Problems:
    """Everything of this file but the ranges."""
    yield from _overrides(cfg)
    yield from _sampling(cfg)
    yield from _schedule(cfg)
    yield from _policy_loss(cfg)
    yield from _preference(cfg)
    yield from _validation(cfg)
    yield from _data(cfg)
    yield from _names(cfg)


def check_ranges(cfg: "Config") -> Problems:
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
    if 0 < cfg.validation.val_temperature < 0.01:
        text = f"validation.val_temperature = {cfg.validation.val_temperature} is neither 0 (greedy) nor in [0.01, 2]"
        yield Problem(text, ("validation.val_temperature",))


def in_interval(value: float, interval: str) -> bool:
    """Whether a number lies in an interval written as "[0, 1)"; NaN lies in none."""
    low, high = map(float, interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below


def _overrides(cfg: "Config") -> Problems:
    """Layout, numbers and gradients are megarl's, whatever else of megatron's configuration may be overridden."""
    for name in cfg.model.model_overrides:
        if name in OWNED_OVERRIDES:
            text = f"model.model_overrides.{name} cannot be overridden: {OWNED_OVERRIDES[name]}"
            yield Problem(text, ("model.model_overrides",))


def _sampling(cfg: "Config") -> Problems:
    """Limits of responses over the steps, bounds of rewards, and whom distillation learns from."""
    r, path = cfg.rollout, "rollout.response_length_stages"
    if r.response_length_stages:
        from megarl.data.curriculum import Stage, check_stages  # brings the readers' libraries, which take a second

        stages = [Stage(stage.first_step, stage.max_response_length) for stage in r.response_length_stages]
        try:
            check_stages(stages)
        except ValueError as error:
            yield Problem(f"{path}: {error}", (path,))
        if (longest := max(stage.max_response_length for stage in stages)) > r.max_response_length:
            text = f"{path} go up to {longest} tokens, more than rollout.max_response_length = {r.max_response_length}"
            yield Problem(text, (path, "rollout.max_response_length"))
    low, high = r.dynamic_sampling_min_reward, r.dynamic_sampling_max_reward
    names = ("rollout.dynamic_sampling_min_reward", "rollout.dynamic_sampling_max_reward")
    if (low is not None or high is not None) and not r.dynamic_sampling:
        yield Problem(
            f"{' and '.join(names)} go with rollout.dynamic_sampling=true", (*names, "rollout.dynamic_sampling")
        )
    if low is not None and high is not None and low > high:
        yield Problem(f"{names[0]} = {low} is above {names[1]} = {high}", names)
    if (cfg.algorithm == "distillation") != (cfg.teacher.path is not None):
        text = (
            f"algorithm = {cfg.algorithm} and teacher.path = {cfg.teacher.path or 'null'}: distillation has a teacher"
        )
        yield Problem(text, ("algorithm", "teacher.path"))


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


def _policy_loss(cfg: "Config") -> Problems:
    """Terms of the policy loss that exclude or need one another."""
    loss, correction = cfg.loss, cfg.loss.truncated_importance_sampling_type
    name = f"loss.policy_loss = {loss.policy_loss}"
    if loss.policy_loss in ("gspo", "sequence_clip") and loss.loss_agg_mode != "seq-mean-token-mean":
        text = f"{name} is one loss a sequence: it needs loss.loss_agg_mode=seq-mean-token-mean"
        yield Problem(text, ("loss.policy_loss", "loss.loss_agg_mode"))
    if loss.kl_type == "k2" and loss.kl_gradient == "score_function":
        text = "loss.kl_type = k2 has the gradient of the divergence by itself: leave loss.kl_gradient=estimator"
        yield Problem(text, ("loss.kl_type", "loss.kl_gradient"))
    if loss.use_rollout_logps and correction != "none":
        text = f"loss.use_rollout_logps = true and loss.truncated_importance_sampling_type = {correction}"
        yield Problem(
            f"{text} would correct for the same difference twice",
            ("loss.use_rollout_logps", "loss.truncated_importance_sampling_type"),
        )
    if cfg.advantage.kl_target is not None and cfg.advantage.kl_coef == 0:
        text = f"advantage.kl_target = {cfg.advantage.kl_target} holds advantage.kl_coef, which is 0 and stays 0"
        yield Problem(text, ("advantage.kl_target", "advantage.kl_coef"))
    low, high = loss.truncated_importance_sampling_ratio_min, loss.truncated_importance_sampling_ratio
    if correction in ("icepop", "seq-mask-tis") and low >= high:
        path = "loss.truncated_importance_sampling_ratio"
        text = f"{path}_min = {low} and {path} = {high} leave nothing between them for {correction} to keep"
        yield Problem(text, (f"{path}_min", path, "loss.truncated_importance_sampling_type"))


def _preference(cfg: "Config") -> Problems:
    """Settings that the chosen preference loss does not have, or lacks."""
    preference, path = cfg.preference, "preference."
    unpaired = preference.loss in ("kto", "bco")
    if cfg.algorithm in ("preference", "online_dpo", "unpaired") and unpaired != (cfg.algorithm == "unpaired"):
        kind = "labelled single responses (algorithm = unpaired)" if unpaired else "pairs (algorithm = preference)"
        text = f"preference.loss = {preference.loss} is of {kind}, and algorithm = {cfg.algorithm}"
        yield Problem(text, ("algorithm", f"{path}loss"))
    if cfg.algorithm == "preference" and preference.loss == "longpo" and cfg.data.reference_prompt_key is None:
        text = "preference.loss = longpo needs data.reference_prompt_key, the field with the short prompt"
        yield Problem(text, (f"{path}loss", "data.reference_prompt_key"))
    if cfg.algorithm == "online_dpo" and preference.loss == "longpo":
        yield Problem("preference.loss = longpo learns from data: algorithm = preference", ("algorithm", f"{path}loss"))
    if preference.precompute_ref_log_probs and preference.loss == "kto":
        text = "preference.precompute_ref_log_probs = true: preference.loss = kto has a baseline of other pairs a step"
        yield Problem(f"{text}; leave it out", (f"{path}precompute_ref_log_probs", f"{path}loss"))
    if preference.ref_log_probs_path is not None and not preference.precompute_ref_log_probs:
        text = "preference.ref_log_probs_path goes with preference.precompute_ref_log_probs=true"
        yield Problem(text, (f"{path}ref_log_probs_path", f"{path}precompute_ref_log_probs"))
    loss, smoothing = (
        f"preference.loss = {preference.loss}",
        f"preference.label_smoothing = {preference.label_smoothing}",
    )
    if preference.loss == "robust" and preference.label_smoothing == 0:
        text = f"{loss} needs the share of wrong labels in preference.label_smoothing; without any it is dpo"
        yield Problem(text, (f"{path}loss", f"{path}label_smoothing"))
    if preference.loss not in ("dpo", "robust") and preference.label_smoothing > 0:
        yield Problem(f"{smoothing} is of dpo and robust: {loss}", (f"{path}loss", f"{path}label_smoothing"))
    if preference.average_log_probs and preference.loss in ("simpo", "orpo", "longpo", "kto", "bco"):
        always = "takes the mean anyway" if preference.loss in ("simpo", "orpo") else "is defined on sums"
        text = f"preference.average_log_probs = true: {loss} {always}; leave it out"
        yield Problem(text, (f"{path}loss", f"{path}average_log_probs"))
    if preference.sft_loss_coef > 0 and preference.loss in ("orpo", "longpo", "kto", "bco"):
        why = "has a likelihood term of its own" if preference.loss in ("orpo", "longpo") else "has no chosen response"
        text = f"preference.sft_loss_coef = {preference.sft_loss_coef}: {loss} {why}; leave it out"
        yield Problem(text, (f"{path}loss", f"{path}sft_loss_coef"))
    if preference.loss == "kto" and preference.kto_desirable_weight == preference.kto_undesirable_weight == 0:
        text = "preference.kto_desirable_weight = 0 and preference.kto_undesirable_weight = 0 leave nothing to learn"
        yield Problem(text, (f"{path}loss", f"{path}kto_desirable_weight", f"{path}kto_undesirable_weight"))


def _validation(cfg: "Config") -> Problems:
    validation, has_data = cfg.validation, cfg.data.val_path is not None
    if cfg.algorithm not in ON_POLICY:
        changed = [f"validation.{f.name}" for f in fields(validation) if vars(validation)[f.name] != f.default]
        if set_fields := ["data.val_path"] * has_data + changed:
            would = f"{', '.join(set_fields)} would do nothing: leave it out"
            text = f"algorithm = {cfg.algorithm} does not validate, so that {would}"
            yield Problem(text, ("algorithm", *set_fields))
        return
    if validation.val_period > 0 and not has_data:
        text = f"validation.val_period = {validation.val_period}, but there is no data.val_path to validate on"
        yield Problem(text, ("validation.val_period", "data.val_path"))
    if validation.val_num_generations_per_prompt > 1 and validation.val_temperature == 0:
        count = f"validation.val_num_generations_per_prompt = {validation.val_num_generations_per_prompt}"
        text = f"{count}, but validation.val_temperature = 0 is greedy and would give as many equal copies"
        yield Problem(text, ("validation.val_num_generations_per_prompt", "validation.val_temperature"))
    names = [function.name for function in cfg.reward.functions]
    if validation.val_reward is not None and names and validation.val_reward not in names:
        text = f"validation.val_reward = {validation.val_reward!r} is not one of reward.functions: {', '.join(names)}"
        yield Problem(text, ("validation.val_reward", "reward.functions"))


def _data(cfg: "Config") -> Problems:
    """Selection and order by pass rate need one source of pass rates, and a loop that draws prompts."""
    data, rates = cfg.data, ("data.pass_rate_key", "data.pass_rates")
    wishes = {
        f"data.min_pass_rate = {data.min_pass_rate}": data.min_pass_rate > 0,
        f"data.max_pass_rate = {data.max_pass_rate}": data.max_pass_rate < 1,
        f"data.order = {data.order}": data.order != "file",
    }
    asked = [text for text, wish in wishes.items() if wish]
    fields = (*rates, *(text.split()[0] for text in asked))
    if data.pass_rate_key is not None and data.pass_rates is not None:
        yield Problem("data.pass_rate_key and data.pass_rates both say how hard a prompt is: leave one out", rates)
    if asked and data.pass_rate_key is None and data.pass_rates is None:
        yield Problem(f"{asked[0]} needs pass rates: set data.pass_rate_key or data.pass_rates", fields)
    if asked and cfg.algorithm not in ON_POLICY:
        would = f"{', '.join(asked)} would do nothing: leave it out"
        text = f"algorithm = {cfg.algorithm} reads examples, not prompts, so that {would}"
        yield Problem(text, ("algorithm", *fields))
    if data.min_pass_rate > data.max_pass_rate:
        text = f"data.min_pass_rate = {data.min_pass_rate} is above data.max_pass_rate = {data.max_pass_rate}"
        yield Problem(text, ("data.min_pass_rate", "data.max_pass_rate"))
    if data.order != "file" and data.shuffle:
        text = f"data.order = {data.order} would be undone by data.shuffle = true: set data.shuffle=false"
        yield Problem(text, ("data.order", "data.shuffle"))


def _names(cfg: "Config") -> Problems:
    """Names that refer to something elsewhere in the code."""
    from megarl.rewards import REWARDS

    if cfg.data.adapter is not None:
        from megarl.data.adapters import ADAPTERS  # brings the readers' libraries, which take a second

        if cfg.data.adapter not in ADAPTERS:
            text = f"data.adapter = {cfg.data.adapter!r} is not one of {', '.join(ADAPTERS)}"
            yield Problem(text, ("data.adapter",))
    names = [function.name for function in cfg.reward.functions]
    if not names and cfg.algorithm in ON_POLICY:
        yield Problem(f"reward.functions is empty: {cfg.algorithm} needs a reward", ("reward.functions",))
    for name in names:
        if name not in REWARDS and ":" not in name:
            near = difflib.get_close_matches(name, REWARDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(REWARDS)}, or package.module:function"
            yield Problem(f"reward.functions: unknown reward {name!r}; {hint}", ())
    if twice := sorted({name for name in names if names.count(name) > 1}):
        yield Problem(f"reward.functions has {', '.join(twice)} more than once", ())
