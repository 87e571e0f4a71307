"""`megarl submit`: a Slurm job from a recipe, checked before it is queued.

The job is a script in the run's folder (``slurm/job.sh``): its ``#SBATCH`` lines say what it needs, and it hands over
to ``slurm/train.sbatch``, which starts the ranks, and queues itself again where there is more to do. `script` is pure;
`submit` writes and queues it.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megarl.config import Config

SLURM = Path(__file__).resolve().parents[1] / "slurm"


class SubmitError(ValueError):
    """The job could not run as it was asked for. Nothing was queued."""


@dataclass(frozen=True)
class Job:
    """What a job needs beside its recipe."""

    nodes: int
    time: str | None = None  # Slurm's form: [days-]hours:minutes:seconds
    partition: str | None = None
    account: str | None = None
    exclude: str | None = None
    grace: int = 300  # seconds before the time limit at which ranks are told to save
    chain: int = 1
    sweep: tuple[str, ...] = ()  # KEY=V1,V2,...; several multiply
    sbatch: tuple[str, ...] = field(default=())  # further options of sbatch, as they are


def seconds_of(limit: str) -> int:
    """A time limit as Slurm writes it in seconds: minutes[:seconds], hours:minutes:seconds, or
    days-hours[:minutes[:seconds]]. Raises SubmitError."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if match is None:
        raise SubmitError(f"--time {limit!r} is no time limit of Slurm's, such as 4:00:00 or 1-12:00:00")
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, (*numbers, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def duration(seconds: int) -> str:
    """Seconds as `checkpoint.checkpoint_must_save_by` takes them: DD:HH:MM:SS. It begins with a 0: YAML reads
    10:00:00:00 as a number of base 60."""
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    return f"0{days:02d}:{hours % 24:02d}:{minutes % 60:02d}:{seconds % 60:02d}"


def variants(sweep: Sequence[str]) -> list[list[str]]:
    """Every combination of ``KEY=V1,V2,...`` as a list of overrides; [[]] without any. Raises SubmitError."""
    axes = []
    for axis in sweep:
        key, equals, values = axis.partition("=")
        if not (key and equals and values):
            raise SubmitError(f"--sweep {axis!r} is not KEY=V1,V2,...")
        axes.append([f"{key}={value}" for value in values.split(",")])
    return [list(combination) for combination in itertools.product(*axes)]


def check(cfg: Config, job: Job) -> None:
    """What the recipe and the job must agree on. Raises SubmitError."""
    limit = None if job.time is None else seconds_of(job.time)
    if limit is not None and limit <= job.grace:
        raise SubmitError(
            f"--time {job.time} is {limit} s, which leaves nothing before --grace {job.grace} s to save in"
        )
    if not {"model", "optimizer"} <= set(cfg.checkpoint.save_contents):
        raise SubmitError("checkpoint.save_contents must have model and optimizer: a job goes on from its checkpoint")
    if cfg.rollout.mode == "remote" and not cfg.rollout.num_nodes:
        raise SubmitError("rollout.mode=remote needs nodes for its servers: set rollout.num_nodes")
    if (mode := cfg.checkpoint.resume_mode) not in ("auto", "continue"):
        raise SubmitError(f"checkpoint.resume_mode={mode} would begin again there each time the job is queued")


def script(cfg: Config, job: Job, recipe: str, overrides: Sequence[str], *, python: str = sys.executable) -> str:
    """The batch script. ``overrides`` are the recipe's, without what the job itself sets."""
    check(cfg, job)
    folder = Path(cfg.run.root).resolve() / cfg.run.name / "slurm"
    combinations = variants(job.sweep)
    options = {
        "job-name": cfg.run.name,
        "nodes": job.nodes + cfg.rollout.num_nodes,
        "exclusive": bool(cfg.rollout.num_nodes),  # two steps, of which one has fewer tasks a node
        "ntasks-per-node": cfg.cluster.gpus_per_node,
        "gpus-per-node": None if cfg.cluster.device == "cpu" else cfg.cluster.gpus_per_node,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "exclude": job.exclude,
        "signal": f"USR1@{job.grace}",
        "open-mode": "append",
        "array": f"0-{len(combinations) - 1}" if job.sweep else None,
        "output": folder / ("%A_%a.out" if job.sweep else "%j.out"),
    }
    lines = ["#!/usr/bin/env bash", "#SBATCH --requeue"]
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    lines += [f"#SBATCH --{name}" + ("" if value is True else f"={value}") for name, value in given.items()]
    lines += [f"#SBATCH {option}" for option in job.sbatch]
    mine = [*overrides, f"cluster.num_nodes={job.nodes}"]
    if cfg.checkpoint.resume_mode == "auto":
        mine.append("checkpoint.resume_mode=continue")  # a job that is queued once more than needed has nothing to do
    if job.time is not None and cfg.checkpoint.checkpoint_must_save_by is None:
        mine.append(f"checkpoint.checkpoint_must_save_by={duration(seconds_of(job.time) - job.grace)}")
    lines += [
        f"export MEGARL_SLURM={shlex.quote(str(SLURM))} MEGARL_JOB={shlex.quote(str(folder / 'job.sh'))}",
        f"export MEGARL_PYTHON=${{MEGARL_PYTHON:-{shlex.quote(python)}}}",
        f"cd {shlex.quote(str(Path.cwd()))}",
        f"arguments=({shlex.join([recipe, *mine])})",
    ]
    if job.exclude:  # with it go the nodes that fail
        lines.append(f"export MEGARL_EXCLUDED=${{MEGARL_EXCLUDED:-{shlex.quote(job.exclude)}}}")
    name = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}"
    if job.sweep:
        rows = [shlex.quote(shlex.join([*each, f"run.name={cfg.run.name}-{n}"])) for n, each in enumerate(combinations)]
        lines += [f"sweep=({' '.join(rows)})", 'eval "arguments+=(${sweep[$SLURM_ARRAY_TASK_ID]})"']
        name = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    lines += [f"export MEGARL_LOGS={shlex.quote(str(folder))}/{name}"]
    batch = "train.sbatch"
    if cfg.rollout.num_nodes:
        batch = "train_async.sbatch"
        lines += [f"export MEGARL_ROLLOUT_NODES={cfg.rollout.num_nodes}"]
    lines += [f'exec bash {shlex.quote(str(SLURM / batch))} "${{arguments[@]}}"']
    return "\n".join(lines) + "\n"


