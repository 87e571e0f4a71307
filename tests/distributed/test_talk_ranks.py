"""Conversations with the engine in the trainer's process: turns, tools, what is under way over a push of weights, on
one rank and on two."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megarl.observe.metrics import read_metrics
from tests.distributed import resume_cases, talk_cases, tiny_models

RECIPE = Path(__file__).parents[2] / "examples" / "agentic" / "cpu_calculator.yaml"
ONE_RANK = [
    "cluster.gpus_per_node=1",
    "parallel.tensor_model_parallel_size=1",
    "parallel.sequence_parallel=false",
    "rollout.tensor_parallel_size=1",
]


@pytest.fixture(scope="module")
def other(tiny_chat_model, tmp_path_factory):
    """The same model with very different weights."""
    path = tmp_path_factory.mktemp("other")
    for file in tiny_chat_model.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    generator = torch.Generator().manual_seed(1)
    weights = load_file(path / "model.safetensors")
    noisy = {name: w + 0.3 * torch.randn(w.shape, generator=generator) for name, w in weights.items()}
    save_file(noisy, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def alone(ranks, tiny_chat_model, other):
    (found,) = ranks.run(talk_cases.conversations, 1, model=str(tiny_chat_model), other=str(other))
    return found


def responses(sample):
    return sample["tokens"][sample["prompt_length"] :]


def check_logps(models, sample):
    """Every token of the policy's has the log-prob of the weights that sampled it, after all that stands before it."""
    prompt, response = sample["tokens"][: sample["prompt_length"]], responses(sample)
    by_version = [tiny_models.reference_logps(model, prompt, response) for model in models]
    mask = sample["mask"] or [True] * len(response)
    for t, version in enumerate(sample["versions"]):
        if mask[t]:
            assert sample["logps"][t] == pytest.approx(by_version[version][t].item(), abs=1e-4), (t, version)


@pytest.fixture(scope="module")
def models(tiny_chat_model, other):
    return [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (tiny_chat_model, other)]


def test_turns_and_results_are_what_the_engine_saw(alone, models, tiny_chat_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_model)
    samples = alone["calculator"]
    assert [(s["prompt"], s["index"]) for s in samples] == [(p, k) for p in range(6) for k in range(2)]
    assert max(s["measures"]["tool_calls"] for s in samples) > 0
    for sample in samples:
        check_logps(models, sample)
        calls = int(sample["measures"]["tool_calls"])
        assert sample["measures"]["num_turns"] in (calls, calls + 1)
        for turn, told in exchanges(sample):
            assert tokenizer.decode(turn[-1:]) == "="
            expression = re.findall(r"[0-9+*-]+(?==)", tokenizer.decode(turn, skip_special_tokens=True))[-1]
            if tokenizer.decode(told).isdigit():
                assert int(tokenizer.decode(told)) == eval(re.sub(r"\b0+(?=[0-9])", "", expression))


def exchanges(sample):
    """Each turn that something was said to, and that."""
    text, mask = responses(sample), sample["mask"] or []
    edges = [0, *(t for t in range(1, len(mask)) if mask[t] != mask[t - 1]), len(text)]
    parts = [text[a:b] for a, b in itertools.pairwise(edges)]
    return list(zip(parts[::2], parts[1::2], strict=False))


def test_what_goes_wrong_costs_a_group_and_slow_tools_do_not(alone):
    assert [s["error"] for s in alone["raises"]] == [
        None,
        "prompt p1, sample 0: its conversation raised KeyError: 'no such tool'",
        None,
    ]
    assert [told for s in alone["slow"] for _, told in exchanges(s)] == [[5, 6]] * 2
    assert [len(responses(s)) <= 2 for s in alone["gives_up"]] == [True, True]


def test_what_is_under_way_goes_on_with_its_old_logps_and_the_new_weights(alone, models):
    """Two groups end, four are cut in the middle; each of these is in the end old tokens, then new ones."""
    done = [s["prompt"] for s in alone["first"]]
    assert len(done) == 2 and sorted(done + alone["under_way"]) == list(range(6))
    assert [s["prompt"] for s in alone["second"]] == alone["under_way"]
    for sample in alone["first"] + alone["second"] + alone["between"]:
        check_logps(models, sample)
        assert sample["versions"] == sorted(sample["versions"])
    assert {v for s in alone["first"] for v in s["versions"]} == {0}
    mixed = [s for s in alone["second"] if len(set(s["versions"])) == 2]
    assert len(mixed) >= 2, [s["versions"] for s in alone["second"]]


