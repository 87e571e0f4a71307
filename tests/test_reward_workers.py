"""Reward workers: results in order, and every way in which a reward can go wrong is an event with a name."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megarl.config import RewardConfig, RewardFunction
from megarl.rewards import RewardError
from megarl.rewards.runner import RewardInput, RewardWorkers

FIXTURES = str(Path(__file__).parent / "fixtures")
pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def fixtures_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FIXTURES)


@pytest.fixture(scope="module")
def when_told() -> Iterator[RewardWorkers]:
    """One pair of workers for the many cases of `when_told`."""
    sys.path.insert(0, FIXTURES)
    workers = RewardWorkers(config("misbehaving:when_told", timeout_s=1.0))
    yield workers
    workers.close()
    sys.path.remove(FIXTURES)


def config(*names: str, **fields: Any) -> RewardConfig:
    return RewardConfig(functions=[RewardFunction(name) for name in names], **fields)


def sample(index: int, **columns: Any) -> RewardInput:
    columns = {"completions": "abc", "prompts": "p", "answers": "3", "completion_ids": [1, 2]} | columns
    return RewardInput(f"train.jsonl:{index}", index % 8, columns)


def alive(pid: int) -> bool:
    """Whether the process still runs; a zombie that its new parent has not yet noticed does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, f"still alive: {[pid for pid in pids if alive(pid)]}"
        time.sleep(0.02)


def test_results_come_in_order_with_weighted_totals() -> None:
    functions = [RewardFunction("misbehaving:length", 2.0, {"scale": 0.5}), RewardFunction("exact", -1.0)]
    workers = RewardWorkers(RewardConfig(functions=functions, workers=3))
    samples = [sample(i, completions="x" * i + " 3" * (i % 2)) for i in range(200)]
    results = workers.score(samples)
    workers.close()
    assert [r.parts["misbehaving:length"] for r in results] == [(i + 2 * (i % 2)) / 2 for i in range(200)]
    assert [r.total for r in results] == [i + 2 * (i % 2) - (i % 2) for i in range(200)]
    assert {r.error for r in results} == {None}


@pytest.mark.parametrize(
    ("action", "error"),
    [
        ("raise", r"raised ZeroDivisionError: integer division or modulo by zero \(.*misbehaving.py:\d+\)$"),
        ("exit", r"raised SystemExit: 3 \(.*misbehaving.py:\d+\)$"),
        ("unknown", r"raised KeyError: 'unknown' \(.*misbehaving.py:\d+\)$"),
        ("os._exit", r"ended its worker process, which exited with code 3$"),
        ("segfault", r"ended its worker process, which was killed by SIGSEGV$"),
        ("hang", r"timed out after 1 s$"),
        ("spin", r"timed out after 1 s$"),
        ("nan", r"returned nan, expected a finite number$"),
        ("inf", r"returned -inf, expected a finite number$"),
        ("huge", r"returned an integer too large for a float, expected a finite number$"),
        ("none", r"returned None, expected a number$"),
        ("string", r"returned '1.0' of type str, expected a number$"),
        ("three", r"returned 3 values, expected 1 \(one for each completion\)$"),
        ("bare", r"returned 1.0 of type float, expected a list of 1 number$"),
    ],
)
def test_a_failure_costs_one_sample_and_names_it(when_told: RewardWorkers, action: str, error: str) -> None:
    actions = ["good"] * 20 + [action] + ["true"] * 20
    results = when_told.score([sample(i, answers=action) for i, action in enumerate(actions)])
    assert [r.total for r in results] == [0.5] * 20 + [None] + [1.0] * 20
    failed = results.pop(20)
    assert re.match(r"prompt train.jsonl:20, sample 4: reward 'misbehaving:when_told' " + error, failed.error), failed
    assert {r.error for r in results} == {None}


def test_the_failing_reward_is_named_and_those_before_it_are_kept() -> None:
    workers = RewardWorkers(config("misbehaving:length", "misbehaving:when_told", workers=1, timeout_s=0.5))
    raised, hung, good = workers.score([sample(i, answers=a) for i, a in enumerate(("raise", "hang", "good"))])
    workers.close()
    for failed in (raised, hung):
        assert failed.total is None and failed.parts == {"misbehaving:length": 3.0}
        assert "reward 'misbehaving:when_told'" in failed.error
    assert good.total == 3.5


def test_a_reward_with_a_batch_size_is_called_for_several_samples() -> None:
    """Ten samples in calls of 4, 4 and 2; the reward beside it still sees one at a time. 1 + 2 pending chunks of a
    worker are multiples of the batch, so that no call is smaller than it has to be."""
    workers = RewardWorkers(config("misbehaving:several", "misbehaving:length", workers=1))
    results = workers.score([sample(i, completions="x" * i) for i in range(10)])
    workers.close()
    calls = [4, 4, 4, 4, 4, 4, 4, 4, 2, 2]
    assert [r.parts for r in results] == [
        {"misbehaving:several": size, "misbehaving:length": i} for i, size in enumerate(calls)
    ]


