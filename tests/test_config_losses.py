"""Loss settings that exclude or need one another, and what is said about them."""

from typing import get_args, get_type_hints

import pytest

from megarl.config import Config, ConfigError, DataConfig, ModelConfig, load
from megarl.config.unread import READ_WITH

SEQUENCES = "loss.loss_agg_mode=seq-mean-token-mean"
KTO = ["algorithm=unpaired", "preference.loss=kto"]
ORPO = ["algorithm=preference", "preference.loss=orpo"]
RATIO = "loss.truncated_importance_sampling_ratio"


def loaded(tmp_path, *overrides) -> Config:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {path: m}\ndata: {path: d.jsonl}\n")
    return load([str(recipe), *overrides], check_model=False)


@pytest.mark.parametrize(
    "overrides, problem",
    [
        (["loss.policy_loss=gspo"], "loss.policy_loss = gspo is one loss a sequence: it needs loss.loss_agg_mode="),
        (["loss.kl_type=k2", "loss.kl_gradient=score_function"], "k2 has the gradient of the divergence by itself"),
        (
            ["loss.use_rollout_logps=true", "loss.truncated_importance_sampling_type=icepop"],
            "loss.truncated_importance_sampling_type = icepop would correct for the same difference twice",
        ),
        (
            ["loss.truncated_importance_sampling_type=icepop", f"{RATIO}_min=3"],
            f"{RATIO}_min = 3.0 and {RATIO} = 2.0 leave nothing between them for icepop to keep",
        ),
        (["algorithm=preference", "preference.loss=robust"], "preference.loss = robust needs the share of wrong"),
        ([*KTO, "preference.label_smoothing=0.1"], "label_smoothing = 0.1 is of dpo and robust"),
        (["preference.label_smoothing=0.5"], "preference.label_smoothing = 0.5 is outside [0, 0.5)"),
        ([*ORPO, "preference.average_log_probs=true"], "preference.loss = orpo takes the mean anyway"),
        ([*KTO, "preference.average_log_probs=true"], "preference.loss = kto is defined on sums"),
        ([*ORPO, "preference.sft_loss_coef=1"], "orpo has a likelihood term of its own"),
        (["algorithm=unpaired", "preference.loss=bco", "preference.sft_loss_coef=1"], "bco has no chosen response"),
        (
            [*KTO, "preference.kto_desirable_weight=0", "preference.kto_undesirable_weight=0"],
            "preference.kto_undesirable_weight = 0 leave nothing to learn",
        ),
        (["algorithm=preference", "preference.loss=longpo"], "longpo needs data.reference_prompt_key"),
        (
            [*KTO, "preference.precompute_ref_log_probs=true"],
            "preference.loss = kto has a baseline of other pairs a step",
        ),
        (["preference.ref_log_probs_path=a.jsonl"], "goes with preference.precompute_ref_log_probs=true"),
        (["advantage.kl_target=0.1"], "advantage.kl_target = 0.1 holds advantage.kl_coef, which is 0 and stays 0"),
        (
            ["loss.policy_loss=reinforce", "train.train_global_batch_size=128"],
            "train.ppo_epochs 1 x 512 sequences a step / train.train_global_batch_size 128 = 4 updates; take one",
        ),
        (["algorithm=distillation"], "algorithm = distillation and teacher.path = null: distillation has a teacher"),
        (["rollout.dynamic_sampling_min_reward=0.2"], "go with rollout.dynamic_sampling=true"),
        (
            ["rollout.response_length_stages=[{first_step: 5, max_response_length: 8}]"],
            "the first stage must begin at step 1, found 5",
        ),
        (
            ["rollout.response_length_stages=[{first_step: 1, max_response_length: 2048}]"],
            "go up to 2048 tokens, more than rollout.max_response_length = 1024",
        ),
        (
            ["algorithm=online_dpo", "train.train_global_batch_size=48"],
            "rollout.num_prompts_per_step 64, a pair each, do not make whole updates of "
            "train.train_global_batch_size 48 pairs: 64 % 48 = 16",
        ),
        (
            ["algorithm=online_dpo", "train.train_global_batch_size=32", "train.train_mb_tokens=3000"],
            "train.train_mb_tokens = 3000 is less than a pair of the longest: 2 x (",
        ),
    ],
)
def test_settings_that_do_not_fit(tmp_path, overrides, problem):
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, *overrides)
    (found,) = caught.value.problems
    assert problem in found


