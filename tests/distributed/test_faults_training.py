"""Training runs under real torchrun that are killed, told to stop, or given numbers that are none: what is lost is at
most the steps since the last checkpoint, and what goes on is the same run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megarl.checkpoint import folder as disk
from megarl.observe.metrics import read_metrics

ROOT = Path(__file__).parents[2]
RECIPE = """
algorithm: sft
cluster: {{gpus_per_node: 2, device: cpu}}
run: {{root: {root}, name: faults, max_num_steps: 40, max_num_epochs: 99, deadline_s: 30}}
model: {{path: {model}, dtype: fp32}}
optimizer: {{lr: 1.0e-3}}
train: {{train_global_batch_size: 8, train_mb_tokens: 200, logprob_mb_tokens: 300}}
data: {{path: {data}, apply_chat_template: false, max_prompt_length: 8}}
checkpoint: {{save_period: 4, save_contents: [model, optimizer]}}
"""


@pytest.fixture
def recipe(tiny_chat_model, tmp_path):
    rows = [{"prompt": f"{a}+{b}=", "response": str(a + b)} for a in range(5) for b in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(root=tmp_path, model=tiny_chat_model, data=tmp_path / "rows.jsonl"))
    return path


def start(recipe, *overrides):
    command = [sys.executable, "-m", "megarl", "train", str(recipe), *overrides]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def ranks_of(job):
    """Process ids of the ranks, once they have started."""
    end = time.monotonic() + 90
    while time.monotonic() < end:
        try:
            children = psutil.Process(job.pid).children()
        except psutil.NoSuchProcess:
            break
        if len(children) == 2:
            return [child.pid for child in children]
        time.sleep(0.05)
    raise AssertionError(f"no ranks: {job.communicate()[0]}")


def wait_for_step(recipe, step, job):
    end = time.monotonic() + 120
    path = recipe.parent / "faults" / "metrics.jsonl"
    while time.monotonic() < end and job.poll() is None:
        if path.exists() and path.read_text().count("\n") >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached: {job.communicate()[0]}")


def losses(recipe):
    return [record["actor/loss"] for record in read_metrics(recipe.parent / "faults")]


def gone(pids):
    end = time.monotonic() + 5
    while time.monotonic() < end and any(psutil.pid_exists(pid) for pid in pids):
        time.sleep(0.05)
    return not any(psutil.pid_exists(pid) for pid in pids)


def finish(recipe, *overrides):
    job = start(recipe, *overrides)
    out, _ = job.communicate(timeout=240)
    assert job.returncode == 0, out
    return out


def straight(recipe):
    finish(recipe, "run.name=straight", "checkpoint.save_period=0", "checkpoint.save_at_end=false")
    return [record["actor/loss"] for record in read_metrics(recipe.parent / "straight")]


@pytest.mark.slow
@pytest.mark.parametrize("save", ["sync", "async"])
def test_kill_9_at_any_moment_loses_no_more_than_a_period(recipe, save):
    """Five kills at random moments, then to the end: the losses are those of a run that nobody touched."""
    expected, chance = straight(recipe), random.Random(save)
    mode = f"checkpoint.async_save={'true' if save == 'async' else 'false'}"
    for _ in range(5):
        job = start(recipe, mode)
        pids = ranks_of(job)
        before = disk.pointed(recipe.parent / "faults" / "checkpoints") or 0
        wait_for_step(recipe, min(before + 3, 38), job)
        time.sleep(chance.random())
        done = len(losses(recipe))
        os.kill(chance.choice(pids), signal.SIGKILL)
        job.communicate(timeout=120)
        assert gone(pids)
        whole = disk.finished(recipe.parent / "faults" / "checkpoints")
        newest = disk.verify(whole[0]).step if whole else 0
        assert done - newest <= 8  # a period, and another while its checkpoint is being written
        if job.returncode == 0:
            break
    finish(recipe, mode)
    assert losses(recipe) == expected
    assert disk.leftovers(recipe.parent / "faults" / "checkpoints") == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_saves_and_stops_all(recipe, number):
    expected = straight(recipe)
    job = start(recipe)
    pids = ranks_of(job)
    wait_for_step(recipe, 5, job)
    os.kill(pids[1], number)
    out, _ = job.communicate(timeout=120)
    assert job.returncode != 0 and "Exit code 75" in out and gone(pids), out
    stopped = len(losses(recipe))
    assert disk.verify(disk.finished(recipe.parent / "faults" / "checkpoints")[0]).step == stopped < 40
    assert f"resumed from step {stopped}" in finish(recipe)
    assert losses(recipe) == expected


@pytest.mark.slow
def test_a_signal_to_the_launcher_saves_and_a_second_ends_at_once(recipe):
    job = start(recipe)
    wait_for_step(recipe, 5, job)
    job.send_signal(signal.SIGUSR1)
    out, _ = job.communicate(timeout=120)
    assert "stopped after step" in out and "SIGUSR1" in out, out
    job = start(recipe)
    pids = ranks_of(job)
    wait_for_step(recipe, len(losses(recipe)) + 2, job)
    os.kill(pids[0], signal.SIGSTOP)  # a step that does not end
    os.kill(pids[1], signal.SIGTERM)
    time.sleep(5)
    os.kill(pids[1], signal.SIGTERM)
    out, _ = job.communicate(timeout=120)
    assert gone(pids), out
    disk.verify(disk.finished(recipe.parent / "faults" / "checkpoints")[0])


@pytest.mark.slow
def test_the_clock_stops_a_run_in_time(recipe):
    """With 20 s in all, a run of thousands of steps saves and stops by itself."""
    job = start(
        recipe, "run.max_num_steps=100000", "run.max_num_epochs=99999", "checkpoint.checkpoint_must_save_by=0:00:00:30"
    )
    out, _ = job.communicate(timeout=200)
    assert "are left until checkpoint.checkpoint_must_save_by" in out, out
    step = disk.verify(disk.finished(recipe.parent / "faults" / "checkpoints")[0]).step
    assert f"stopped after step {step} of" in out


@pytest.mark.slow
def test_damage_is_skipped_and_said(recipe):
    """A flipped bit in the newest checkpoint: the one before is taken, and the file is named."""
    expected = straight(recipe)
    finish(recipe, "run.max_num_steps=12")
    newest, before = disk.finished(recipe.parent / "faults" / "checkpoints")
    victim = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 4
    victim.write_bytes(content)
    out = "".join(finish(recipe).split())  # the console breaks lines
    assert "skippedacheckpoint:" in out and f"{victim.name}:itscontentisnotwhatwaswritten" in out
    assert f"resumedfromstep{disk.step_of(before)}" in out
    assert losses(recipe) == expected


@pytest.mark.slow
def test_two_runs_never_write_one_folder(recipe):
    job = start(recipe, "run.max_num_steps=100000", "run.max_num_epochs=99999")
    wait_for_step(recipe, 2, job)
    second = start(recipe)
    out, _ = second.communicate(timeout=120)
    assert second.returncode != 0 and "is being written by" in out
    job.kill()
    job.communicate(timeout=60)
    time.sleep(1)
    finish(recipe, "run.max_num_steps=8")
