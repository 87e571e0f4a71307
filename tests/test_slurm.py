"""Jobs on a real Slurm cluster of three nodes, all on this machine (`tools/slurm_up.sh`): they save, are queued again,
and go on as the run that nobody touched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megarl.cli import main
from megarl.observe.metrics import read_metrics

ROOT = Path(__file__).parents[1]
START_S = 240  # of Slurm, torch and megatron, on a machine with other work
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))),
        reason="needs root, and apt-get install slurm-wlm munge",
    ),
]
# Steps of some tenths of a second: 64 rows a step, two at a time.
RECIPE = """
algorithm: sft
cluster: {{gpus_per_node: 1, num_nodes: 2, device: cpu}}
run: {{name: two, root: {root}, max_num_steps: {steps}, max_num_epochs: 9999, deadline_s: 60}}
model: {{path: {model}, dtype: fp32}}
optimizer: {{lr: 1.0e-3}}
train: {{train_global_batch_size: 64, train_mb_tokens: 14}}
data: {{path: {root}/rows.jsonl, apply_chat_template: false, max_prompt_length: 8}}
checkpoint: {{save_period: 20, save_contents: [model, optimizer]}}
"""
# A node for the rank, and one for a server.
ASYNC_RECIPE = """
cluster: {{gpus_per_node: 1, num_nodes: 1, device: cpu}}
run: {{name: two, root: {root}, max_num_steps: {steps}, max_num_epochs: 9999, deadline_s: 300}}
model: {{path: {model}, dtype: fp32}}
optimizer: {{lr: 1.0e-3}}
train: {{train_global_batch_size: 16, train_mb_tokens: 60, logprob_mb_tokens: 60}}
data: {{path: {root}/rows.jsonl, apply_chat_template: false, max_prompt_length: 8}}
rollout: {{mode: remote, num_nodes: 1, num_engines: 1, max_staleness: 1, engine_timeout_s: 240, kv_cache_gb: 0.02,
  max_num_seqs: 16, num_prompts_per_step: 4, num_generations_per_prompt: 4, max_response_length: 6}}
