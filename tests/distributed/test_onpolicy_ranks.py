"""Every loop that samples, and every estimator, loss and correction in it: the same curve on every layout."""

from __future__ import annotations

import json
import math

import pytest

from megarl.observe.metrics import read_metrics
from tests.distributed import train_cases

# One vLLM engine over all ranks, so that every layout samples the same with the same weights.
LAYOUTS = {
    "1 rank": (1, []),
    "TP2": (2, ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]),
    "DP2": (2, []),
    "PP2": (2, ["parallel.pipeline_model_parallel_size=2"]),
    "CP2": (2, ["parallel.context_parallel_size=2"]),
    "EP2": (2, ["parallel.expert_model_parallel_size=2"]),
}
# A critic that is divided otherwise than the policy.
OWN = ["critic.own_layout=true"]
_TP2 = ["critic.parallel.tensor_model_parallel_size=2", "critic.parallel.sequence_parallel=true"]
CRITICS = {
    "TP2, critic DP2": (2, [*LAYOUTS["TP2"][1], *OWN]),
    "DP2, critic TP2": (2, [*OWN, *_TP2]),
    "PP2, critic CP2": (2, [*LAYOUTS["PP2"][1], *OWN, "critic.parallel.context_parallel_size=2"]),
    "TP2 DP2, critic PP2 DP2": (
        4,
        [*LAYOUTS["TP2"][1], *OWN, "critic.parallel.pipeline_model_parallel_size=2"],
    ),
}
RECIPE = """
cluster: {{device: cpu}}
run: {{root: {root}, max_num_steps: 12, max_num_epochs: 100}}
model: {{path: {model}, dtype: fp32}}
optimizer: {{lr: 1.0e-3}}
train: {{train_global_batch_size: 32, ppo_epochs: 2, train_mb_tokens: 120, logprob_mb_tokens: 120}}
data: {{path: {data}, apply_chat_template: false, max_prompt_length: 8}}
rollout: {{num_prompts_per_step: 8, num_generations_per_prompt: 4, max_response_length: 6, kv_cache_gb: 0.02}}
reward: {{workers: 1, functions: [{{name: "tests.fixtures.digits:even"}}]}}
checkpoint: {{save_at_end: false}}
"""
SEQUENCES = "loss.loss_agg_mode=seq-mean-token-mean"
IN_REWARD = ["advantage.kl_coef=0.05", "advantage.kl_target=0.01", "advantage.kl_horizon=100"]
# Two updates with the whole rollout, so that ratios leave 1 and clips bite.
METHODS = {
    "grpo": [SEQUENCES, "loss.kl_loss_coef=0.04"],
    "dr-grpo": ["advantage.normalize_by_std=false", "loss.loss_agg_mode=seq-mean-token-sum-norm"],
    "dapo": [
        "loss.clip_ratio_high=0.28",
        "rollout.dynamic_sampling=true",
        "reward.overlong_buffer_len=3",
        "reward.overlong_filtering=true",
    ],
    "gspo": ["loss.policy_loss=gspo", SEQUENCES, "loss.clip_ratio_low=3e-4", "loss.clip_ratio_high=4e-4"],
    "cispo": ["loss.policy_loss=cispo", "loss.clip_ratio_high=0.5"],
    "dual-clip": ["loss.clip_ratio_c=3", "loss.entropy_coef=0.01"],
    "rloo": ["advantage.adv_estimator=rloo", "loss.policy_loss=sequence_clip", SEQUENCES, *IN_REWARD],
    "reinforce": [
        "advantage.adv_estimator=reinforce",
        "advantage.truncated_in_baseline=false",
        "loss.policy_loss=reinforce",
        "train.ppo_epochs=1",
    ],
    "reinforce++": ["advantage.adv_estimator=reinforce_plus_plus", *IN_REWARD],
    "reinforce++-baseline": [
        "advantage.adv_estimator=reinforce_plus_plus_baseline",
        "advantage.whiten_with_bessel=false",
        "loss.kl_loss_coef=0.01",
        "loss.kl_type=k2",
    ],
    "tis": ["loss.truncated_importance_sampling_type=tis", "loss.kl_loss_coef=0.01", "loss.kl_type=k1"],
    "icepop": ["loss.truncated_importance_sampling_type=icepop"],
    "seq-mask-tis": ["loss.truncated_importance_sampling_type=seq-mask-tis"],
    "lengthening": [
        "rollout.response_length_stages=[{first_step: 1, max_response_length: 3}, "
        "{first_step: 6, max_response_length: 6}]"
    ],
    "remax": ["algorithm=remax", "advantage.max_difference=5"],
    "ppo": ["algorithm=ppo", "critic.optimizer.lr=1e-3", "critic.critic_warmup_steps=2", *IN_REWARD],
    "prime": [
        "algorithm=prime",
        "prime.optimizer.lr=1e-3",
        "rollout.dynamic_sampling=true",
        "rollout.dynamic_sampling_min_reward=0.05",
    ],
    "online-dpo": ["algorithm=online_dpo", "train.train_global_batch_size=8", "reward.missing_eos_penalty=0.1"],
    "online-ipo": [
        "algorithm=online_dpo",
        "train.train_global_batch_size=8",
        "preference.loss=ipo",
        "preference.ties=drop",
    ],
    "distillation": ["algorithm=distillation"],
}