@pytest.mark.slow
def test_two_ranks_have_the_same_conversations(ranks, alone, tiny_chat_model, other):
    """Tool results come at the same steps of the engine, so that even what is sampled at random is the same."""
    found, follower = ranks.run(talk_cases.conversations, 2, model=str(tiny_chat_model), other=str(other))
    assert follower == {}
    for name in ("calculator", "greedy", "raises"):
        for ours, theirs in zip(found[name], alone[name], strict=True):
            assert ours["tokens"] == theirs["tokens"] and ours["measures"] == theirs["measures"], name
            assert ours["logps"] == pytest.approx(theirs["logps"], abs=1e-4)


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    path = tmp_path_factory.mktemp("sums") / "train.jsonl"
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(8) for b in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(ranks, world, model, sums, name, *more):
    root = sums.parent / "runs"
    settings = [f"model.path={model}", f"data.path={sums}", f"run.root={root}", f"run.name={name}", *more]
    settings += ["checkpoint.save_at_end=false", "rollout.kv_cache_gb=0.02", "reward.workers=1"]
    assert ranks.run(resume_cases.train, world, recipe=str(RECIPE), overrides=settings) == [None] * world
    return read_metrics(root / name)


@pytest.mark.slow
def test_grpo_over_several_turns_is_the_same_on_one_rank_and_on_two(ranks, tiny_chat_model, sums):
    """The recipe for laptops. That log-probs agree to 1e-9 says that the mask has exactly what vLLM sampled."""
    two = train(ranks, 2, tiny_chat_model, sums, "two", "run.max_num_steps=2")
    one = train(ranks, 1, tiny_chat_model, sums, "one", "run.max_num_steps=2", *ONE_RANK)
    for ours, theirs in zip(two[-2:], one[-2:], strict=True):
        assert ours["gen_kl_error"] < 1e-9 and ours["num_turns/max"] <= 4
        assert ours["tool_call_counts/mean"] > 0 and ours["tool_call_counts/mean"] == theirs["tool_call_counts/mean"]
        for name in ("reward/mean", "reward/measure", "num_turns/mean", "response_length/mean"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
        for name in ("actor/pg_loss", "actor/grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-7), name


@pytest.mark.slow
def test_steps_end_without_their_stragglers(ranks, tiny_chat_model, sums):
    """Two engines, each with 4 of 8 groups to finish and 2 more under way: steps after the first train on some that
    older weights began; a resumed run begins anew what was under way."""
    settings = ["rollout.tensor_parallel_size=1", "rollout.oversample=0.5"]
    settings += ["loss.truncated_importance_sampling_type=tis", "rollout.max_response_length=24"]
    settings += ["checkpoint.save_period=1", "checkpoint.keep_last=9", "run.max_num_epochs=9"]
    records = train(ranks, 2, tiny_chat_model, sums, "over", "run.max_num_steps=4", *settings)
    assert records[0]["staleness/max"] == 0 and records[0]["gen_kl_error"] < 1e-9
    assert max(record["staleness/max"] for record in records[1:]) >= 1
    again = train(ranks, 2, tiny_chat_model, sums, "over", "run.max_num_steps=6", *settings)
    assert [record["step"] for record in again] == [1, 2, 3, 4, 5, 6]
    assert again[4]["staleness/max"] == 0 and again[4]["gen_kl_error"] < 1e-9  # all of it begun anew
    assert all(math.isfinite(record["actor/loss"]) for record in again)


@pytest.mark.slow
def test_rejected_groups_are_replaced_at_once(ranks, tiny_chat_model, sums):
    """As many groups of different rewards as a step has prompts, though many are rejected."""
    settings = ["rollout.dynamic_sampling=true", "rollout.dynamic_sampling_refill=true", "run.max_num_steps=2"]
    settings += ["reward.functions=[{name: measure, args: {field: tool_calls}}]", "run.max_num_epochs=9"]
    records = train(ranks, 1, tiny_chat_model, sums, "refill", *settings, *ONE_RANK)
    for record in records[-2:]:
        assert record["frac_reward_zero_std"] == 0
        assert record["reward/errors"] == 0


@pytest.mark.slow
def test_the_clocks_of_a_surplus_stand_still_during_a_validation(ranks, tiny_chat_model, sums):
    """Step 1 ends without the third of its groups, whose tool takes 1 s of the 3 s that a turn may take; a validation
    of 4 s follows; then the group ends as if there had been none."""
    settings = [f"model.path={tiny_chat_model}", f"data.path={sums}", "rollout.kv_cache_gb=0.02", "reward.workers=1"]
    settings += ["rollout.num_prompts_per_step=2", "rollout.num_generations_per_prompt=2", "rollout.oversample=0.5"]
    settings += ["loss.truncated_importance_sampling_type=tis", "train.train_global_batch_size=4"]
    settings += ["rollout.environment=tests.distributed.talk_cases:hesitant"]
    settings += ["rollout.turn_timeout_s=3", "reward.functions=[{name: exact}]"]
    [(steps, errors)] = ranks.run(talk_cases.clocks, 1, recipe=str(RECIPE), overrides=[*settings, *ONE_RANK])
    assert errors == []
    assert [prompt for prompt, _ in steps[0]] == [0, 0, 1, 1]
    assert 2 in [prompt for prompt, _ in steps[1]]
    assert "timeout" not in [reason for step in steps for _, reason in step]
