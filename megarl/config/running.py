"""Checks of what a run is kept alive by: its folder, its checkpoints and guard, what its rewards may see.

Contract: as in `megarl.config.values`.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from megarl.config.values import Problem, Problems

if TYPE_CHECKING:
    from megarl.config import Config


def check_running(cfg: "Config") -> Problems:
    """All of them."""
    yield from _run_folder(cfg)
    yield from _checkpoint(cfg)
    yield from _resume(cfg)
    yield from _rollback(cfg)
    yield from _environment(cfg)


def _run_folder(cfg: "Config") -> Problems:
    """A run's folder is right inside `run.root`, also when a symbolic link has its name."""
    name, root = cfg.run.name, Path(cfg.run.root).resolve()
    if not name or name in (".", "..") or re.search(r"[/\\\x00-\x1f]", name):
        yield Problem(f"run.name = {name!r} must be a plain folder name, without / or \\", ("run.name",))
    elif (folder := (root / name).resolve()).parent != root:
        text = f"run.name = {name!r}: {root / name} leads out of run.root, to {folder}"
        yield Problem(text, ("run.name", "run.root"))


def _checkpoint(cfg: "Config") -> Problems:
    """Settings of checkpoints that need one another."""
    c = cfg.checkpoint
    if c.checkpoint_must_save_by is not None and duration_seconds(c.checkpoint_must_save_by) is None:
        text = f"checkpoint.checkpoint_must_save_by = {c.checkpoint_must_save_by!r} is not DD:HH:MM:SS, in quotes"
        yield Problem(text, ("checkpoint.checkpoint_must_save_by",))
    if "optimizer" in c.save_contents and "model" not in c.save_contents:
        text = "checkpoint.save_contents has optimizer without model, which nothing could resume from"
        yield Problem(text, ("checkpoint.save_contents",))
    if (c.keep_top_k > 0) != (c.metric_name is not None):
        text = (
            f"checkpoint.keep_top_k = {c.keep_top_k} and checkpoint.metric_name = {c.metric_name or 'null'} need both"
        )
        yield Problem(text, ("checkpoint.keep_top_k", "checkpoint.metric_name"))
    elif c.keep_top_k and "model" not in c.save_contents:
        text = f"checkpoint.keep_top_k = {c.keep_top_k} needs model in save_contents: an export alone keeps no metric"
        yield Problem(text, ("checkpoint.keep_top_k", "checkpoint.save_contents"))


def _resume(cfg: "Config") -> Problems:
    """What a run goes on from."""
    c = cfg.checkpoint
    if c.resume_mode == "best" and c.metric_name is None:
        text = "checkpoint.resume_mode = best needs checkpoint.metric_name"
        yield Problem(text, ("checkpoint.resume_mode", "checkpoint.metric_name"))
    if (c.resume_mode == "resume_path") != (c.resume_from_path is not None):
        mode, path = f"checkpoint.resume_mode = {c.resume_mode}", c.resume_from_path or "null"
        text = f"{mode} and checkpoint.resume_from_path = {path}: the path goes with resume_path"
        yield Problem(text, ("checkpoint.resume_mode", "checkpoint.resume_from_path"))


def _rollback(cfg: "Config") -> Problems:
    """A guard that goes back needs something to go back to."""
    c = cfg.checkpoint
    for name, follows in {"on_bad_steps": cfg.guard.on_bad_steps, "on_spike": cfg.guard.on_spike}.items():
        if follows == "rollback" and not (c.save_period and {"model", "optimizer"} <= set(c.save_contents)):
            text = (
                f"guard.{name} = rollback needs checkpoints to go back to: set checkpoint.save_period, and model and "
            )
            text += "optimizer in checkpoint.save_contents"
            yield Problem(text, (f"guard.{name}", "checkpoint.save_period", "checkpoint.save_contents"))


def duration_seconds(text: str) -> int | None:
    """Seconds of DD:HH:MM:SS; None for anything else."""
    match = re.fullmatch(r"(\d+):(\d\d):(\d\d):(\d\d)", text)
    if match is None:
        return None
    days, hours, minutes, seconds = map(int, match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _environment(cfg: "Config") -> Problems:
    """Names of variables are names: a value given here would stand in config.yaml for all to read."""
    for name in cfg.reward.pass_env:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            shown = name.partition("=")[0]
            text = f"reward.pass_env: {shown!r}... is no name of an environment variable; name it, and give no value"
            yield Problem(text, ("reward.pass_env",))