@pytest.fixture(scope="module")
def recipe(tiny_chat_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("on-policy")
    data = folder / "train.jsonl"
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(8) for b in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(root=folder / "runs", model=tiny_chat_model, data=data))
    return path


@pytest.fixture(scope="module")
def larger(tiny_chat_model, tmp_path_factory):
    """A model of twice the width and three layers, with the same tokenizer: a teacher, or a critic."""
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path = tmp_path_factory.mktemp("larger")
    shutil.copytree(tiny_chat_model, path, dirs_exist_ok=True)
    config = AutoConfig.from_pretrained(tiny_chat_model)
    config.hidden_size, config.num_attention_heads, config.num_key_value_heads = 128, 4, 2
    config.num_hidden_layers, config.layer_types = 4, ["full_attention"] * 4
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def with_experts(tiny_chat_model, tmp_path_factory):
    """A Qwen3-MoE with the same tokenizer."""
    import shutil

    import torch
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    path = tmp_path_factory.mktemp("with-experts")
    shutil.copytree(tiny_chat_model, path, dirs_exist_ok=True)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2}
    experts = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
    special = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    words = len(AutoTokenizer.from_pretrained(tiny_chat_model))
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **sizes, **experts, **special, head_dim=32, num_hidden_layers=2, vocab_size=words, max_position_embeddings=64
    )
    Qwen3MoeForCausalLM(config).save_pretrained(path)
    return path


def curve(ranks, recipe, name, layout, overrides):
    """The metrics of every step."""
    world, placed = (LAYOUTS | CRITICS)[layout]
    run = f"{name}-{layout}".replace(" ", "").replace(",", "-")
    engine = min(world, 2)  # the model has two heads
    here = [f"run.name={run}", f"cluster.gpus_per_node={world}", f"rollout.tensor_parallel_size={engine}", *placed]
    assert ranks.run(train_cases.train, world, recipe=str(recipe), overrides=[*here, *overrides]) == ["done"] * world
    return read_metrics(recipe.parent / "runs" / run)


@pytest.fixture(scope="module")
def alone():
    """Curves of one rank, by name and settings."""
    return {}


def check(ranks, recipe, alone, name, layouts, record_property, more=(), steps=12):
    """Every layout's curve is one rank's. The largest difference of a loss goes to pytest's --junitxml."""
    overrides = [*METHODS[name], *more, f"run.max_num_steps={steps}"]
    if (key := (name, *overrides)) not in alone:
        alone[key] = curve(ranks, recipe, f"{name}-{steps}", "1 rank", overrides)
    truth = alone[key]
    assert len(truth) == steps
    assert all(math.isfinite(value) for step in truth for value in step.values())
    for layout in layouts:
        run = curve(ranks, recipe, f"{name}-{steps}", layout, overrides)
        losses = [(a["actor/loss"], b["actor/loss"]) for a, b in zip(run, truth, strict=True) if "actor/loss" in b]
        record_property(f"{name}, {layout}", f"{max(abs(a - b) for a, b in losses):.1e}")
        for step, expected in zip(run, truth, strict=True):
            names = [n for n in expected if n.startswith(("actor/", "critic/", "prm/", "reward/", "rewards/"))]
            for metric in names:
                where = f"{name}, {layout}, step {step['step']}: {metric}"
                assert step[metric] == pytest.approx(expected[metric], rel=1e-4, abs=2e-5), where
    return truth


