"""A run that stops and resumes is the run that did not: bit for bit in one layout, within 1e-5 across layouts."""

from __future__ import annotations

import json

import pytest

from megarl.observe.metrics import read_metrics
from tests.distributed import resume_cases

RECIPE = """
cluster: {{gpus_per_node: 2, device: cpu}}
run: {{root: {root}, max_num_steps: 6, max_num_epochs: 9}}
model: {{path: {model}, dtype: fp32}}
optimizer: {{lr: 1.0e-2, lr_warmup_iters: 3}}
train: {{train_global_batch_size: 8, train_mb_tokens: 200, logprob_mb_tokens: 300}}
data: {{path: {data}, apply_chat_template: false, max_prompt_length: 8}}
rollout: {{num_prompts_per_step: 4, num_generations_per_prompt: 4, max_response_length: 6, kv_cache_gb: 0.02}}
reward: {{workers: 1, functions: [{{name: "tests.fixtures.digits:even"}}]}}
weight_sync: {{bucket_size_mb: 1, max_gen_kl_error: 1.0e-9}}
checkpoint: {{save_at_end: false}}
"""
LAYOUTS = {
    "TP2": ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
    "DP2": [],
    "PP2": ["parallel.pipeline_model_parallel_size=2"],
}
ALGORITHMS = {
    "sft": ["algorithm=sft"],
    "dpo": ["algorithm=preference"],
    "bco": ["algorithm=unpaired", "preference.loss=bco"],
    "grpo": ["algorithm=grpo", "loss.kl_loss_coef=0.01", "train.ppo_epochs=2"],
    "ppo": ["algorithm=ppo", "loss.kl_loss_coef=0.01"],
    "prime": ["algorithm=prime", "prime.optimizer.lr=1e-2"],
}
# What depends on the clock, and on when a checkpoint was written.
UNLIKE = ("timing_s/", "perf/", "checkpoint/")


@pytest.fixture(scope="module")
def recipe(tiny_chat_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    sums = [(f"{a}+{b}=", str(a + b), str(a + b + 1) + "0" * (b % 3)) for a in range(5) for b in range(5)]
    rows = {
        "rows": [{"prompt": p, "answer": y, "response": y} for p, y, _ in sums],
        "preference": [{"prompt": p, "chosen": y, "rejected": n} for p, y, n in sums],
        "unpaired": [{"prompt": p, "response": n, "label": bool(k % 3)} for k, (p, _, n) in enumerate(sums)],
    }
    for name, records in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(root=folder / "runs", model=tiny_chat_model, data=folder / "rows.jsonl"))
    return path


def run(ranks, recipe, name, what, layout="DP2", world=2, **kwargs):
    overrides = [f"run.name={name}", *ALGORITHMS[what], *LAYOUTS[layout]]
    for kind in ("preference", "unpaired"):
        if f"algorithm={kind}" in overrides:
            overrides.append(f"data.path={recipe.parent / kind}.jsonl")
    overrides += kwargs.pop("more", [])
    stopped = ranks.run(resume_cases.train, world, recipe=str(recipe), overrides=overrides, **kwargs)
    return stopped, [numbers(record) for record in read_metrics(recipe.parent / "runs" / name)]


def numbers(record):
    return {name: value for name, value in record.items() if not name.startswith(UNLIKE)}


def check_bits(ranks, recipe, what, layout, **kwargs):
    """3 steps, a stop, 3 more: every number of every step is that of 6 steps straight."""
    name = f"{what}-{layout}"
    _, straight = run(ranks, recipe, f"{name}-straight", what, layout)
    stopped, first = run(ranks, recipe, name, what, layout, stop_after=3, **kwargs)
    assert all("after step 3 of 6" in said for said in stopped)
    assert len(first) == 3
    _, resumed = run(ranks, recipe, name, what, layout)
    assert resumed == straight
    assert len({record["actor/loss"] for record in straight}) == 6


def test_sft_resumes_bit_for_bit(ranks, recipe):
    """The signal comes to one rank only; both stop."""
    check_bits(ranks, recipe, "sft", "TP2", only_on=1)


@pytest.mark.slow
@pytest.mark.parametrize("what, layout", [("sft", "DP2"), ("sft", "PP2"), ("dpo", "DP2"), ("bco", "TP2")])
def test_learning_from_data_resumes_bit_for_bit(ranks, recipe, what, layout):
    check_bits(ranks, recipe, what, layout)


