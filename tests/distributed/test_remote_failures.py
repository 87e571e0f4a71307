"""What becomes of runs and requests when weights change under them, servers die, and rewards fail."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megarl.observe.metrics import read_metrics
from megarl.rollout.auth import token_of
from megarl.rollout.serve import discover
from tests.distributed import remote_cases, tiny_models, train_cases
from tests.distributed.servers import served
from tests.distributed.test_remote_ranks import REMOTE, SAMPLED, recipe, scored, started

__all__ = ["recipe"]  # the fixture
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5], [3], [77, 78]]
LENGTH = 150


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_requests_that_a_push_meets(ranks, tmp_path: Path) -> None:
    """Every token's log-prob against transformers', with the weights that the server says it is of: 0.01 at most, but
    for those that go on with a cache of the old weights."""
    folders = [tiny_models.qwen2(tmp_path / name, seed=seed) for seed, name in enumerate(["old", "new"])]
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders]
    (tmp_path / "data.jsonl").touch()
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"cluster: {{device: cpu}}\nrun: {{name: served, root: {tmp_path}}}\n"
        f"model: {{path: {folders[0]}, dtype: fp32}}\n"
        f"data: {{path: {tmp_path}/data.jsonl, max_prompt_length: 16}}\n"
        "rollout: {mode: remote, max_response_length: 160, max_num_seqs: 8, kv_cache_gb: 0.05}\n"
    )
    with served(path) as (server,):
        token = token_of(tmp_path / "served" / "engines")
        (found,) = ranks.run(
            remote_cases.in_flight,
            1,
            recipe=str(path),
            overrides=[],
            url=server["url"],
            token=token,
            folders=[str(folder) for folder in folders],
            prompts=PROMPTS,
            length=LENGTH,
        )

    def errors(completions, version) -> torch.Tensor:
        out = []
        for prompt, completion in zip(PROMPTS, completions, strict=True):
            of = torch.tensor(completion.versions) == version
            expected = tiny_models.reference_logps(models[version], prompt, completion.tokens)
            out.append((expected - torch.tensor(completion.logps)).abs()[of])
        return torch.cat(out)

    for mode, (met, after) in found.items():
        mixed = sum(len(set(completion.versions)) > 1 for completion in met)
        assert errors(met, 0).max() < 0.01, mode
        assert all(set(completion.versions) == {1} for completion in after) and errors(after, 1).max() < 0.01, mode
        if mode == "wait":
            assert mixed == 0
            continue
        assert mixed > 0 and all(list(c.versions) == sorted(c.versions) for c in met)
        assert errors(met, 1).max() < 0.01 if mode == "recompute" else errors(met, 1).mean() > 0.01


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_outlives_servers_that_are_killed_while_they_generate(ranks, recipe) -> None:
    """Two servers, each killed once: what is lost is sampled again, those started anew join, and every step has all of
    its groups, once."""
    steps, name = 40, "killed"
    overrides = [*SAMPLED, "rollout.max_staleness=1", f"run.max_num_steps={steps}", "data.shuffle=false"]
    folder, settings = started(recipe, name, None, 2, [*REMOTE, *overrides])
    metrics = folder / "metrics.jsonl"
    with served(recipe, *settings, count=2) as servers:
        killer = threading.Thread(target=_kill_one_after_another, args=(servers, folder, metrics), daemon=True)
        killer.start()
        assert ranks.run(train_cases.train, 2, recipe=str(recipe), overrides=settings) == ["done"] * 2
        killer.join(60)
    records = read_metrics(folder)
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    assert {record["engines/number"] for record in records} >= {1.0, 2.0}
    assert all(record["staleness/max"] <= 1 for record in records)
    assert not (folder / "events.jsonl").exists() or "reward" not in (folder / "events.jsonl").read_text()
    times = {}
    for prompt, _ in scored(folder):
        times[prompt] = times.get(prompt, 0) + 1
    assert all(count % 4 == 0 for count in times.values())  # whole groups
    assert sum(times.values()) <= (steps + 2) * 8 * 4


def _kill_one_after_another(servers: list[dict], folder: Path, metrics: Path) -> None:
    first, second = servers
    _wait(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3)
    os.killpg(first["pid"], signal.SIGKILL)
    _wait(lambda: len(set(discover(folder / "engines")) - {first["url"], second["url"]}) == 1)  # one has come anew
    os.killpg(second["pid"], signal.SIGKILL)


def _wait(what, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rewards_that_raise_or_hang(ranks, recipe) -> None:
    """Scored twice, and then: the run ends with the prompt's id, or the group is dropped and said to be."""
    with served(recipe, *SAMPLED, *REMOTE[:2], "run.name=for-rewards"):
        engines = recipe.parent / "runs" / "for-rewards" / "engines"
        broken = "reward.functions=[{name: 'tests.fixtures.digits:raises_on_seven'}]"
        folder, settings = started(recipe, "raises", engines, 2, [*SAMPLED, broken, "reward.on_error=abort"])
        with pytest.raises(AssertionError, match=r"prompt train\.jsonl:\d+: RewardError: 4 of 4 samples .*, twice"):
            ranks.run(train_cases.train, 2, recipe=str(recipe), overrides=settings)
        folder, settings = started(recipe, "drops", engines, 2, [*SAMPLED, broken, "run.max_num_steps=2"])
        assert ranks.run(train_cases.train, 2, recipe=str(recipe), overrides=settings) == ["done"] * 2
        events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        assert events and all("train.jsonl:" in json.dumps(event) for event in events)
        assert read_metrics(folder)[-1]["reward/errors"] > 0
