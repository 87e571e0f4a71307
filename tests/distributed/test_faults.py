"""A rank that dies, freezes, hangs or raises takes the job down within the deadline, is named with its phase, and
leaves no
process behind. Real ranks under real torchrun."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.distributed.fault_ranks import DEADLINE_S

SCRIPT = Path(__file__).with_name("fault_ranks.py")
ROOT = Path(__file__).parents[2]
START_S = 40  # two torch imports on a busy machine
SHUTDOWN_S = 6


def run(fault):
    launch = ["--standalone", "--nproc-per-node=2", f"--shutdown-timeout={SHUTDOWN_S}"]
    command = [sys.executable, "-m", "torch.distributed.run", *launch, str(SCRIPT), fault]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    started = time.monotonic()
    job = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    seconds = time.monotonic() - started
    pids = [int(pid) for pid in re.findall(r"rank \d pid (\d+)", job.stdout)]
    assert len(pids) == 2, job.stdout + job.stderr
    return job, seconds, pids


def gone(pids):
    """Whether all processes have ended, within two seconds (the launcher has already waited for its own)."""
    end = time.monotonic() + 2
    while time.monotonic() < end and any(psutil.pid_exists(pid) for pid in pids):
        time.sleep(0.05)
    return not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.parametrize(
    "fault, said",
    [
        ("killed", r"no longer running: rank 1 on \S+ \(phase 'train'\)"),
        pytest.param("stopped", r"no longer running: rank 1 on \S+ \(phase 'train'\)", marks=pytest.mark.slow),
        ("raises", r"rank 1 on \S+ in phase 'train': ValueError: reward of prompt train.jsonl:17 is not a number"),
        ("hangs", r"rank 1 on \S+ in phase 'reward': over the deadline of 6 s"),
    ],
)
def test_a_failed_rank_ends_the_job_and_is_named(fault, said):
    job, seconds, pids = run(fault)
    assert job.returncode != 0
    assert re.search(said, job.stderr), job.stderr
    assert seconds < START_S + DEADLINE_S + SHUTDOWN_S + 5
    assert gone(pids)


def test_ranks_do_not_outlive_their_launcher():
    job, _, pids = run("launcher killed")
    assert job.returncode == -9
    assert gone(pids)
