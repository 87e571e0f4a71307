"""Training runs under real torchrun that are killed, told to stop, or given numbers that are none: what is lost is at
most the steps since the last checkpoint, and what goes on is the same run."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import socket
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


# Ten seconds of steps: a rank that gets a SIGTERM first looks for a few seconds whether its peers are alive.
LONG = 250


def start(recipe, *overrides, before=None):
    command = [sys.executable, "-m", "megarl", "train", str(recipe), *overrides]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True, preexec_fn=before
    )


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


def written_at(recipe):
    path = recipe.parent / "faults" / "metrics.jsonl"
    return path.stat().st_mtime_ns if path.exists() else 0


def wait_for_step(recipe, step, job, since=0):
    """``since``: when metrics were last written to before this job, which begins by cutting off what it does again."""
    end = time.monotonic() + 120
    path = recipe.parent / "faults" / "metrics.jsonl"
    while time.monotonic() < end and job.poll() is None:
        if written_at(recipe) > since and path.read_text().count("\n") >= step:
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


def finish(recipe, *overrides, before=None):
    job = start(recipe, *overrides, before=before)
    out, _ = job.communicate(timeout=240)
    assert job.returncode == 0, out
    return out


def straight(recipe, *overrides):
    finish(recipe, *overrides, "run.name=straight", "checkpoint.save_period=0", "checkpoint.save_at_end=false")
    return [record["actor/loss"] for record in read_metrics(recipe.parent / "straight")]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("save", ["sync", "async"])
def test_kill_9_at_any_moment_loses_no_more_than_a_period(recipe, save):
    """Three kills at random moments, then to the end: the losses are those of a run that nobody touched."""
    steps = 150
    expected, chance = straight(recipe, f"run.max_num_steps={steps}"), random.Random(save)
    mode = [f"checkpoint.async_save={'true' if save == 'async' else 'false'}", f"run.max_num_steps={steps}"]
    for _ in range(3):
        before, since = disk.pointed(recipe.parent / "faults" / "checkpoints") or 0, written_at(recipe)
        job = start(recipe, *mode)
        pids = ranks_of(job)
        wait_for_step(recipe, min(before + 3, steps - 2), job, since)
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
    finish(recipe, *mode)
    assert losses(recipe) == expected
    assert disk.leftovers(recipe.parent / "faults" / "checkpoints") == []


@pytest.mark.slow
@pytest.mark.parametrize("where", ["TP all-reduce", "PP send", "save"])
def test_a_rank_that_is_killed_is_named_with_its_phase(recipe, where):
    """In a step of a divided model, or while a checkpoint is being written: the other rank says whom it lost, all are
    gone within seconds, and what had its name before is whole."""
    layout = {
        "TP all-reduce": "parallel.tensor_model_parallel_size=2",
        "PP send": "parallel.pipeline_model_parallel_size=2",
    }
    more = [layout[where]] if where in layout else ["checkpoint.save_period=1", "checkpoint.async_save=false"]
    root = recipe.parent / "faults" / "checkpoints"
    job = start(recipe, "run.max_num_steps=100000", "run.max_num_epochs=99999", *more)
    pids = ranks_of(job)
    wait_for_step(recipe, 5, job)
    while where == "save" and not list(root.glob("*.incomplete")):
        time.sleep(0.0005)
    os.kill(pids[1], signal.SIGKILL)
    killed = time.monotonic()
    out, _ = job.communicate(timeout=120)
    assert time.monotonic() - killed < 30 and gone(pids) and job.returncode == 1, out
    assert re.search(r"no longer running: rank 1 on \S+ \(phase '(step|train|save)'\)", out), out
    disk.verify(disk.finished(root)[0])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("save", ["sync", "async"])
def test_killed_at_every_write_point(recipe, tmp_path, save):
    """A real save, killed before each file is opened, in each write, before each fsync and rename: what has its
    name verifies, the run goes on from the newest of it, and is the run that nobody touched."""
    script = Path(__file__).with_name("kill_points.py")
    recipe.write_text(
        recipe.read_text().replace("save_period: 4", "save_period: 1").replace("per_node: 2", "per_node: 1")
    )
    command = [sys.executable, str(script), str(recipe), str(tmp_path / "points"), save]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1000, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = json.loads(done.stdout)
    print("\n".join(f"{o['at']}: {o['named']}" for o in outcomes))
    kinds = {outcome["at"].split()[0] for outcome in outcomes}
    assert kinds >= {"open", "write", "fsync", "os.rename", "os.mkdir"} and len(outcomes) > 30
    assert any("latest_checkpointed" in outcome["at"] for outcome in outcomes)
    for outcome in outcomes:
        assert outcome["named"] == outcome["whole"] and outcome["resumed"] == outcome["named"][0], outcome
        assert outcome["left"] == [] and outcome["losses"] == outcomes[0]["losses"], outcome
    assert {outcome["resumed"] for outcome in outcomes} == {1, 2}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_saves_and_stops_all(recipe, number):
    steps = f"run.max_num_steps={LONG}"
    expected = straight(recipe, steps)
    job = start(recipe, steps)
    pids = ranks_of(job)
    wait_for_step(recipe, 5, job)
    os.kill(pids[1], number)
    out, _ = job.communicate(timeout=120)
    assert job.returncode == 75 and "Exit code 75" in out and gone(pids), out
    stopped = len(losses(recipe))
    assert disk.verify(disk.finished(recipe.parent / "faults" / "checkpoints")[0]).step == stopped < LONG
    assert f"resumed from step {stopped}" in finish(recipe, steps)
    assert losses(recipe) == expected


@pytest.mark.slow
def test_a_signal_to_the_launcher_saves_and_a_second_ends_at_once(recipe):
    job = start(recipe, f"run.max_num_steps={LONG}")
    wait_for_step(recipe, 5, job)
    job.send_signal(signal.SIGUSR1)
    out, _ = job.communicate(timeout=120)
    assert job.returncode == 75 and "stopped after step" in out and "SIGUSR1" in out, out
    since = written_at(recipe)
    job = start(recipe, f"run.max_num_steps={LONG}")
    pids = ranks_of(job)
    wait_for_step(recipe, len(losses(recipe)) + 2, job, since)
    os.kill(pids[0], signal.SIGSTOP)  # a step that does not end
    os.kill(pids[1], signal.SIGUSR1)
    time.sleep(2)
    os.kill(pids[1], signal.SIGUSR1)
    out, _ = job.communicate(timeout=120)
    assert "told to stop a second time (SIGUSR1)" in out and job.returncode == 1 and gone(pids), out
    disk.verify(disk.finished(recipe.parent / "faults" / "checkpoints")[0])


@pytest.mark.slow
def test_the_clock_stops_a_run_in_time(recipe):
    """With 20 s in all, a run of thousands of steps saves and stops by itself."""
    job = start(
        recipe, "run.max_num_steps=100000", "run.max_num_epochs=99999", "checkpoint.checkpoint_must_save_by=0:00:00:30"
    )
    out, _ = job.communicate(timeout=200)
    assert job.returncode == 75 and "are left until checkpoint.checkpoint_must_save_by" in out, out
    step = disk.verify(disk.finished(recipe.parent / "faults" / "checkpoints")[0]).step
    assert f"stopped after step {step} of" in out


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ranks_that_cannot_meet_say_why_at_once(recipe):
    """A name that nothing resolves, and a port that another program has, where a launcher has set them."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        for address, said in (
            (
                {"MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "29500"},
                "no-such-host.invalid: .* cannot resolve",
            ),
            (
                {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
                f"MASTER_PORT={port}: another program of 127.0.0.1",
            ),
        ):
            environment = os.environ | {"PYTHONPATH": str(ROOT), "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
            command = [sys.executable, "-m", "megarl.train", str(recipe), "cluster.gpus_per_node=1"]
            done = subprocess.run(command, env=environment | address, capture_output=True, text=True, timeout=280)
            assert done.returncode == 1 and re.search(f"rank 0: .*{said}", done.stderr), done.stderr
            assert "Traceback" not in done.stderr


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


class Limited:
    """Files of at most so many bytes, for the run and its ranks."""

    first = "export"  # what fails first: a thread writes the checkpoint meanwhile

    def __init__(self, run):
        self.overrides = ["checkpoint.save_contents=[model,optimizer,hf]"]

    def before_start(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    def undo(self):
        """It was the process's own."""


class SmallDisk:
    """A file system of its own for the run's folder, with 100 kB left."""

    first = "checkpoint"

    def __init__(self, run):
        self.run, kept = run, run.with_name("kept")
        run.rename(kept)
        run.mkdir()
        shell("mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", run)
        shell("cp", "-a", f"{kept}/.", run)
        used = os.statvfs(run)
        bytes_used = (used.f_blocks - used.f_bfree) * used.f_frsize
        shell("mount", "-o", f"remount,size={bytes_used + 100_000}", run)
        self.overrides = []

    def before_start(self):
        """Nothing for the process itself."""

    def undo(self):
        shell("umount", "-l", self.run)


class ReadOnly(SmallDisk):
    """A checkpoints folder that nothing can be written to."""

    def __init__(self, run):
        self.run = run / "checkpoints"
        shell("mount", "--bind", self.run, self.run)
        shell("mount", "-o", "remount,ro,bind", self.run)
        self.overrides = []


def shell(*command):
    subprocess.run(list(map(str, command)), check=True)


def can_mount():
    return os.geteuid() == 0 and subprocess.run(["unshare", "--mount", "true"], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("fault", [Limited, SmallDisk, ReadOnly])
def test_a_disk_that_takes_nothing_costs_saves_and_no_steps(recipe, fault):
    """After a whole checkpoint of step 4 no other can be written: the run goes on, says so with the path and the free
    bytes, and leaves nothing half-made; with on_save_error=stop it ends at the first."""
    if fault is not Limited and not can_mount():
        pytest.skip("mounting a file system needs root")
    finish(recipe, "run.max_num_steps=4")
    run = recipe.parent / "faults"
    before = json.loads((run / "checkpoints" / "iter_0000004" / disk.MANIFEST).read_text())
    limit = fault(run)
    # Not 12: a run whose last step's save fails has nothing to make up for it, and ends with an error.
    more = ["run.max_num_steps=13", "checkpoint.save_at_end=false", *limit.overrides]
    try:
        out = "".join(finish(recipe, *more, before=limit.before_start).split())  # the console breaks lines
        assert [record["step"] for record in read_metrics(run)] == list(range(1, 14))
        assert "thecheckpointofstep8wasnotwritten" in out and "thecheckpointofstep12wasnotwritten" in out
        assert ("theexportofstep8wasnotwritten" in out) == (fault is Limited)
        said = [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()]
        assert len(said) == (4 if fault is Limited else 2)
        for event in said:
            place = run / ("hf" if event.startswith("the export") else "checkpoints")
            assert f"bytes are free in {run}" in event and str(place) in event
        folder = run / "checkpoints"
        assert [path.name for path in disk.finished(folder)] == ["iter_0000004"] and disk.leftovers(folder) == []
        assert disk.verify(folder / "iter_0000004").step == 4 == disk.pointed(folder)
        assert json.loads((folder / "iter_0000004" / disk.MANIFEST).read_text()) == before
        job = start(recipe, *more, "checkpoint.on_save_error=stop", before=limit.before_start)
        out, _ = job.communicate(timeout=240)
        assert job.returncode == 1 and f"CheckpointError: the {limit.first} of step 8 was not written" in out
    finally:
        limit.undo()


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