def submit(cfg: Config, job: Job, recipe: str, overrides: Sequence[str]) -> str:
    """Write the script and queue it, ``job.chain`` times one after another. Returns what to tell the user."""
    text = script(cfg, job, recipe, overrides)
    folder = Path(cfg.run.root).resolve() / cfg.run.name / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.sh").write_text(text)
    ids: list[str] = []
    for _ in range(job.chain):
        after = [f"--dependency=afterany:{ids[-1]}"] if ids else []
        ids.append(_sbatch([*after, str(folder / "job.sh")]))
    out = folder / f"{ids[0]}.out"
    if job.sweep:
        out = folder / f"{ids[0]}_0.out"
    return (
        f"queued: {', '.join(ids)}\n"
        f"  state     squeue --jobs={','.join(ids)}\n"
        f"  follow    tail -F {shlex.quote(str(out))}\n"
        f"  summary   megarl report {shlex.quote(str(folder.parent))}\n"
        f"  save and queue again   scancel --signal=USR1 {ids[0]}\n"
        f"  stop      scancel {' '.join(ids)}"
    )


def _sbatch(arguments: list[str]) -> str:
    try:
        # The options of the shell that calls, which may itself be in a job, are not this job's.
        plain = {
            name: value
            for name, value in os.environ.items()
            if name == "SLURM_CONF" or not name.startswith(("SLURM_", "SBATCH_"))
        }
        done = subprocess.run(
            ["sbatch", "--parsable", *arguments], env=plain, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise SubmitError("there is no sbatch on this machine: submit from a login node, or use --dry-run") from None
    if done.returncode:
        raise SubmitError(f"sbatch refused the job: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]
