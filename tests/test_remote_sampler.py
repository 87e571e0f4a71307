"""Whole runs of one rank with stand-ins for servers: staleness, order, servers that die, where a stopped run goes on.

What stand-ins write means nothing; real servers are in tests/distributed/test_remote_ranks.py.
"""

from __future__ import annotations

import json
import math
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from megarl.observe.metrics import read_metrics
from megarl.rollout import client, remote
from megarl.rollout.auth import token_of
from megarl.rollout.vllm_engine import RolloutError
from tests.distributed import resume_cases
from tests.standin import StandIn

PROMPTS, SAMPLES = 8, 4
RECIPE = """
cluster: {{device: cpu}}
run: {{root: {root}, name: run, max_num_steps: 6, max_num_epochs: 100}}
model: {{path: {model}, dtype: fp32}}
train: {{train_global_batch_size: 32, train_mb_tokens: 400, logprob_mb_tokens: 400}}
data: {{path: {root}/train.jsonl, apply_chat_template: false, max_prompt_length: 8, shuffle: false}}
rollout: {{mode: remote, num_engines: 0, num_prompts_per_step: 8, num_generations_per_prompt: 4}}
loss: {{truncated_importance_sampling_type: tis}}
reward: {{workers: 1, save_scores: true, functions: [{{name: "tests.fixtures.digits:even"}}]}}
checkpoint: {{save_at_end: false}}
"""


@pytest.fixture
def run(tiny_chat_model, tmp_path, monkeypatch):
    """Starts or resumes the recipe's run with these servers. Returns why it stopped, if it did."""
    for module, name in ((client, "_PROBE_S"), (remote, "_LOOK_AGAIN_S")):
        monkeypatch.setattr(module, name, 0.05)
    monkeypatch.setattr(client, "_STARVED_S", 0.2)
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(8) for b in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(root=tmp_path, model=tiny_chat_model))

    def start(*overrides: str, stop_after: int | None = None) -> str | None:
        try:
            return resume_cases.train(str(recipe), ["rollout.max_response_length=8", *overrides], stop_after)
        finally:
            from megatron.core import parallel_state

            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()

    return start


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "run"


def join(folder: Path) -> StandIn:
    """A server that the run finds."""
    engines = folder / "engines"
    server = StandIn(token=token_of(engines))
    (engines / f"{server.url.rpartition(':')[2]}.json").write_text(json.dumps({"url": server.url}))
    return server


def check_trained(folder: Path, steps: int) -> None:
    """Every step had its own prompts, in the order of the data, with all of their samples."""
    trained: dict[int, list[str]] = {}
    for line in (folder / "rewards.jsonl").read_text().splitlines():
        row = json.loads(line)
        trained.setdefault(row["step"], []).append(row["id"])
    assert sorted(trained) == list(range(1, steps + 1))
    for step, ids in trained.items():
        first = (step - 1) * PROMPTS
        assert ids == [f"train.jsonl:{(first + k) % 64 + 1}" for k in range(PROMPTS) for _ in range(SAMPLES)], step


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_run_is_never_staler_than_allowed_and_keeps_the_order_of_the_data(run, folder, staleness):
    server = join(folder)
    run(f"rollout.max_staleness={staleness}")
    records = read_metrics(folder)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    worst = [record["staleness/max"] for record in records]
    assert worst[0] == 0 and max(worst) == staleness
    assert server.version == "6" and server.calls.count("update_weights") == 7  # before the first step, and after each
    check_trained(folder, 6)


@pytest.mark.parametrize(
    "settings",
    [
        ["algorithm=remax"],
        ["rollout.dynamic_sampling=true", "rollout.dynamic_sampling_max_gen_batches=20"],
        ["loss.use_rollout_logps=true", "loss.truncated_importance_sampling_type=none", "rollout.on_update=keep_kv"],
        ["algorithm=ppo", "rollout.on_update=wait"],
    ],
    ids=lambda settings: settings[0],
)
def test_other_methods_take_what_servers_sampled(run, folder, settings):
    server = join(folder)
    run("rollout.max_staleness=2", *settings)
    records = read_metrics(folder)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6] and server.version == "6"
    assert all(math.isfinite(record["actor/grad_norm"]) for record in records)
    assert 0 < max(record["staleness/max"] for record in records) <= 2
    if "rollout.dynamic_sampling=true" in settings:
        assert all(record["frac_reward_zero_std"] == 0 for record in records)
    else:
        check_trained(folder, 6)


