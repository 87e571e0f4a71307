"""Settings that nothing would read, given the others: a table of what reads them.

Contract: a field of `READ_WITH` that differs from its default needs one of its alternatives to hold, each of which says
what other fields have to be. Whatever else a field may be wrong about is in values.py.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from megarl.config.algorithm import ON_POLICY
from megarl.config.values import Problem, Problems

if TYPE_CHECKING:
    from megarl.config import Config

# A field that decides whether others are read: the values with which they are.
Alternative = Mapping[str, tuple[str | bool, ...]]


def _algorithm(*names: str) -> tuple[Alternative, ...]:
    return ({"algorithm": names},)


def _estimator(*names: str) -> Alternative:
    return {"algorithm": ("grpo",), "advantage.adv_estimator": names}


def _loss(*names: str, algorithms: tuple[str, ...] = ("preference", "unpaired", "online_dpo")) -> Alternative:
    return {"algorithm": algorithms, "preference.loss": names}


# Those whose loss is a policy loss, of megarl/losses/policy.py.
_POLICY = ("grpo", "ppo", "remax", "prime", "distillation")
_SCORED = ("grpo", "ppo", "remax", "prime", "online_dpo")  # rewards decide what is learnt
_KL_IN_REWARD = (*_algorithm("ppo"), _estimator("grpo", "rloo", "reinforce", "reinforce_plus_plus"))
_PAIRS_OR_LABELS = _algorithm("preference", "unpaired", "online_dpo")

READ_WITH: dict[str, tuple[Alternative, ...]] = {
    "train.ppo_epochs": _algorithm(*ON_POLICY),
    **dict.fromkeys(
        (
            "rollout.max_staleness",
            "rollout.on_update",
            "rollout.num_engines",
            "rollout.num_nodes",
            "rollout.min_engines",
            "rollout.engine_timeout_s",
            "rollout.max_concurrent",
        ),
        ({"rollout.mode": ("remote",)},),
    ),
    "rollout.mode": _algorithm(*ON_POLICY),
    "rollout.seed_per_request": ({"rollout.mode": ("colocated",)},),
    "rollout.router_replay": _algorithm(*ON_POLICY),
    "rollout.dynamic_sampling": _algorithm("grpo", "ppo", "prime", "online_dpo", "distillation"),
    "reward.overlong_filtering": _algorithm(*_POLICY),
    "reward.overlong_buffer_len": _algorithm(*_SCORED),
    "reward.missing_eos_penalty": _algorithm(*_SCORED),
    "reward.length_penalty": _algorithm(*_SCORED),
    "advantage.adv_estimator": _algorithm("grpo"),
    "advantage.normalize_by_std": (_estimator("grpo"),),
    "advantage.use_leave_one_out_baseline": (_estimator("grpo"),),
    "advantage.eps": (_estimator("grpo"),),
    "advantage.baseline": (_estimator("reinforce"),),
    "advantage.truncated_in_baseline": (_estimator("reinforce"),),
    "advantage.max_difference": _algorithm("remax"),
    "advantage.gamma": (*_algorithm("ppo", "prime"), _estimator("reinforce_plus_plus")),
    "advantage.gae_lambda": _algorithm("ppo"),
    "advantage.normalize_advantages": _algorithm("ppo", "prime"),
    "advantage.whiten_with_bessel": (
        *_algorithm("ppo", "prime"),
        _estimator("reinforce_plus_plus", "reinforce_plus_plus_baseline"),
    ),
    "advantage.kl_coef": _KL_IN_REWARD,
    "advantage.kl_target": _KL_IN_REWARD,
    "advantage.kl_horizon": _KL_IN_REWARD,
    "loss.policy_loss": _algorithm(*_POLICY),
    "loss.clip_ratio_low": _algorithm(*_POLICY),
    "loss.clip_ratio_high": _algorithm(*_POLICY),
    "loss.clip_ratio_c": ({"algorithm": _POLICY, "loss.policy_loss": ("ppo_clip",)},),
    "loss.cispo_clip_low": ({"algorithm": _POLICY, "loss.policy_loss": ("cispo",)},),
    "loss.value_clip": _algorithm("ppo"),
    "loss.loss_agg_mode": _algorithm(*_POLICY, "sft"),
    "loss.kl_loss_coef": _algorithm(*_POLICY),
    "loss.entropy_coef": _algorithm(*_POLICY),
    "loss.use_rollout_logps": _algorithm(*_POLICY),
    "loss.truncated_importance_sampling_type": _algorithm(*_POLICY),
    "fp8_cfg.num_layers_at_start_in_bf16": ({"fp8_cfg.first_last_layers_bf16": (True,)},),
    "fp8_cfg.num_layers_at_end_in_bf16": ({"fp8_cfg.first_last_layers_bf16": (True,)},),
    "critic.path": _algorithm("ppo"),
    "critic.optimizer": _algorithm("ppo"),
    "critic.critic_warmup_steps": _algorithm("ppo"),
    "critic.own_layout": _algorithm("ppo"),
    "prime.path": _algorithm("prime"),
    "prime.optimizer": _algorithm("prime"),
    "prime.beta": _algorithm("prime"),
    "prime.process_coef": _algorithm("prime"),
    "prime.outcome_coef": _algorithm("prime"),
    "preference.loss": _PAIRS_OR_LABELS,
    "preference.beta": _PAIRS_OR_LABELS,
    "preference.label_smoothing": _PAIRS_OR_LABELS,
    "preference.average_log_probs": _PAIRS_OR_LABELS,
    "preference.sft_loss_coef": _PAIRS_OR_LABELS,
    "preference.dpop_lambda": (_loss("dpop"),),
    "preference.rpo_eta": (_loss("rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq"),),
    "preference.simpo_gamma": (_loss("simpo"),),
    "preference.longpo_lambda": (_loss("longpo"),),
    "preference.kto_desirable_weight": (_loss("kto"),),
    "preference.kto_undesirable_weight": (_loss("kto"),),
    "preference.bco_shift": (_loss("bco", "bco_pair", algorithms=("preference", "unpaired")),),
    "preference.bco_density_ratio": (_loss("bco"),),
    "preference.ties": _algorithm("online_dpo"),
    "preference.precompute_ref_log_probs": _algorithm("preference", "unpaired"),
    "preference.center_rewards_coef": _algorithm("reward_model"),
    "preference.margin_from_scores": _algorithm("reward_model"),
}


def check_unread(cfg: "Config") -> Problems:
    for path, alternatives in READ_WITH.items():
        value = _value(cfg, path)
        if value == _default(cfg, path) or any(_holds(cfg, alternative) for alternative in alternatives):
            continue
        deciding = dict.fromkeys(name for alternative in alternatives for name in alternative)
        shown = "" if hasattr(value, "__dataclass_fields__") else f" = {_word(value)}"
        words = "; or with ".join(map(_words, alternatives))
        now = ", ".join(f"{name} = {_word(_value(cfg, name))}" for name in deciding)
        yield Problem(f"{path}{shown} would do nothing: it is read with {words}; here {now}", (path, *deciding))


def _holds(cfg: "Config", alternative: Alternative) -> bool:
    return all(_value(cfg, name) in values for name, values in alternative.items())


def _words(alternative: Alternative) -> str:
    return " and ".join(f"{name} = {' or '.join(map(str, map(_word, values)))}" for name, values in alternative.items())


def _word(value: Any) -> Any:
    """As YAML spells it."""
    return {True: "true", False: "false", None: "null"}[value] if value is None or isinstance(value, bool) else value


def _value(cfg: "Config", path: str) -> Any:
    value: Any = cfg
    for name in path.split("."):
        value = vars(value)[name]
    return value


def _default(cfg: "Config", path: str) -> Any:
    section, name = path.split(".")
    (field,) = (field for field in fields(vars(cfg)[section]) if field.name == name)
    return field.default if field.default_factory is MISSING else field.default_factory()
