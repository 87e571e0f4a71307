"""Loss settings that exclude or need one another, and what is said about them."""

import pytest

from megarl.config import Config, ConfigError, load

SEQUENCES = "loss.loss_agg_mode=seq-mean-token-mean"
RATIO = "loss.truncated_importance_sampling_ratio"


def loaded(tmp_path, *overrides) -> Config:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {path: m}\ndata: {path: d.jsonl}\n")
    return load([str(recipe), *overrides], check_model=False)


@pytest.mark.parametrize(
    "overrides, problem",
    [
        (["loss.policy_loss=gspo"], "loss.policy_loss = gspo is one loss a sequence: it needs loss.loss_agg_mode="),
        (["loss.policy_loss=cispo", "loss.clip_ratio_c=3"], "loss.clip_ratio_c = 3.0 is of ppo_clip and would do noth"),
        (["loss.cispo_clip_low=true"], "loss.cispo_clip_low = true is of cispo and would do nothing"),
        (["loss.kl_type=k2", "loss.kl_gradient=score_function"], "k2 has the gradient of the divergence by itself"),
        (
            ["loss.use_rollout_logps=true", "loss.truncated_importance_sampling_type=icepop"],
            "loss.truncated_importance_sampling_type = icepop would correct for the same difference twice",
        ),
        (
            ["loss.truncated_importance_sampling_type=icepop", f"{RATIO}_min=3"],
            f"{RATIO}_min = 3.0 and {RATIO} = 2.0 leave nothing between them for icepop to keep",
        ),
        (["preference.loss=robust"], "preference.loss = robust needs the share of wrong labels"),
        (["preference.loss=kto", "preference.label_smoothing=0.1"], "label_smoothing = 0.1 is of dpo and robust"),
        (["preference.label_smoothing=0.5"], "preference.label_smoothing = 0.5 is outside [0, 0.5)"),
        (["preference.loss=orpo", "preference.average_log_probs=true"], "preference.loss = orpo takes the mean anyway"),
        (["preference.loss=kto", "preference.average_log_probs=true"], "preference.loss = kto is defined on sums"),
        (["preference.loss=orpo", "preference.sft_loss_coef=1"], "orpo has a likelihood term of its own"),
        (["preference.loss=bco", "preference.sft_loss_coef=1"], "bco has no chosen response"),
        (
            ["preference.loss=kto", "preference.kto_desirable_weight=0", "preference.kto_undesirable_weight=0"],
            "preference.kto_undesirable_weight = 0 leave nothing to learn",
        ),
        (["algorithm=preference", "preference.loss=longpo"], "longpo needs data.reference_prompt_key"),
        (
            ["algorithm=unpaired", "preference.loss=kto", "preference.precompute_ref_log_probs=true"],
            "there is nothing to compute once in kto",
        ),
        (["preference.ref_log_probs_path=a.jsonl"], "goes with preference.precompute_ref_log_probs=true"),
        (["preference.bco_density_ratio=true"], "is of bco: preference.loss = dpo"),
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
    cfg = loaded(tmp_path, "preference.loss=robust", "preference.label_smoothing=0.1", "loss.value_clip=null")
    assert (cfg.preference.loss, cfg.preference.label_smoothing, cfg.loss.value_clip) == ("robust", 0.1, None)