@pytest.fixture
def also(larger):
    """Models of another size than the policy's, where a method has a second one."""
    return {"ppo": [f"critic.path={larger}"], "distillation": [f"teacher.path={larger}"]}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["TP2", "DP2", "PP2", "CP2"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_on_every_layout(ranks, recipe, alone, also, name, layout, record_property):
    check(ranks, recipe, alone, name, [layout], record_property, also.get(name, []))


@pytest.mark.slow
def test_ppo_with_a_larger_critic_on_two_replicas(ranks, recipe, alone, also, record_property):
    """The critic alone learns at first; its squared error falls. All of the vocabulary is on vLLM's first rank."""
    more = [*also["ppo"], "weight_sync.verify=true"]
    steps = check(ranks, recipe, alone, "ppo", ["DP2"], record_property, more, steps=4)
    assert "actor/loss" not in steps[1] and "actor/loss" in steps[2]
    assert steps[1]["critic/vf_loss"] < steps[0]["critic/vf_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prime", "online-dpo"])
def test_two_steps_on_two_replicas(ranks, recipe, alone, also, name, record_property):
    check(ranks, recipe, alone, name, ["DP2"], record_property, also.get(name, []), steps=2)


def test_dynamic_sampling_draws_until_it_has_enough(ranks, recipe, alone, record_property):
    """The first eight prompts have a 7, at which the reward raises, so that the first draw gives no group at all."""
    path = recipe.parent / "sevens.jsonl"
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in (7, 6, 5, 4, 3) for b in range(7)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"prompt": "7+7=", "answer": "14"}, *rows]))
    raising = 'reward.functions=[{name: "tests.fixtures.digits:raises_on_seven"}]'
    more = [f"data.path={path}", "data.shuffle=false", raising]
    first, _ = check(ranks, recipe, alone, "dapo", ["DP2"], record_property, more, steps=2)
    assert first["dynamic_sampling/num_gen_batches"] >= 2 and first["reward/errors"] == 8 * 4


RAISING = 'reward.functions=[{name: "tests.fixtures.digits:raises_on_seven"}]'


@pytest.mark.slow
def test_responses_that_end_with_their_first_token(ranks, recipe, alone, record_property):
    """Whatever it is: every token of the vocabulary stops."""
    words = len(json.loads((_model(recipe) / "tokenizer.json").read_text())["model"]["vocab"])
    more = [f"rollout.stop_token_ids={list(range(words))}"]
    steps = check(ranks, recipe, alone, "grpo", ["DP2"], record_property, more, steps=2)
    for step in steps:
        assert step["response_length/min"] == step["response_length/max"] == 1
        assert step["response_length/clip_ratio"] == 0 and step["actor/grad_norm"] > 0


# All responses end at the limit, and none counts; or all rewards are alike. So few that in some step none of them is an
# EOS, which is one token of 19.
FEW = ["rollout.num_prompts_per_step=2", "rollout.num_generations_per_prompt=2", "train.train_global_batch_size=4"]
NOTHING_TO_LEARN = {
    "truncated": [*FEW, "rollout.max_response_length=1", "reward.overlong_filtering=true"],
    "alike": ['reward.functions=[{name: "tests.fixtures.digits:all_alike"}]'],
}


@pytest.mark.parametrize("why", ["truncated", pytest.param("alike", marks=pytest.mark.slow)])
def test_a_step_without_anything_to_learn_is_no_gradient_at_all(ranks, recipe, why):
    more = [*METHODS["grpo"], *NOTHING_TO_LEARN[why], "run.max_num_steps=4"]
    steps = curve(ranks, recipe, f"nothing-{why}", "DP2", more)
    assert len(steps) == 4 and all(math.isfinite(value) for step in steps for value in step.values())
    name = {"truncated": "actor/tokens", "alike": "reward/std"}[why]
    without = [step for step in steps if step[name] == 0]
    assert len(without) >= (1 if why == "truncated" else 4)
    for step in without:
        assert step["actor/loss"] == step["actor/grad_norm"] == 0
        assert why == "alike" or step["response_length/clip_ratio"] == 1