def test_a_server_that_dies_costs_its_requests_alone(run, folder):
    servers = [join(folder), join(folder)]
    killer = threading.Thread(target=_after, args=(folder / "metrics.jsonl", 2, servers[0].die), daemon=True)
    killer.start()
    run("rollout.max_staleness=1", "run.max_num_steps=12")
    killer.join()
    records = read_metrics(folder)
    assert records[0]["engines/number"] == 2 and records[-1]["engines/number"] == 1
    check_trained(folder, 12)


def test_when_the_last_server_dies_the_next_one_gets_the_weights_at_once(run, folder):
    """It joins in the middle of a step, with nothing but the weights it was started with."""
    server, late = join(folder), []

    def replace() -> None:
        server.die()
        late.append(join(folder))

    killer = threading.Thread(target=_after, args=(folder / "metrics.jsonl", 2, replace), daemon=True)
    killer.start()
    run("run.max_num_steps=16")
    killer.join()
    assert late[0].version == "16" and late[0].calls.count("generate") > 0
    check_trained(folder, 16)


def test_without_any_server_for_too_long_the_run_ends_and_says_so(run, folder):
    killer = threading.Thread(target=_after, args=(folder / "metrics.jsonl", 2, join(folder).die), daemon=True)
    killer.start()
    with pytest.raises(
        RolloutError, match=r"0 of 1 servers \(rollout\.min_engines\) answer after 1 s \(rollout\.engine"
    ):
        run("run.max_num_steps=40", "rollout.engine_timeout_s=1")
    killer.join()
    assert 2 <= len(read_metrics(folder)) < 40


def _after(metrics: Path, lines: int, do) -> None:
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") >= lines) and time.monotonic() < deadline:
        time.sleep(0.002)
    do()


def test_a_stopped_run_goes_on_with_the_prompt_after_the_last_that_it_trained_on(run, folder):
    """Two steps' groups were in work at the stop: they are sampled again."""
    join(folder)
    assert "stopped after step 3" in run("rollout.max_staleness=2", "checkpoint.save_period=1", stop_after=3)
    assert run("rollout.max_staleness=2", "checkpoint.save_period=1") is None
    check_trained(folder, 6)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("KeyError", "KeyError: 'no such tool'"),
        ("SystemExit", "RuntimeError: SystemExit: no such tool"),
        ("CancelledError", "RuntimeError: CancelledError, though nothing has cancelled it"),
    ],
)
def test_a_conversation_that_raises_costs_its_group_alone(run, folder, fault, said):
    """As in the trainer's own process; unless the recipe says that it ends the run."""
    join(folder)
    environment = "rollout.environment=tests.fixtures.talks:raises_on_the_second"
    settings = [environment, f"rollout.environment_args.fault={fault}"]
    run(*settings, "run.max_num_steps=2")
    trained = [json.loads(line) for line in (folder / "rewards.jsonl").read_text().splitlines()]
    first = sorted({row["id"] for row in trained if row["step"] == 1})
    assert first == [f"train.jsonl:{k}" for k in (1, 3, 4, 5, 6, 7, 8)]
    events = (folder / "events.jsonl").read_text()
    assert f"prompt train.jsonl:2, sample 0: its conversation raised {said}" in events
    join(folder.with_name("again"))
    with pytest.raises(RolloutError, match=rf"prompt train\.jsonl:2, sample 0: its conversation raised {said}"):
        run(*settings, "reward.on_error=abort", "run.name=again")


def test_a_reward_that_raises_ends_the_run_with_the_prompts_id(run, folder):
    join(folder)
    reward = "reward.functions=[{name: 'tests.fixtures.digits:raises_on_seven'}]"
    with pytest.raises(
        RolloutError, match=r"prompt train\.jsonl:8: RewardError: 4 of 4 samples could not be scored, twice"
    ):
        run(reward, "reward.on_error=abort")


def test_a_reward_that_hangs_ends_the_run_with_the_prompts_id(run, folder):
    join(folder)
    reward = "reward.functions=[{name: 'tests.fixtures.digits:hangs_on_seven'}]"
    with pytest.raises(RolloutError, match=r"prompt train\.jsonl:8: RewardError: 4 of 4 .*timed out after 0\.2 s"):
        run(reward, "reward.on_error=abort", "reward.timeout_s=0.2")
