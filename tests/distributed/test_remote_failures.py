"""What becomes of runs and requests when weights change under them, servers die, and rewards fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from megarl.observe.metrics import read_metrics
from megarl.parallel.ports import free_port
from megarl.rollout.auth import token_of
from megarl.rollout.serve import discover
from tests.distributed import remote_cases, resume_cases, tiny_models, train_cases
from tests.distributed.servers import served
from tests.distributed.test_remote_ranks import REMOTE, SAMPLED, recipe, started

__all__ = ["recipe"]  # the fixture
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5], [3], [77, 78], [40], [50, 60], [99, 98, 97, 96], [12, 12]]
LENGTH = 230
IN_ORDER = ["data.shuffle=false", "reward.save_scores=true"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_requests_that_a_push_meets(ranks, tmp_path: Path) -> None:
    """Every token's log-prob against transformers', with the weights that the server says it is of: 0.01 at most, but
    for those that go on with a cache of the old weights."""
    # Wide enough that a response takes about a second.
    folders = [tiny_models.qwen2(tmp_path / name, seed=seed, width=8) for seed, name in enumerate(["old", "new"])]
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders]
    (tmp_path / "data.jsonl").touch()
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"cluster: {{device: cpu}}\nrun: {{name: served, root: {tmp_path}}}\n"
        f"model: {{path: {folders[0]}, dtype: fp32}}\n"
        f"data: {{path: {tmp_path}/data.jsonl, max_prompt_length: 16}}\n"
        "rollout: {mode: remote, max_response_length: 236, max_num_seqs: 8, kv_cache_gb: 0.05}\n"
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
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "standing-still"])
def test_a_run_outlives_servers_that_end_while_they_generate(ranks, recipe, how: signal.Signals) -> None:
    """Two servers: of one the engine is killed, of the other every process; or they stand still, as a machine that
    hangs. What is lost is sampled again, those started anew join, and every step has all of its groups, once."""
    overrides = [*SAMPLED, "rollout.max_staleness=1", "run.max_num_steps=700", *IN_ORDER]
    folder, settings = started(recipe, how.name, None, 2, [*REMOTE, *overrides])
    enough = folder / "enough"
    with served(recipe, *settings, count=2) as servers:
        killer = threading.Thread(target=_end_one_after_another, args=(servers, folder, enough, how), daemon=True)
        killer.start()
        why = ranks.run(resume_cases.train_until, 2, recipe=str(recipe), overrides=settings, path=str(enough))
        killer.join(60)
    records = read_metrics(folder)
    steps = len(records)
    assert all(f"stopped after step {steps}" in words for words in why), why
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    assert {record["engines/number"] for record in records} >= {1.0, 2.0}
    assert all(record["staleness/max"] <= 1 for record in records)
    assert not (folder / "events.jsonl").exists() or "reward" not in (folder / "events.jsonl").read_text()
    check_trained(folder, range(1, steps + 1))


def check_trained(folder: Path, steps: Sequence[int]) -> None:
    """Every step trained on the next eight prompts of the data, with four samples each."""
    trained: dict[int, list[str]] = {step: [] for step in steps}
    for line in (folder / "rewards.jsonl").read_text().splitlines():
        row = json.loads(line)
        trained[row["step"]].append(row["id"])
    for step, ids in trained.items():
        expected = [f"train.jsonl:{(8 * (step - 1) + k) % 64 + 1}" for k in range(8) for _ in range(4)]
        assert sorted(ids) == sorted(expected), step


def _end_one_after_another(servers: list[dict], folder: Path, enough: Path, how: signal.Signals) -> None:
    """Each after some steps; and some steps later it is enough."""
    first, second = servers
    metrics = folder / "metrics.jsonl"

    def steps() -> int:
        return metrics.read_text().count("\n") if metrics.exists() else 0

    _wait(lambda: steps() >= 3)
    if how == signal.SIGKILL:  # its engine's process alone: callers get 500, and the server ends by itself
        os.kill(_engine_of(first["pid"]), how)
    else:
        os.killpg(first["pid"], how)
    _wait(lambda: len(set(discover(folder / "engines")) - {first["url"], second["url"]}) == 1)  # one has come anew
    os.killpg(second["pid"], how)
    done = steps()
    _wait(lambda: steps() >= done + 5)
    enough.touch()


def _engine_of(server: int) -> int:
    (engine,) = (child.pid for child in psutil.Process(server).children() if "EngineCore" in " ".join(child.cmdline()))
    return engine


def _wait(what, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_slow_server_holds_up_its_own_requests_alone(ranks, recipe) -> None:
    """Two servers, eight requests at a time, of which each server has four when one of them stands still for some
    seconds: all later ones are answered by the other, and nothing is lost."""
    settings = [*SAMPLED, *REMOTE[:2], "run.name=slow", "rollout.max_response_length=40"]
    with served(recipe, *settings, count=2) as servers:
        (found,) = ranks.run(
            remote_cases.one_stands_still,
            1,
            recipe=str(recipe),
            overrides=settings,
            urls=[server["url"] for server in servers],
            token=token_of(recipe.parent / "runs" / "slow" / "engines"),
            victim=servers[0]["pid"],
            requests=24,
            at_a_time=8,
            length=40,
        )
    assert found["meanwhile"] == 24 - 4
    assert len(found["tokens"]) == 24 and min(found["tokens"]) > 0 and found["lost"] == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_trainer_that_is_killed_in_the_middle_of_a_push_goes_on_with_the_same_servers(recipe) -> None:
    """The server has half of version 3 then, stays alive, and is paused; the run that is started again gives it the
    weights of its checkpoint, whole: verified bit by bit at both ends, and by the log-probs of every step. Step 3 is
    trained again: its checkpoint would have had its name after the push."""
    name = "dying"
    settings = [f"run.name={name}", "cluster.gpus_per_node=2", *REMOTE, *SAMPLED, "rollout.max_staleness=1"]
    settings += ["checkpoint.save_period=1", "checkpoint.async_save=false", "checkpoint.save_at_end=false"]
    settings += ["reward.functions=[{name: 'tests.fixtures.digits:even'}]"]
    settings += ["weight_sync.verify=true", *IN_ORDER]
    folder = recipe.parent / "runs" / name
    with served(recipe, *settings) as (server,):
        sender = Path(__file__).with_name("dying_sender.py")
        codes, words = _ranks([str(sender), "3", str(recipe), *settings])
        assert codes[0] == -signal.SIGKILL and codes[1] not in (0, -signal.SIGKILL), words
        assert len(read_metrics(folder)) == 2
        assert _asked(server["url"], "is_paused", folder) == {"is_paused": True}
        codes, words = _ranks(["-m", "megarl.train", str(recipe), *settings])
        assert codes == [0, 0], words
        assert discover(folder / "engines") == [server["url"]]
        assert _asked(server["url"], "weight_info", folder)["weight_version"] == "6"
    records = read_metrics(folder)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    kept = [record["step"] for record in records if "gen_kl_error" in record]
    assert 3 in kept and all(record["gen_kl_error"] < 1e-9 for record in records if record["step"] in kept)
    check_trained(folder, range(1, 7))


def _ranks(command: list[str]) -> tuple[list[int], str]:
    """Two ranks, each a process that nobody ends but itself: their exit codes, and what they said."""
    meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    settings = {"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environments = [os.environ | meet | settings | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [subprocess.Popen([sys.executable, *command], env=env, **pipes) for env in environments]
    words = [process.communicate(timeout=400)[0][-4000:] for process in started]
    return [process.returncode for process in started], "\n".join(words)


def _asked(url: str, path: str, folder: Path) -> dict:
    headers = {"Authorization": f"Bearer {token_of(folder / 'engines')}"}
    with urllib.request.urlopen(urllib.request.Request(f"{url}/{path}", headers=headers), timeout=30) as answer:
        return json.loads(answer.read())


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
        hanging = ["reward.functions=[{name: 'tests.fixtures.digits:hangs_on_seven'}]", "reward.timeout_s=0.5"]
        folder, settings = started(recipe, "hangs", engines, 2, [*SAMPLED, *hanging, "reward.on_error=abort"])
        with pytest.raises(AssertionError, match=r"prompt train\.jsonl:\d+: RewardError: .*timed out after 0\.5 s"):
            ranks.run(train_cases.train, 2, recipe=str(recipe), overrides=settings)
        folder, settings = started(recipe, "drops", engines, 2, [*SAMPLED, broken, "run.max_num_steps=2"])
        assert ranks.run(train_cases.train, 2, recipe=str(recipe), overrides=settings) == ["done"] * 2
        events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        assert events and all("train.jsonl:" in json.dumps(event) for event in events)
        assert read_metrics(folder)[-1]["reward/errors"] > 0
