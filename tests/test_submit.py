"""`megarl submit`: the script of a job, what is refused before anything is queued, and the shell around the ranks."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from megarl.cli import main
from megarl.config import load
from megarl.config.running import duration_seconds
from megarl.submit import SLURM, Job, SubmitError, check, duration, script, seconds_of, variants

ROOT = Path(__file__).parents[1]
RECIPE = str(ROOT / "examples" / "llama3.3_70b_math_grpo.yaml")


@pytest.fixture(autouse=True)
def outside_any_job(monkeypatch):
    for name in ("WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def config(*overrides):
    return load([RECIPE, *overrides], check_model=False)


@pytest.mark.parametrize(
    "limit, seconds",
    [("90", 5400), ("90:30", 5430), ("4:00:00", 14400), ("1-12", 129600), ("1-12:30", 131400), ("1-0:0:1", 86401)],
)
def test_time_limits_as_slurm_writes_them(limit, seconds):
    assert seconds_of(limit) == seconds


@pytest.mark.parametrize("seconds, text", [(1, "000:00:00:01"), (93784, "001:02:03:04"), (864000, "010:00:00:00")])
def test_durations_as_the_config_takes_them(seconds, text):
    assert duration(seconds) == text and duration_seconds(text) == seconds


def test_a_recipe_s_own_time_stays():
    own = config("checkpoint.checkpoint_must_save_by=00:01:00:00")
    assert "must_save_by" not in script(own, Job(nodes=8, time="4:00:00"), RECIPE, [])
    assert "must_save_by" not in script(config(), Job(nodes=8), RECIPE, [])


def test_dry_run_of_the_70b_recipe(capsys):
    options = ["--nodes", "16", "--time", "4:00:00", "--partition", "h100", "--sbatch=--qos=high", "--dry-run"]
    assert main(["submit", RECIPE, "optimizer.lr=2e-6", *options]) == 0
    printed = capsys.readouterr().out
    for line in ("--nodes=16", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=4:00:00", "--signal=USR1@300"):
        assert f"#SBATCH {line}\n" in printed
    assert "#SBATCH --requeue\n" in printed and "#SBATCH --qos=high\n" in printed
    assert f"arguments=({RECIPE} optimizer.lr=2e-6 cluster.num_nodes=16 checkpoint.resume_mode=continue " in printed
    assert "checkpoint.checkpoint_must_save_by=000:03:55:00)\n" in printed  # 4 hours less 300 s
    assert subprocess.run(["bash", "-n"], input=printed, text=True, check=False).returncode == 0


def test_the_recipe_is_checked_against_the_allocation(capsys):
    """17 nodes of 8 ranks are 136, which TP 4 x PP 4 = 16 does not divide."""
    assert main(["submit", RECIPE, "--nodes", "17", "--dry-run"]) == 2
    assert "136 % 16 = 8" in capsys.readouterr().err


def test_a_sweep_is_an_array_of_runs_with_names_of_their_own():
    sweep = ("optimizer.lr=1e-6,2e-6", "loss.kl_type=k2,k3")
    assert variants(sweep)[1] == ["optimizer.lr=1e-6", "loss.kl_type=k3"] and len(variants(sweep)) == 4
    text = script(config(), Job(nodes=8, sweep=sweep), RECIPE, [])
    assert "#SBATCH --array=0-3\n" in text
    lines = [line for line in text.splitlines() if line.startswith(("arguments=", "sweep=", "eval"))]
    shown = subprocess.run(
        ["bash", "-c", "\n".join([*lines, 'printf "%s\\n" "${arguments[@]}"'])],
        env=os.environ | {"SLURM_ARRAY_TASK_ID": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    wanted = ["optimizer.lr=2e-6", "loss.kl_type=k2", "run.name=llama3.3_70b_math_grpo-2"]
    assert shown.stdout.splitlines()[-3:] == wanted


@pytest.mark.parametrize(
    "job, overrides, said",
    [
        (Job(8, time="5:00"), [], "leaves nothing before --grace 300"),
        (Job(8, time="soon"), [], "is no time limit of Slurm's"),
        (Job(8), ["checkpoint.save_contents=[hf]"], "must have model and optimizer"),
        (Job(8), ["checkpoint.resume_mode=disable"], "would begin again there each time"),
        (Job(8, sweep=("optimizer.lr",)), [], "is not KEY=V1,V2"),
    ],
)
def test_what_could_not_work_is_refused(job, overrides, said):
    with pytest.raises(SubmitError, match=said.replace("[", r"\[")):
        script(config(*overrides), job, RECIPE, [])


def test_the_scripts_are_shell():
    for path in (SLURM / "train.sbatch", SLURM / "train_async.sbatch", SLURM / "env.sh"):
        assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0


ELSEWHERE = "rank {} on {} in phase 'train': other ranks: all of them run, in another phase: {}"
# Three ranks wait for the fourth, which is alone in its phase and says so of all of them.
ONE_STUCK = "\n".join(
    [
        *(ELSEWHERE.format(k, f"n{k}", "rank 3 on n3 (phase 'reward', 60 s in it)") for k in range(3)),
        ELSEWHERE.format(3, "n3", ", ".join(f"rank {k} on n{k} (phase 'train', 59 s in it)" for k in range(3))),
    ]
)
TWO_LATE = "\n".join(f"rank {k} on n{k} in phase 'train': over the deadline of 6 s (run.deadline_s)" for k in range(2))


def fake_slurm(folder, srun):
    """Commands that a batch script calls, each writing down its arguments."""
    for name, body in {
        "srun": srun,
        "scontrol": 'if [ "$1" = show ]; then echo localhost; fi',
        "sbatch": f'echo "${{MASTER_ADDR:-}} ${{MEGARL_RESUBMITS:-}}" >> {folder}/inherited',
        "sleep": ":",
    }.items():
        path = folder / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> {folder}/calls\n{body}\n')
        path.chmod(0o755)
    (folder / "calls").write_text("")


@pytest.mark.parametrize(
    "code, said, called",
    [
        (0, "", ""),
        (75, "", "scontrol requeue 7"),
        (138, "", "scontrol requeue 7"),
        (2, "", ""),
        (1, "ValueError: no", ""),
        (1, "other ranks: no longer running: rank 3 on n2 (phase 'train')", "sbatch --exclude=n2 job.sh"),
        (1, ONE_STUCK, "sbatch --exclude=n3 job.sh"),
        (
            124,
            "rank 1 on n2 in phase 'reward': over the deadline of 6 s (run.deadline_s)",
            "sbatch --exclude=n2 job.sh",
        ),
        (124, TWO_LATE, ""),
    ],
)
def test_what_follows_from_how_the_ranks_end(tmp_path, code, said, called):
    """The shell around srun, with Slurm's commands replaced by ones that write down how they were called."""
    done, follow = run_batch_script(tmp_path, f'echo "{said}" >&2\nexit {code}')
    assert done.returncode == code, done.stderr
    assert follow == ([called] if called else [])
    calls = (tmp_path / "calls").read_text().splitlines()
    assert "srun --kill-on-bad-exit=1" in "".join(calls) and any(call.endswith("megarl r.yaml") for call in calls)


