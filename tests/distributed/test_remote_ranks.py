"""Whole runs with engines that are servers: the same as with engines in the process, and never staler than allowed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megarl.observe.metrics import read_metrics
from tests.distributed import resume_cases, train_cases
from tests.distributed.servers import served

pytestmark = pytest.mark.timeout(900)  # a server alone may take minutes to start where others compute
RECIPE = """
cluster: {{device: cpu}}
run: {{root: {root}, max_num_steps: 6, max_num_epochs: 100}}
model: {{path: {model}, dtype: fp32}}
optimizer: {{lr: 3.0e-3}}
train: {{train_global_batch_size: 8, train_mb_tokens: 60, logprob_mb_tokens: 60}}
data: {{path: {data}, apply_chat_template: false, max_prompt_length: 8}}
rollout: {{num_prompts_per_step: 8, num_generations_per_prompt: 1, max_response_length: 6, kv_cache_gb: 0.02}}
reward: {{workers: 1}}
checkpoint: {{save_at_end: false}}
"""
# Of a single token nothing is random, so that both kinds of engines sample the same.
GREEDY = ["rollout.top_k=1", "advantage.adv_estimator=reinforce", "advantage.baseline=batch"]
PPO = ["algorithm=ppo", "rollout.top_k=1"]
SAMPLED = [
    "rollout.num_generations_per_prompt=4",
    "train.train_global_batch_size=32",
    "loss.truncated_importance_sampling_type=tis",
]
REMOTE = ["rollout.mode=remote", "rollout.max_num_seqs=16", "rollout.num_engines=0"]


@pytest.fixture(scope="module")
def recipe(tiny_chat_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("remote")
    model = differing(tiny_chat_model, folder / "model")
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(8) for b in range(8)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(root=folder / "runs", model=model, data=folder / "train.jsonl"))
    return path


def differing(tiny: Path, path: Path) -> Path:
    """A model whose likeliest answers differ from prompt to prompt. Of one with tied embeddings and small weights every
    answer is the prompt's last character, again and again."""
    shutil.copytree(tiny, path)
    config = AutoConfig.from_pretrained(tiny, tie_word_embeddings=False, initializer_range=0.1)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def engines(recipe):
    """A server that all runs of this module share: each finds it in its own folder."""
    with served(recipe, *GREEDY, *REMOTE[:2], "run.name=engines"):
        yield recipe.parent / "runs" / "engines" / "engines"


def started(recipe: Path, name: str, engines: Path | None, world: int, overrides: list[str]) -> tuple[Path, list[str]]:
    """The run's folder, and its settings."""
    folder = recipe.parent / "runs" / name
    folder.mkdir(parents=True)
    if engines is not None:
        (folder / "engines").symlink_to(engines)
    reward = f"[{{name: 'tests.fixtures.recorded:even', args: {{path: {folder}/scored.jsonl}}}}]"
    settings = [f"run.name={name}", f"cluster.gpus_per_node={world}", f"reward.functions={reward}"]
    return folder, [*settings, *(REMOTE if engines else []), *overrides]


def run(ranks, recipe, name, engines, world, overrides):
    """The metrics of every step, and what was scored."""
    folder, settings = started(recipe, name, engines, world, overrides)
    assert ranks.run(train_cases.train, world, recipe=str(recipe), overrides=settings) == ["done"] * world
    return read_metrics(folder), scored(folder)


def scored(folder: Path) -> list[list]:
    return [json.loads(line) for line in (folder / "scored.jsonl").read_text().splitlines()]


def likeliest(model: Path, prompts: list[str]) -> dict[str, list[int]]:
    """What the model, as transformers computes it, answers with its likeliest tokens."""
    tokenizer, policy = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    out = {}
    for prompt in prompts:
        tokens = torch.tensor([tokenizer.encode(prompt)])
        out[prompt] = policy.generate(tokens, do_sample=False, max_new_tokens=6)[0, tokens.shape[1] :].tolist()
    return out