@pytest.mark.parametrize(
    ("action", "lost", "error"),
    [
        ("fail", [1], r"failed: KeyError: 'this one'"),
        ("nan", [1], r"returned nan, expected a finite number"),
        ("raise", [0, 1, 2, 3], r"raised ValueError: the whole call"),
        ("hang", [0, 1, 2, 3], r"timed out after 0.5 s"),
    ],
)
def test_what_a_failure_in_a_call_of_several_costs(action: str, lost: list[int], error: str) -> None:
    functions = [RewardFunction("misbehaving:several"), RewardFunction("misbehaving:length")]
    workers = RewardWorkers(RewardConfig(functions=functions, workers=1, timeout_s=0.5))
    results = workers.score([sample(i, answers=action if i == 1 else "") for i in range(8)])
    workers.close()
    assert [i for i, r in enumerate(results) if r.error] == lost
    for i in lost:
        assert re.match(rf"prompt train.jsonl:{i}, sample {i}: reward 'misbehaving:several' {error}", results[i].error)
    assert {r.total for i, r in enumerate(results) if i not in lost} == {4 + 3.0}


def test_samples_get_the_rewards_of_their_domain() -> None:
    functions = [
        RewardFunction("misbehaving:length", 1.0, {}, ["text", "both"]),
        RewardFunction("exact", 10.0, {}, ["math", "both"]),
    ]
    workers = RewardWorkers(RewardConfig(functions=functions, workers=1, domain_key="kind"))
    kinds = [{"kind": "text"}, {"kind": "math"}, {"kind": "both"}, {"kind": "code"}, {}]
    results = workers.score([sample(i, completions="= 3", **kind) for i, kind in enumerate(kinds)])
    workers.close()
    assert [r.parts for r in results] == [
        {"misbehaving:length": 3.0},
        {"exact": 1.0},
        {"misbehaving:length": 3.0, "exact": 1.0},
        {},
        {},
    ]
    assert [r.total for r in results] == [3.0, 10.0, 13.0, None, None]
    assert "no reward is for the domain 'code', only for both, math, text" in results[3].error
    assert "train.jsonl:4" in results[4].error and "has no 'kind' (reward.domain_key)" in results[4].error


def test_abort_raises_the_first_error_with_the_count() -> None:
    workers = RewardWorkers(config("misbehaving:when_told", on_error="abort"))
    with pytest.raises(RewardError, match=r"2 of 4 samples could not be scored; the first: prompt train.jsonl:1,"):
        workers.score([sample(i, answers=a) for i, a in enumerate(("good", "nan", "good", "none"))])
    assert workers.score([sample(0, answers="good")])[0].total == 0.5
    workers.close()


def test_the_deadline_is_for_each_sample_and_not_for_its_chunk() -> None:
    workers = RewardWorkers(config("misbehaving:slow", workers=1, timeout_s=0.6))
    results = workers.score([sample(i, seconds=0.2) for i in range(8)] + [sample(8, seconds=5.0)])
    workers.close()
    assert [r.total for r in results] == [0.2] * 8 + [None]


def test_a_late_parent_does_not_punish_a_worker_that_was_in_time() -> None:
    workers = RewardWorkers(config("misbehaving:slow", workers=1, timeout_s=0.5))
    before = signal.signal(signal.SIGUSR1, lambda *_: time.sleep(1.0))  # the parent is away, past the deadline
    with subprocess.Popen(["sh", "-c", f"sleep 0.1; kill -USR1 {os.getpid()}"]):
        results = workers.score([sample(i, seconds=0.2) for i in range(4)])
    signal.signal(signal.SIGUSR1, before)
    workers.close()
    assert [r.error for r in results] == [None] * 4


def test_a_total_that_overflows_is_an_error() -> None:
    functions = [RewardFunction("misbehaving:large", 2.0)]
    workers = RewardWorkers(RewardConfig(functions=functions))
    (result,) = workers.score([sample(5)])
    workers.close()
    assert result.total is None and "train.jsonl:5" in result.error and "is inf" in result.error


def test_columns_survive_the_way_to_the_worker() -> None:
    workers = RewardWorkers(config("misbehaving:echo_size"))
    extras = ["\ud800 and \0", {"a": [1, None]}, "ä" * 300_000, Path("/a/b")]
    results = workers.score([sample(i, extra=extra) for i, extra in enumerate(extras)])
    workers.close()
    assert [r.total for r in results] == [len(str(extra)) for extra in extras]


def test_printing_and_reading_do_not_disturb_the_pipe(capfd: pytest.CaptureFixture[str]) -> None:
    workers = RewardWorkers(config("misbehaving:prints"))
    assert [r.total for r in workers.score([sample(i) for i in range(8)])] == [0.0] * 8
    workers.close()
    assert capfd.readouterr().out.count("x") == 800_000