REMOTE = ["rollout.mode=remote", "rollout.num_nodes=2", "rollout.num_engines=1"]


def test_servers_get_nodes_of_their_own():
    """8 nodes that train and 2 that serve are 10."""
    text = script(config(*REMOTE), Job(nodes=8), RECIPE, REMOTE)
    for line in ("#SBATCH --nodes=10", "#SBATCH --exclusive", "export MEGARL_ROLLOUT_NODES=2"):
        assert f"{line}\n" in text
    assert text.splitlines()[-1].startswith(f"exec bash {SLURM / 'train_async.sbatch'} ")
    assert "cluster.num_nodes=8" in text
    plain = script(config(), Job(nodes=8), RECIPE, [])
    assert "train_async" not in plain and "exclusive" not in plain
    with pytest.raises(SubmitError, match=r"set rollout\.num_nodes"):
        script(config("rollout.mode=remote"), Job(nodes=8), RECIPE, [])


def test_two_steps_on_nodes_of_their_own(tmp_path):
    """Three nodes, of which one serves: the servers' step goes on until the ranks' has ended, and is then ended."""
    step = f'case "$*" in *serve*) trap "echo ended >> {tmp_path}/served; exit 0" TERM; '
    step += "for i in $(seq 600); do /bin/sleep 0.1; done ;; *) /bin/sleep 0.5; exit 75 ;; esac"
    fake_slurm(tmp_path, step)
    hosts = tmp_path / "scontrol"
    hosts.write_text(hosts.read_text().replace("echo localhost", "printf '%s\\n' localhost n2 n3"))
    names = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-3]", "MEGARL_SLURM": str(SLURM), "MEGARL_JOB": "job.sh"}
    names |= {"MEGARL_ROLLOUT_NODES": "1", "SLURM_NTASKS_PER_NODE": "4", "MEGARL_LOGS": str(tmp_path / "logs")}
    environment = os.environ | names | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(SLURM / "train_async.sbatch"), "r.yaml", "a=b"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 75, done.stderr
    calls = (tmp_path / "calls").read_text()
    (serve,) = [line for line in calls.splitlines() if line.startswith("srun") and "--nodelist=n3 " in line]
    (ranks,) = [line for line in calls.splitlines() if line.startswith("srun") and "--nodelist=localhost,n2 " in line]
    assert "--nodes=1 --ntasks=1" in serve and "--nodes=2 --ntasks=8" in ranks and "scontrol requeue 7" in calls
    assert (tmp_path / "served").read_text() == "ended\n"
    nodes = names | {"MEGARL_ROLLOUT_NODES": "3"}
    refused = subprocess.run(command, env=environment | nodes, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2 and "leave none to train" in refused.stderr


def run_batch_script(folder, srun, **names):
    """What the job's shell called afterwards."""
    fake_slurm(folder, srun)
    names = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "MEGARL_SLURM": str(SLURM),
        "MEGARL_JOB": "job.sh",
    } | names
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "MEGARL_LOGS": str(folder / "logs")} | names
    command = ["bash", str(SLURM / "train.sbatch"), "r.yaml"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    calls = (folder / "calls").read_text().splitlines()
    return done, [call for call in calls if call.startswith(("sbatch", "scontrol requeue"))]


GONE = "other ranks: no longer running: rank 3 on {} (phase 'train')"


def test_what_an_earlier_start_said_of_a_node_counts_no_more(tmp_path):
    """Start 1 lost n2. Start 2 loses n5, and a rank's log of start 1 is still there."""
    say = f'mkdir -p {tmp_path}/logs/start_$((SLURM_RESTART_COUNT + 1)); for k in 1 2; do echo "{{}}" '
    say += f">> {tmp_path}/logs/start_$((SLURM_RESTART_COUNT + 1))/rank_$k.log; done; exit 1"
    first = run_batch_script(tmp_path, say.format(GONE.format("n2")), SLURM_RESTART_COUNT="0")[1]
    assert first == ["sbatch --exclude=n2 job.sh"]
    said = f'echo "{GONE.format("n5")}" >&2; exit 1'
    assert run_batch_script(tmp_path, said, SLURM_RESTART_COUNT="1")[1] == ["sbatch --exclude=n5 job.sh"]


@pytest.mark.parametrize("address", [None, "localhost"])
def test_a_job_submitted_again_meets_at_a_node_of_its_own(tmp_path, monkeypatch, address):
    """sbatch hands its environment on: the address that this job made is not the next one's, the site's own is."""
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    own = {} if address is None else {"MASTER_ADDR": address}
    run_batch_script(tmp_path, f'echo "{GONE.format("n2")}" >&2; exit 1', **own)
    assert (tmp_path / "inherited").read_text() == f"{address or ''} 1\n"


def test_of_a_sweep_only_the_run_that_failed_is_submitted_again(tmp_path):
    said = f'echo "{GONE.format("n2")}" >&2; exit 1'
    done, calls = run_batch_script(tmp_path, said, SLURM_ARRAY_TASK_ID="3", MEGARL_EXCLUDED="n9")
    assert done.returncode == 1 and calls == ["sbatch --array=3 --exclude=n9,n2 job.sh"]


def test_the_users_own_exclusions_go_on():
    text = script(config(), Job(nodes=8, exclude="n[1-2]"), RECIPE, [])
    assert "#SBATCH --exclude=n[1-2]\n" in text and "export MEGARL_EXCLUDED=${MEGARL_EXCLUDED:-'n[1-2]'}\n" in text


LARGE = [
    path
    for path in sorted((ROOT / "examples").rglob("*.yaml"))
    if re.search(r"^ *num_nodes: *([2-9]|\d\d)", text := path.read_text(), re.MULTILINE) and "mode: remote" not in text
]  # those with servers on nodes of their own: above, and in test_async_recipes.py


@pytest.mark.parametrize("recipe", LARGE, ids=lambda path: path.stem)
def test_dry_run_of_every_recipe_of_several_nodes(capsys, recipe):
    cfg = load([str(recipe)], check_model=False)
    assert main(["submit", str(recipe), "--time", "1-00:00:00", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    ranks = cfg.cluster.num_nodes, cfg.cluster.gpus_per_node
    assert f"#SBATCH --nodes={ranks[0]}\n#SBATCH --ntasks-per-node={ranks[1]}\n" in printed
    assert subprocess.run(["bash", "-n"], input=printed, text=True, check=False).returncode == 0


def test_check_accepts_the_recipes_that_ship():
    check(config(), Job(nodes=8, time="4:00:00"))