loss: {{truncated_importance_sampling_type: tis}}
reward: {{workers: 1, functions: [{{name: exact}}]}}
checkpoint: {{save_period: 20, save_contents: [model, optimizer]}}
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    home = tmp_path_factory.mktemp("slurm")
    script, environment = str(ROOT / "tools" / "slurm_up.sh"), os.environ | {"MEGARL_SLURM_HOME": str(home / "cluster")}
    done = subprocess.run([script, "up", "3"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WORLD_SIZE", "SLURM_PROCID", "MASTER_ADDR", "MASTER_PORT"):
            patch.delenv(name, raising=False)
        patch.setenv("SLURM_CONF", str(home / "cluster" / "slurm.conf"))
        patch.setenv("PYTHONPATH", str(ROOT))
        yield home / "cluster"
    subprocess.run([script, "down"], env=environment, check=True)


class Submitted:
    """A run that is a job, and what is seen of it."""

    def __init__(self, model, root, steps, recipe=RECIPE):
        answer = "response" if recipe is RECIPE else "answer"
        rows = [{"prompt": f"{a}+{b}=", answer: str(a + b)} for a in range(5) for b in range(5)]
        (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.root, self.steps, self.recipe = root, steps, root / "recipe.yaml"
        self.recipe.write_text(recipe.format(root=root, model=model, steps=steps))

    def submit(self, *options):
        assert main(["submit", str(self.recipe), *options]) == 0

    @property
    def output(self):
        return "".join(path.read_text() for path in sorted((self.root / "two" / "slurm").glob("*.out")))

    @property
    def done(self):
        path = self.root / "two" / "metrics.jsonl"
        return len(read_metrics(path)) if path.exists() else 0

    def wait(self, what, seconds=START_S):
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, self.output + subprocess.check_output(["squeue", "--long"], text=True)
            time.sleep(0.5)

    def wait_for_the_end(self):
        self.wait(lambda: " done\n" in self.output, 900)
        subprocess.run(["scancel", "--name=two"], check=True)

    def check_against_a_straight_run(self):
        """The same two ranks, on one node and without a stop: the same losses, to the last bit."""
        overrides = ["run.name=straight", "cluster.num_nodes=1", "cluster.gpus_per_node=2", "checkpoint.save_period=0"]
        command = [sys.executable, "-m", "megarl", "train", str(self.recipe), *overrides]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        two, straight = (read_metrics(self.root / name) for name in ("two", "straight"))
        assert [record["step"] for record in two] == list(range(1, self.steps + 1))
        assert [r["actor/loss"] for r in two] == [r["actor/loss"] for r in straight]


def test_a_job_that_is_told_to_save_goes_on(cluster, tiny_chat_model, tmp_path):
    job = Submitted(tiny_chat_model, tmp_path, 300)
    job.submit("--time", "20:00")
    job.wait(lambda: job.done > 20)
    subprocess.run(["scancel", "--signal=USR1", "--name=two"], check=True)
    job.wait(lambda: "queued again" in job.output)
    job.wait_for_the_end()
    assert "(SIGUSR1)" in job.output and "start 2, on n[" in job.output and "resumed from step" in job.output
    job.check_against_a_straight_run()


def test_servers_have_nodes_of_their_own(cluster, tiny_chat_model, tmp_path):
    """Two steps of a job on two nodes; both are told to save, only the ranks mind it; the job goes on with new servers,
    and when the ranks are done nothing is left of them."""
    job = Submitted(tiny_chat_model, tmp_path, 120, ASYNC_RECIPE)
    job.submit("--time", "20:00")
    job.wait(lambda: job.done > 5)
    assert "ranks on n1, servers on n2" in job.output
    subprocess.run(["scancel", "--signal=USR1", "--name=two"], check=True)
    job.wait(lambda: "queued again" in job.output)
    job.wait(lambda: " done\n" in job.output, 900)
    job.wait(lambda: not subprocess.check_output(["squeue", "--noheader"], text=True).strip(), 90)
    records = read_metrics(tmp_path / "two" / "metrics.jsonl")
    assert "resumed from step" in job.output and [record["step"] for record in records] == list(range(1, 121))
    assert all(record["engines/number"] == 1 and record["staleness/max"] <= 1 for record in records)
    job.wait(lambda: not left_of(tmp_path), 30)


@pytest.mark.parametrize("by", ["clock", "signal"])
def test_a_time_limit_saves_and_the_job_goes_on(cluster, tiny_chat_model, tmp_path, by):
    """By the run's own clock, before Slurm's signal comes; or by that, which Slurm may send a minute too early, so that
    some starts have no step yet."""
    # Steps of a tenth of a second, where nothing else runs: more than fit before either.
    steps, limit, grace, must_save_by = {
        "clock": (700, "3:00", "60", "00:00:00:45"),
        "signal": (1400, "2:00", "45", "01:00:00:00"),
    }[by]
    job = Submitted(tiny_chat_model, tmp_path, steps)
    job.submit("--time", limit, "--grace", grace, f"checkpoint.checkpoint_must_save_by={must_save_by}")
    said = "are left until checkpoint.checkpoint_must_save_by" if by == "clock" else "(SIGUSR1)"
    job.wait(lambda: said in job.output, 2 * START_S)
    assert 0 < job.done < job.steps
    job.wait_for_the_end()
    assert "resumed from step" in job.output and "DUE TO TIME LIMIT" not in job.output
    job.check_against_a_straight_run()


def test_a_node_that_dies_is_left_out(cluster, tiny_chat_model, tmp_path):
    """Everything of n2 is killed in the middle of a step: its rank, Slurm's step daemon and its slurmd. The run goes on
    with n3 in its place, from the last checkpoint."""
    job = Submitted(tiny_chat_model, tmp_path, 300)
    job.submit("--time", "20:00")
    job.wait(lambda: job.done > 30)
    (rank,) = [p for p in ranks() if p.environ().get("SLURMD_NODENAME") == "n2"]
    for process in (psutil.Process(int((cluster / "slurmd-n2.pid").read_text())), rank.parent(), rank):
        process.kill()
    job.wait_for_the_end()
    assert "no longer running: rank 1 on n2" in job.output and "resumed from step" in job.output
    assert "on n[1,3]; other ranks" in job.output
    job.check_against_a_straight_run()


def left_of(folder):
    """Processes that are about a run in this folder."""
    return [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])]


def ranks():
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "megarl.train" in (process.info["cmdline"] or []) and "bash" not in process.info["cmdline"][0]:
            found.append(process)
    return [process for process in found if "SLURM_JOB_ID" in process.environ()]