@pytest.mark.parametrize("name", ["grpo", pytest.param("ppo", marks=pytest.mark.slow)])
def test_a_replica_without_a_sequence(ranks, recipe, alone, record_property, name):
    """Of two prompts with a sample each the first has no reward: one of two replicas gets nothing, policy and critic,
    and the curve is one rank's. Either engine samples one."""
    path = recipe.parent / "every-other.jsonl"
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for b in range(1, 6) for a in (7, b)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = ["rollout.num_prompts_per_step=2", "rollout.num_generations_per_prompt=1", "rollout.tensor_parallel_size=1"]
    more = [*small, "train.train_global_batch_size=2", f"data.path={path}", "data.shuffle=false", RAISING]
    if name == "grpo":
        more += ["advantage.adv_estimator=reinforce", "advantage.baseline=none", "loss.policy_loss=reinforce"]
        more += ["train.ppo_epochs=1"]
    steps = check(ranks, recipe, alone, name, ["DP2"], record_property, more, steps=4)
    assert all(step["reward/errors"] == 1 for step in steps)
    assert steps[-1]["actor/grad_norm"] > 0


@pytest.mark.slow
def test_an_engine_without_a_prompt(ranks, recipe, alone, record_property):
    """One prompt for two engines: the second samples nothing, and both replicas train."""
    more = ["rollout.num_prompts_per_step=1", "train.train_global_batch_size=4", "rollout.tensor_parallel_size=1"]
    check(ranks, recipe, alone, "grpo", ["DP2"], record_property, more, steps=2)


def test_a_step_whose_groups_are_all_dropped_ends_all_ranks_alike(ranks, recipe):
    path = recipe.parent / "only-sevens.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"7+{b}=", "answer": str(7 + b)}) + "\n" for b in range(8)))
    with pytest.raises(AssertionError) as caught:
        curve(ranks, recipe, "only-sevens", "DP2", [f"data.path={path}", RAISING])
    said = "EmptyStepError: no group of this step could be scored; the first of 32 errors: prompt only-sevens.jsonl:"
    assert str(caught.value).count(said) == 2


def _model(recipe):
    from pathlib import Path

    from megarl.config import load

    return Path(load([str(recipe)]).model.path)


@pytest.mark.parametrize(
    "name, calls", [pytest.param("remax", [(1, 0.0), (4, 1.0)], marks=pytest.mark.slow), ("online-dpo", [(4, 1.0)])]
)
def test_further_rollouts_are_the_same_engines(ranks, recipe, name, calls):
    """Two steps, each with greedy responses and others in turn, or with the samples that pairs are made of."""
    overrides = [*METHODS[name], "run.max_num_steps=2", f"run.name={name}-calls"]
    found = ranks.run(train_cases.calls_of_engines, 1, recipe=str(recipe), overrides=overrides)
    assert found == [(1, calls * 2)]


def test_a_teacher_has_no_gradients_and_no_optimizer(ranks, recipe):
    ((on_device, same),) = ranks.run(
        train_cases.asked_only, 1, recipe=str(recipe), overrides=[], tokens=[3, 4, 5, 6, 1]
    )
    assert same and on_device["params"] > 0 and on_device["grads"] == on_device["optimizer"] == 0


@pytest.mark.slow
def test_grpo_with_experts_on_two_ranks_each(ranks, recipe, with_experts):
    """Experts are shared out in the trainer, and vLLM cuts each of them in two: it samples what the policy computes
    after every push, each of which is verified, and the curve is one rank's."""
    more = [*METHODS["grpo"], f"model.path={with_experts}", "weight_sync.verify=true", "run.max_num_steps=6"]
    truth, run = (curve(ranks, recipe, "experts", name, more) for name in ("1 rank", "EP2"))
    assert len(run) == len(truth) == 6
    assert run[-1]["actor/grad_norm"] > 0
    for step, expected in zip(run, truth, strict=True):
        assert step["gen_kl_error"] < 1e-9 and expected["gen_kl_error"] < 1e-9
        for metric in ("actor/loss", "actor/grad_norm", "reward/mean"):
            assert step[metric] == pytest.approx(expected[metric], rel=1e-4, abs=2e-5), (step["step"], metric)


def test_a_critic_in_a_layout_of_its_own(ranks, recipe, alone, larger, record_property):
    """Policy TP2, critic DP2: samples change replicas for their values and for what the critic learns from them."""
    more = [f"critic.path={larger}"]
    check(ranks, recipe, alone, "ppo", ["TP2, critic DP2"], record_property, more, steps=3)


@pytest.mark.slow
@pytest.mark.parametrize("layout", CRITICS)
def test_a_critic_in_every_layout_of_its_own(ranks, recipe, alone, larger, layout, record_property):
    check(ranks, recipe, alone, "ppo", [layout], record_property, [f"critic.path={larger}"])