def test_settings_that_fit(tmp_path):
    loaded(tmp_path, "loss.policy_loss=gspo", SEQUENCES, "loss.clip_ratio_low=3e-4", "loss.clip_ratio_high=4e-4")
    loaded(tmp_path, "loss.kl_gradient=importance", "loss.truncated_importance_sampling_type=seq-mask-tis")
    cfg = loaded(tmp_path, "algorithm=preference", "preference.loss=robust", "preference.label_smoothing=0.1")
    assert (cfg.preference.loss, cfg.preference.label_smoothing) == ("robust", 0.1)
    assert loaded(tmp_path, "algorithm=ppo", "loss.value_clip=null").loss.value_clip is None


# What would be ignored, under an algorithm that does not read it, and what the refusal says.
IGNORED = {
    "advantage.kl_coef=0.1": ("remax", "prime", "online_dpo", "distillation"),
    "advantage.adv_estimator=rloo": ("ppo", "remax", "prime", "online_dpo", "distillation"),
    "advantage.max_difference=5": ("grpo", "ppo"),
    "advantage.baseline=batch": ("grpo", "ppo"),
    "advantage.truncated_in_baseline=false": ("grpo", "remax"),
    "advantage.whiten_with_bessel=false": ("grpo", "distillation"),
    "advantage.gamma=0.9": ("grpo", "remax"),
    "advantage.gae_lambda=1": ("grpo", "prime"),
    "rollout.dynamic_sampling=true": ("remax",),
    "reward.overlong_filtering=true": ("online_dpo",),
    "reward.length_penalty=0.1": ("distillation",),
    "loss.value_clip=null": ("grpo", "prime"),
    "loss.kl_loss_coef=0.1": ("sft", "online_dpo", "preference"),
    "loss.clip_ratio_c=3": ("sft", "online_dpo"),
    "loss.cispo_clip_low=true": ("grpo",),
    "critic.path=m": ("grpo", "prime"),
    "critic.optimizer.lr=1": ("grpo", "remax"),
    "critic.critic_warmup_steps=1": ("grpo", "sft"),
    "prime.beta=0.1": ("grpo", "ppo"),
    "prime.optimizer.lr=1": ("grpo", "ppo"),
    "preference.loss=ipo": ("sft", "grpo", "reward_model"),
    "preference.beta=1": ("grpo", "reward_model"),
    "preference.dpop_lambda=1": ("preference", "online_dpo"),
    "preference.simpo_gamma=1": ("preference",),
    "preference.bco_density_ratio=true": ("preference",),
    "preference.ties=drop": ("preference", "grpo"),
    "preference.center_rewards_coef=0.1": ("preference", "online_dpo"),
    "preference.margin_from_scores=true": ("preference",),
    "preference.precompute_ref_log_probs=true": ("online_dpo", "sft"),
    "train.ppo_epochs=2": ("sft", "preference"),
}


@pytest.mark.parametrize("setting, algorithm", [(s, a) for s, names in IGNORED.items() for a in names])
def test_a_setting_that_nothing_reads_is_refused(tmp_path, setting, algorithm):
    fitting = ["teacher.path=t"] if algorithm == "distillation" else ["train.train_global_batch_size=8"]
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, f"algorithm={algorithm}", setting, *fitting)
    (found,) = caught.value.problems
    name = setting.split("=")[0]
    name = name.removesuffix(".lr")
    assert found.startswith(name) and "would do nothing: it is read with" in found
    assert f"here algorithm = {algorithm}" in found


def test_a_refusal_says_what_would_read_the_setting(tmp_path):
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, "advantage.gamma=0.9")
    assert caught.value.problems == [
        "advantage.gamma = 0.9 would do nothing: it is read with algorithm = ppo or prime; or with algorithm = grpo "
        "and advantage.adv_estimator = reinforce_plus_plus; here algorithm = grpo, advantage.adv_estimator = grpo"
    ]


def test_the_table_names_fields_and_values_that_exist():
    """Every field of methods that there is, but for those that all their algorithms read or that are checked apart."""
    cfg = Config(model=ModelConfig(path="m"), data=DataConfig(path="d"))
    apart = {"teacher.path", "preference.ref_log_probs_path", "critic.parallel"}
    refined = {"loss.kl_type", "loss.kl_gradient"} | {RATIO, f"{RATIO}_min"}  # read with another that is in the table
    sections = ("advantage", "loss", "critic", "prime", "teacher", "preference")
    everything = {f"{section}.{name}" for section in sections for name in vars(vars(cfg)[section])}
    assert everything - set(READ_WITH) == apart | refined
    for path, alternatives in READ_WITH.items():
        for field, values in [(path, ()), *(item for alternative in alternatives for item in alternative.items())]:
            *section, name = field.split(".")
            owner = vars(cfg)[section[0]] if section else cfg
            hint = get_type_hints(type(owner))[name]
            assert set(values) <= ({True, False} if hint is bool else set(get_args(hint)))