def check_same(found, expected):
    """Every prompt's tokens, and every step's numbers. Servers may begin a step that the run does not come to."""
    assert sorted(found[1][: len(expected[1])]) == sorted(expected[1])
    names = [name for name in expected[0][0] if name.startswith(("actor/", "critic/", "reward/", "response_length/"))]
    assert len(names) > 10
    for here, there in zip(found[0], expected[0], strict=True):
        # Whitened advantages have a mean of nothing but rounding: 1e-6 of the others' size is nothing too.
        wanted = pytest.approx({name: there[name] for name in names}, rel=1e-4, abs=1e-6)
        assert {name: here[name] for name in names} == wanted


@pytest.mark.slow
def test_without_staleness_remote_is_colocated_token_for_token(ranks, recipe, engines):
    expected = run(ranks, recipe, "colocated", None, 1, GREEDY)
    found = run(ranks, recipe, "remote", engines, 2, GREEDY)
    check_same(found, expected)
    start = likeliest(recipe.parent / "model", [prompt for prompt, _ in found[1]])
    assert len({tuple(ids) for ids in start.values()}) > 16
    assert sum(start[prompt] != ids for prompt, ids in found[1]) > 8  # the policy moved, and its responses with it
    assert all(step["staleness/max"] == 0 and step["frac_mixed_version"] == 0 for step in found[0])
    assert all(step["engines/number"] == 1 for step in found[0])


@pytest.mark.slow
def test_ppo_too(ranks, recipe, engines):
    check_same(run(ranks, recipe, "ppo-remote", engines, 2, PPO), run(ranks, recipe, "ppo-colocated", None, 1, PPO))


@pytest.mark.slow
def test_several_turns_too(ranks, recipe, engines):
    """Of a response of eight tokens the policy writes six, three in each turn, or fewer where one ends before."""
    talks = [*GREEDY, "rollout.environment=tests.fixtures.talks:in_two_turns", "rollout.max_response_length=10"]
    found = run(ranks, recipe, "turns-remote", engines, 2, talks)
    check_same(found, run(ranks, recipe, "turns-colocated", None, 1, talks))
    assert all(step["num_turns/mean"] == 2 for step in found[0])
    assert max(len(ids) for _, ids in found[1]) == 6  # rewards see what the policy wrote


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [1, 2])
def test_no_token_is_staler_than_allowed_and_data_stays_in_order(ranks, recipe, engines, staleness):
    """What is over the bound ends the run (`RemoteSampler._aged`), and metrics say what there was."""
    overrides = [*SAMPLED, f"rollout.max_staleness={staleness}", "data.shuffle=false", "run.max_num_steps=8"]
    metrics, samples = run(ranks, recipe, f"stale-{staleness}", engines, 2, overrides)
    worst = [step["staleness/max"] for step in metrics]
    assert len(worst) == 8 and worst[0] == 0 and max(worst) == staleness
    assert all(step["gen_kl_error"] < 1e-9 for step in metrics if "gen_kl_error" in step)
    assert "gen_kl_error" in metrics[0]
    prompts = {f"{a}+{b}=" for a in range(8) for b in range(8)}
    trained = 8 * 8 * 4  # steps, prompts, samples; what was in work at the end was scored too, or not
    assert {prompt for prompt, _ in samples[:trained]} == prompts


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(ranks, recipe, engines):
    folder, settings = started(recipe, "resumed", engines, 2, [*GREEDY, "checkpoint.save_period=1"])
    train = {"recipe": str(recipe), "overrides": settings}
    assert all("stopped after step 3" in why for why in ranks.run(resume_cases.train, 2, **train, stop_after=3))
    assert ranks.run(resume_cases.train, 2, **train) == [None, None]
    found, expected = read_metrics(folder), run(ranks, recipe, "straight", engines, 2, GREEDY)[0]
    names = [name for name in expected[0] if name.startswith(("actor/", "reward/", "response_length/"))]
    for here, there in zip(found, expected, strict=True):
        assert {name: here[name] for name in names} == pytest.approx({name: there[name] for name in names}, rel=1e-5)