@pytest.mark.slow
@pytest.mark.parametrize("what, layout", [("grpo", "DP2"), ("grpo", "TP2"), ("ppo", "DP2"), ("prime", "DP2")])
def test_learning_from_rollouts_resumes_bit_for_bit(ranks, recipe, what, layout):
    """vLLM's rollouts included: their seeds are of the step and the sample. PPO's critic and PRIME's model too."""
    check_bits(ranks, recipe, what, layout)


OFFLOAD = ["offload.params=true", "offload.grads=true", "offload.optimizer=true"]


@pytest.mark.slow
@pytest.mark.parametrize("what, layout", [("sft", "DP2"), ("grpo", "TP2")])
def test_what_waits_in_host_memory_is_saved_and_resumed(ranks, recipe, what, layout):
    """3 steps, a stop, 3 more, with nothing of the trainer on the device in between: the numbers of a plain run."""
    name, more = f"{what}-{layout}-offload", [*OFFLOAD, "optimizer.optimizer_cpu_offload=true"]
    _, straight = run(ranks, recipe, f"{name}-straight", what, layout)
    run(ranks, recipe, name, what, layout, stop_after=3, more=more)
    _, resumed = run(ranks, recipe, name, what, layout, more=more)
    assert resumed == straight


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [("TP2", "PP2"), ("DP2", "TP2"), ("PP2", "DP2")])
def test_another_layout_goes_on(ranks, recipe, before, after):
    name = f"sft-{before}-{after}"
    _, straight = run(ranks, recipe, f"{name}-straight", "sft", before)
    run(ranks, recipe, name, "sft", before, stop_after=3)
    _, resumed = run(ranks, recipe, name, "sft", after)
    for ours, theirs in zip(resumed, straight, strict=True):
        for key in ("actor/loss", "actor/grad_norm", "actor/lr"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (ours["step"], key)


def events(recipe, name):
    path = recipe.parent / "runs" / name / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def poison(ranks, recipe, name, at, *more):
    overrides = [f"run.name={name}", "algorithm=sft", "run.max_num_steps=8", "checkpoint.save_period=2", *more]
    kwargs = {"recipe": str(recipe), "overrides": overrides, "at": at, "on_rank": 1}
    return ranks.run(resume_cases.poisoned, 2, **kwargs)


def test_a_step_that_is_no_number_on_one_rank_changes_nothing_on_any(ranks, recipe):
    """NaN in step 4 of one rank: an event that names its samples, no update, and the run goes on; both ranks alike."""
    (ran, error, weights), (_, _, others) = poison(ranks, recipe, "nan-once", [4])
    assert len(ran) == 8 and error is None and weights == others
    assert all(value == value for value in weights)
    (event,) = [e for e in events(recipe, "nan-once") if e["kind"] == "non-finite"]
    assert event["step"] == 4 and "rows.jsonl" in event["event"] and "refused on all ranks" in event["event"]
    records = read_metrics(recipe.parent / "runs" / "nan-once")
    assert records[3]["actor/loss"] != records[3]["actor/loss"] and records[4]["actor/loss"] > 0


@pytest.mark.slow
def test_bad_steps_in_a_row_roll_back_and_other_data_follows(ranks, recipe):
    """Steps 5, 6 and 7 are NaN: back to step 4's checkpoint; the steps after it draw what comes next, not the same."""
    more = ["guard.max_bad_steps=3", "guard.on_bad_steps=rollback"]
    (ran, error, weights), (_, _, others) = poison(ranks, recipe, "nan-rollback", [5, 6, 7], *more)
    assert error is None and weights == others
    assert len(ran) == 7 + 4  # 1 to 7, then 5 to 8 again
    kinds = [e["kind"] for e in events(recipe, "nan-rollback")]
    assert kinds.count("non-finite") == 3 and kinds.count("rollback") == 1
    records = read_metrics(recipe.parent / "runs" / "nan-rollback")
    assert [record["step"] for record in records] == list(range(1, 9))
    assert all(record["actor/loss"] > 0 for record in records)  # the second time round


@pytest.mark.slow
def test_bad_steps_in_a_row_end_the_run(ranks, recipe):
    (ran, error, _), _ = poison(ranks, recipe, "nan-abort", [3, 4], "guard.max_bad_steps=2")
    assert len(ran) == 4 and "the run ends after step 4" in error
