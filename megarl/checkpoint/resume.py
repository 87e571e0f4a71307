"""Which checkpoint a run goes on from: the newest that verifies, and what is said of those that do not."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from omegaconf import OmegaConf

from megarl.checkpoint.folder import CHECKPOINTS, CONFIG, Broken, Manifest, finished, verify
from megarl.checkpoint.metadata import refuse_code
from megarl.checkpoint.retention import best_first
from megarl.checkpoint.writer import METADATA
from megarl.config import Config
from megarl.parallel.collectives import gather_objects
from megarl.parallel.mesh import Mesh
from megarl.weights.hf_files import CheckpointError

# Settings that may differ from those of the checkpoint without a word: they are about where and how long, not what.
_SILENT = ("run.root", "run.name", "run.max_num", "run.deadline", "run.stop_grace", "cluster.", "parallel.", "logger.")


@dataclass(frozen=True)
class Found:
    """A checkpoint that verified. ``in_place``: it is this run's own, which goes on."""

    folder: Path
    manifest: Manifest
    skipped: list[str]  # what was wrong with newer ones
    in_place: bool


def find(cfg: Config, mesh: Mesh) -> Found | None:
    """The checkpoint that ``checkpoint.resume_mode`` asks for; None where the run begins. A collective over all ranks,
    which share the hashing.

    Raises CheckpointError where there are checkpoints and none of them verifies, or the named one does not, or
    resume_mode=best finds none with a metric.
    """
    mode, own = cfg.checkpoint.resume_mode, Path(cfg.run.root) / cfg.run.name / CHECKPOINTS
    shared = [_candidates(cfg, own) if mesh.rank == 0 else []]
    dist.broadcast_object_list(shared, 0, group=mesh.host_group)
    skipped: list[str] = []
    for folder in shared[0]:
        manifest, why = verified(folder, mesh)
        if manifest is None:
            skipped.append(why)
            continue
        if mode == "auto" and _done(manifest, cfg):
            return None
        _same_algorithm(folder, cfg)
        return Found(folder, manifest, skipped, folder.resolve().parent == own.resolve())
    if skipped:
        tried = "\n  ".join(skipped)
        raise CheckpointError(
            f"no checkpoint can be resumed from:\n  {tried}\n"
            "checkpoint.resume_mode=disable sets them aside and starts again"
        )
    if mode == "best":
        raise CheckpointError(f"checkpoint.resume_mode=best: no checkpoint in {own} has a metric")
    return None


def _candidates(cfg: Config, own: Path) -> list[Path]:
    """What to try, in this order."""
    c = cfg.checkpoint
    if c.resume_mode == "disable":
        return []
    if c.resume_mode == "resume_path":
        return [Path(c.resume_from_path or "")]
    return best_first(own, c.higher_is_better) if c.resume_mode == "best" else finished(own)


def verified(folder: Path, mesh: Mesh) -> tuple[Manifest | None, str]:
    """The manifest if every rank found its share of the files whole, else what the first rank that did not says."""
    manifest, why = None, None
    try:
        manifest = verify(folder, (mesh.rank, mesh.world_size))
        refuse_code(folder / METADATA)
        if missing := {"model", "optimizer"} - set(manifest.contents):
            why = f"{folder}: was saved without {' and '.join(sorted(missing))}"
    except (Broken, OSError) as reason:
        why = str(reason)
    whys = [said for said in gather_objects(why, mesh.host_group) if said]
    return (None, whys[0]) if whys else (manifest, "")


def _done(manifest: Manifest, cfg: Config) -> bool:
    """Whether the checkpoint is the end of a run that was to be as long as this one."""
    return manifest.step >= manifest.total_steps and manifest.length == length_of(cfg)


def length_of(cfg: Config) -> dict[str, int | None]:
    return {"max_num_steps": cfg.run.max_num_steps, "max_num_epochs": cfg.run.max_num_epochs}


def _same_algorithm(folder: Path, cfg: Config) -> None:
    theirs = OmegaConf.load(folder / CONFIG).algorithm
    if theirs != cfg.algorithm:
        raise CheckpointError(
            f"{folder} is of algorithm {theirs}, this recipe of {cfg.algorithm}: give the run another run.name, or "
            "set checkpoint.resume_mode=disable"
        )


def changes(folder: Path, cfg: Config) -> list[str]:
    """Settings that differ from those the checkpoint was made with, as ``name: theirs -> ours``."""
    theirs = dict(_leaves(OmegaConf.to_container(OmegaConf.load(folder / CONFIG))))
    ours = dict(_leaves(dataclasses.asdict(cfg)))
    both = [name for name in ours if theirs.get(name, ours[name]) != ours[name]]
    loud = [name for name in both if not name.startswith(("checkpoint.", *_SILENT))]
    return [f"{name}: {theirs[name]} -> {ours[name]}" for name in loud]


def _leaves(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        return [leaf for key, inner in tree.items() for leaf in _leaves(inner, f"{path}.{key}" if path else str(key))]
    return [(path, tree)]