def test_a_reward_sees_no_secrets_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what a program needs to run, and what the recipe names."""
    names = ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "http_proxy", "SLURM_JOB_ID"]
    for name in names:
        monkeypatch.setenv(name, "0123456789")
    monkeypatch.setenv("LC_TIME", "C")
    samples = [sample(i, answers=name) for i, name in enumerate([*names, "PATH", "LC_TIME"])]
    workers = RewardWorkers(config("misbehaving:spies"))
    assert [r.total for r in workers.score(samples)] == [-1.0] * 6 + [len(os.environ["PATH"]), 1.0]
    workers.close()
    workers = RewardWorkers(config("misbehaving:spies", pass_env=["HF_TOKEN"]))
    assert [r.total for r in workers.score(samples)][:3] == [-1.0, 10.0, -1.0]
    workers.close()


def test_a_reward_that_draws_lots_draws_the_same_for_the_same_sample() -> None:
    """In other workers, in another order, after other samples."""
    samples = [sample(i, completions="x" * i) for i in range(40)]
    scores = []
    for number, order in ((1, samples), (3, samples[::-1])):
        workers = RewardWorkers(config("misbehaving:draws_lots", workers=number))
        scores.append({s.prompt_id: r.total for s, r in zip(order, workers.score(order), strict=True)})
        workers.close()
    assert scores[0] == scores[1] and len(set(scores[0].values())) == 40


def test_a_worker_that_dies_idle_is_replaced_without_an_event() -> None:
    workers = RewardWorkers(config("misbehaving:length"))
    victim = workers.workers[0].process
    os.kill(victim.pid, signal.SIGKILL)
    os.waitid(os.P_PID, victim.pid, os.WEXITED | os.WNOWAIT)
    assert [r.total for r in workers.score([sample(i) for i in range(50)])] == [3.0] * 50
    workers.close()


def test_notices_to_the_whole_job_leave_workers_at_work() -> None:
    workers = RewardWorkers(config("misbehaving:length"))
    before = [worker.process.pid for worker in workers.workers]
    for pid in before:
        for notice in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(pid, notice)
    assert [r.total for r in workers.score([sample(i) for i in range(50)])] == [3.0] * 50
    assert [worker.process.pid for worker in workers.workers] == before
    workers.close()


def test_mistakes_are_found_at_construction() -> None:
    with pytest.raises(RewardError, match="did you mean 'math'"):
        RewardWorkers(config("maths"))
    with pytest.raises(RewardError, match=r"reward.functions is empty"):
        RewardWorkers(config())
    with pytest.raises(RewardError, match="names a reward twice"):
        RewardWorkers(config("exact", "exact"))
    with pytest.raises(RewardError, match=r"no option 'scal'.*did you mean 'scale'"):
        RewardWorkers(RewardConfig(functions=[RewardFunction("misbehaving:length", 1.0, {"scal": 2})]))
    with pytest.raises(RewardError, match=r"batch_size = 0 is not a number of samples"):
        RewardWorkers(RewardConfig(functions=[RewardFunction("misbehaving:several", 1.0, {"batch_size": 0})]))


def test_a_reward_that_imports_only_here_is_found_at_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    module = type(sys)("made_at_run_time")
    exec("def reward(completions, **columns): return [1.0]", module.__dict__)
    monkeypatch.setitem(sys.modules, "made_at_run_time", module)
    with pytest.raises(RewardError, match=r"in a reward worker.*No module named 'made_at_run_time'"):
        RewardWorkers(config("made_at_run_time:reward"))


def test_closed_workers_are_gone_and_say_so() -> None:
    workers = RewardWorkers(config("misbehaving:length"))
    pids = [worker.process.pid for worker in workers.workers]
    workers.close()
    assert not any(map(alive, pids))
    with pytest.raises(RewardError, match="closed"):
        workers.score([sample(0)])


def test_a_hung_reward_is_killed_with_the_processes_it_started(tmp_path: Path) -> None:
    workers = RewardWorkers(config("misbehaving:starts_a_process", workers=1, timeout_s=1.0))
    (result,) = workers.score([sample(0, pid_file=str(tmp_path / "pids"))])
    workers.close()
    assert "timed out" in result.error
    wait_until_gone([int(pid) for pid in (tmp_path / "pids").read_text().split()])


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_workers_die_with_their_parent_even_while_they_compute(tmp_path: Path) -> None:
    script = f"""
import sys
sys.path.insert(0, {FIXTURES!r})
from megarl.config import RewardConfig, RewardFunction
from megarl.rewards.runner import RewardInput, RewardWorkers
workers = RewardWorkers(RewardConfig(functions=[RewardFunction("misbehaving:when_told")]))
print(*(worker.process.pid for worker in workers.workers), flush=True)
workers.score([RewardInput("p", i, {{"completions": "", "answers": "spin"}}) for i in range(2)])
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(map(alive, pids))
    parent.kill()
    parent.wait()
    wait_until_gone(pids)


def test_five_thousand_trivial_samples_take_about_a_second() -> None:
    workers = RewardWorkers(config("misbehaving:length"))
    samples = [sample(i) for i in range(5000)]
    started = time.monotonic()
    results = workers.score(samples)
    seconds = time.monotonic() - started
    workers.close()
    assert [r.total for r in results] == [3.0] * 5000
    assert seconds < 5.0, f"{5000 / seconds:.0f} samples/s"  # generous: other jobs may share the machine
