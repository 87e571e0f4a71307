"""Which checkpoints and exports stay. On rank 0 only; OSError where the disk does not let go of one."""

from __future__ import annotations

import re
from pathlib import Path

from megarl.checkpoint import folder as disk
from megarl.checkpoint.folder import BEST, Broken, Manifest
from megarl.config import CheckpointConfig


def export_name(step: int) -> str:
    """The folder under ``hf/`` of an export between steps."""
    return f"step_{step:06d}"


def metrics_of(root: Path) -> dict[int, float | None]:
    """The metric of every finished checkpoint by its step. One that cannot be read stays for somebody to look at, and
    counts for nothing."""
    metrics: dict[int, float | None] = {}
    for path in disk.finished(root):
        try:
            manifest = Manifest.read(path)
        except Broken:
            continue
        if manifest.step == disk.step_of(path):
            metrics[manifest.step] = manifest.metric
    return metrics


def prune(root: Path, exports: Path, cfg: CheckpointConfig, newest: int) -> None:
    """After ``newest`` was saved: remove what is not kept any more, and let `BEST` name the best.

    Exports go with their checkpoints. Where only exports are made, the rules are theirs.
    """
    metrics = {step: metric for step, metric in metrics_of(root).items() if step <= newest}
    written = _exports(exports)
    steps = metrics if "model" in cfg.save_contents else dict.fromkeys(written)
    keep = disk.kept(
        steps,
        keep_last=cfg.keep_last,
        keep_every=cfg.keep_every,
        keep_top_k=cfg.keep_top_k,
        higher_is_better=cfg.higher_is_better,
    )
    if cfg.metric_name is not None and (best := disk.ranked(metrics, cfg.higher_is_better)):
        if disk.pointed(root, BEST) != best[0]:
            disk.point(root, best[0], BEST)
    for step in metrics:
        if step not in keep and step < newest:
            disk.discard(root / disk.name_of(step))
    for step, path in written.items():
        if step not in keep and step < newest:
            disk.remove(path)


def forget(root: Path, exports: Path, step: int, bad: int) -> None:
    """Remove checkpoints and exports from step ``bad`` on, and let the pointer name ``step``: the run is back there."""
    for path in disk.finished(root):
        if (disk.step_of(path) or 0) >= bad:
            disk.discard(path)
    for at, path in _exports(exports).items():
        if at >= bad:
            disk.remove(path)
    disk.point(root, step)


def best_first(root: Path, higher_is_better: bool) -> list[Path]:
    """Finished checkpoints that have a metric, best first."""
    return [root / disk.name_of(step) for step in disk.ranked(metrics_of(root), higher_is_better)]


def _exports(folder: Path) -> dict[int, Path]:
    """Exports between steps, by their step."""
    if not folder.is_dir():
        return {}
    found = {path: re.fullmatch(r"step_(\d{6,})", path.name) for path in folder.iterdir()}
    return {int(match[1]): path for path, match in found.items() if match}
