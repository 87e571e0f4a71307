"""Metrics of a run: metrics.jsonl and TensorBoard always, Weights & Biases when configured.

metrics.jsonl holds one flat JSON object per call of `log`: {"step": 3, "reward/mean": 0.5, ...}, written at once, so
that a run that dies keeps what it reported (`Journal`: a full disk does not end it). JSON has no NaN: a non-finite
number is written as the string "NaN", "Infinity" or "-Infinity" and counted in `metrics/nonfinite`. Only the writer's
rank touches files.
A step may take several lines (what is known only after its report comes in one more): `read_metrics` merges them, the
later value wins. The file is opened for appending: giving every run its own is up to the caller (see run.py).
"""

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any, Protocol

from megarl.observe.journal import Journal

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
NONFINITE_KEY = "metrics/nonfinite"
_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class LoggerConfig(Protocol):
    """The fields of the config's `logger` section that are read here."""

    @property
    def wandb_enabled(self) -> bool: ...

    @property
    def project(self) -> str: ...

    @property
    def name(self) -> str | None: ...


class MetricsLog:
    """Writes one record per call to every sink; does nothing on ranks that are not the writer."""

    def __init__(
        self,
        run_dir: str | Path,
        cfg_logger: LoggerConfig,
        config_dict: dict[str, Any],
        is_writer: bool,
        purge_step: int | None = None,
    ) -> None:
        """``purge_step``: TensorBoard drops what an earlier process of the run logged from this step on."""
        self.path = Path(run_dir) / METRICS_FILE
        self._is_writer = is_writer
        self._wandb_run: Any = None
        if not is_writer:
            return
        # Imported here: it costs a second and only one rank needs it.
        from torch.utils.tensorboard import SummaryWriter

        if cfg_logger.wandb_enabled:
            self._wandb_run = _start_wandb(Path(run_dir), cfg_logger, config_dict)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _drop_unfinished_line(self.path)
        self.path.touch()  # that there is a run in this folder shows before its first step
        self._file = Journal(self.path)
        self._tensorboard = SummaryWriter(str(self.path.parent / TENSORBOARD_FOLDER), purge_step=purge_step)
        self._tensorboard.add_text("config", f"```\n{json.dumps(config_dict, indent=2, default=str)}\n```")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if not self._is_writer:
            return
        values = {key: float(value) for key, value in metrics.items()}
        bad = [key for key, value in values.items() if not math.isfinite(value)]
        if bad:
            values[NONFINITE_KEY] = float(len(bad))
        record = {"step": step} | {key: _to_json(value) for key, value in values.items()}
        self._file.append([json.dumps(record, allow_nan=False)])
        if self._tensorboard is not None:
            self._draw(step, values)
        if self._wandb_run is not None:
            self._wandb_run.log(values, step=step)

    def _draw(self, step: int, values: dict[str, float]) -> None:
        try:
            for key, value in values.items():
                self._tensorboard.add_scalar(key, value, step)
            self._tensorboard.flush()
        except OSError as reason:  # its thread has ended; metrics.jsonl has the same numbers, and waits for room
            print(f"{self.path.parent / TENSORBOARD_FOLDER}: {reason}; from here on it gets nothing", file=sys.stderr)
            self._tensorboard = None

    def close(self) -> None:
        """Raises OSError where the disk does not take metrics.jsonl's last lines."""
        if not self._is_writer:
            return
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb_run is not None:
            self._wandb_run.finish()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl (or of the run folder that holds one), one per step, in order of first appearance.

    Strings that stand for non-finite numbers are floats again. Lines of the same step are merged, later values win. A
    last line without its newline, as a killed run leaves it, is left out; any other bad line is an error.
    """
    path = Path(path)
    path = path / METRICS_FILE if path.is_dir() else path
    by_step: dict[int, dict[str, Any]] = {}
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
            step = record["step"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: not a metrics record ({error!r}): {line[:80]!r}") from error
        by_step.setdefault(step, {}).update({key: _NONFINITE.get(value, value) for key, value in record.items()})
    return list(by_step.values())


def _to_json(value: float) -> float | str:
    if math.isfinite(value):
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _drop_unfinished_line(path: Path) -> None:
    """Cut a half-written last line off, or the next record would be glued to it."""
    if not path.exists():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        path.write_bytes(content[: content.rfind(b"\n") + 1])


def _start_wandb(run_dir: Path, cfg_logger: LoggerConfig, config_dict: dict[str, Any]) -> Any:
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise RuntimeError(
            "logger.wandb_enabled=true, but the package wandb is not installed: "
            "`pip install wandb`, or set logger.wandb_enabled=false"
        ) from error
    return wandb.init(
        project=cfg_logger.project, name=cfg_logger.name or run_dir.name, dir=str(run_dir), config=config_dict
    )
