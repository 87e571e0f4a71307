"""Every method that samples its own data, as whole runs on two ranks with real vLLM rollouts: the same steps whether
samples or matrices are divided."""

from __future__ import annotations

import math

import pytest

from tests.distributed.test_training_ranks import LAYOUTS, recipe, run  # noqa: F401

QUICK = ["validation.val_at_start=false", "validation.val_at_end=false", "checkpoint.save_at_end=false"]
METHODS = {
    "rloo": ["advantage.adv_estimator=rloo", "advantage.kl_coef=0.05", "loss.policy_loss=reinforce"],
    "reinforce": ["advantage.adv_estimator=reinforce", "advantage.baseline=batch", "loss.policy_loss=reinforce"],
    "reinforce++": ["advantage.adv_estimator=reinforce_plus_plus", "advantage.kl_coef=0.05"],
    "reinforce++ baseline": ["advantage.adv_estimator=reinforce_plus_plus_baseline", "loss.kl_type=k2"],
    "dr. grpo": ["advantage.normalize_by_std=false", "loss.loss_agg_mode=seq-mean-token-sum-norm"],
    "gspo": ["loss.policy_loss=gspo", "loss.loss_agg_mode=seq-mean-token-mean", "train.ppo_epochs=2"],
    "cispo": ["loss.policy_loss=cispo", "train.ppo_epochs=2"],
    "dapo": [
        "rollout.dynamic_sampling=true",
        "loss.clip_ratio_high=0.28",
        "loss.kl_loss_coef=0",
        "reward.overlong_buffer_len=2",
        "reward.overlong_filtering=true",
        "rollout.num_prompts_per_step=4",
    ],
    "remax": ["algorithm=remax", "loss.policy_loss=reinforce"],
    "ppo": ["algorithm=ppo", "train.ppo_epochs=2", "advantage.kl_coef=0.05", "advantage.kl_target=0.01"],
}
SAME = (
    "reward/mean",
    "actor/loss",
    "actor/grad_norm",
    "critic/advantages/mean",
    "critic/advantages/max",
    "critic/vf_loss",
    "critic/kl",
    "reward/greedy",
)


def compare(ranks, recipe, name, layouts):  # noqa: F811
    first = {}
    for layout in layouts:
        overrides = [*QUICK, *METHODS[name], *LAYOUTS[layout], "run.max_num_steps=1"]
        folder = f"{name.replace('+', 'p').replace(' ', '-')}-{layout}"
        outcomes, records, _ = run(ranks, recipe, folder, overrides)
        assert outcomes == ["done", "done"]
        first[layout] = records[-1]
    for layout in layouts[1:]:
        for key in SAME:
            there, here = first[layouts[0]].get(key), first[layout].get(key)
            assert (there is None) == (here is None), key
            if there is not None:
                assert math.isfinite(there)
                assert here == pytest.approx(there, rel=1e-4, abs=1e-6), (layout, key)
    return first[layouts[0]]


@pytest.mark.parametrize("name", ["reinforce++", "ppo"])
def test_the_same_step_on_two_replicas_and_two_shards(ranks, recipe, name):  # noqa: F811
    found = compare(ranks, recipe, name, ["DP2", "TP2"])
    assert found["critic/advantages/max"] > 0 > found["critic/advantages/min"]
    if name == "ppo":
        # Its values begin with 0, and both epochs' losses are means of half the squared returns, about.
        assert found["critic/values/max"] == 0 and found["critic/vf_loss"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_on_every_layout(ranks, recipe, name):  # noqa: F811
    compare(ranks, recipe, name, ["DP2", "TP2", "PP2"])
