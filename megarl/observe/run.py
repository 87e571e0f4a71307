"""A run on this rank: its folder, its clock, its log. What loops report goes through here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megarl.config import Config, save
from megarl.observe.console import Console
from megarl.observe.metrics import METRICS_FILE, TENSORBOARD_FOLDER, MetricsLog, read_metrics
from megarl.observe.report import plot_rewards, summary
from megarl.observe.throughput import ModelShape, mfu, tokens_per_second_per_device, train_flops
from megarl.observe.timers import Phases, PhaseWatchdog

CONFIG_FILE = "config.yaml"
PLOT_FILE = "reward.png"
_SHOWN_EVENTS = 5


class Run:
    """Everything a loop needs to say what happens. Only the writer's rank touches files and prints."""

    def __init__(
        self,
        cfg: Config,
        rank: int,
        world_size: int,
        layout: str,
        device_name: str | None = None,
        watchdog: PhaseWatchdog | None = None,
    ) -> None:
        self.cfg = cfg
        self.device_name = device_name
        self.shape = ModelShape.from_hf(json.loads((Path(cfg.model.path) / "config.json").read_text()))
        self.dir = Path(cfg.run.root) / cfg.run.name
        self.is_writer = rank == 0
        self.world_size = world_size
        self.phases = Phases(watchdog)
        self.console = Console(self.is_writer)
        if self.is_writer:
            self.dir.mkdir(parents=True, exist_ok=True)
            _set_aside(self.dir)
            save(cfg, self.dir / CONFIG_FILE)
        self.log = MetricsLog(self.dir, cfg.logger, dataclasses.asdict(cfg), self.is_writer)
        self.console.header(cfg, layout)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A named part of a step: timed, watched, and shown while it runs."""
        self.console.status(name)
        with self.phases(name):
            yield

    def report(self, step: int, total_steps: int, metrics: dict[str, float], lengths: Sequence[int] = ()) -> None:
        """Log a step with the seconds of its phases, and show its line. ``lengths`` are those of the sequences trained
        on."""
        metrics = metrics | self.phases.pop()
        if lengths:
            tokens = sum(lengths)
            seconds = metrics["timing_s/step"]
            metrics["perf/total_num_tokens"] = tokens
            metrics["perf/throughput"] = tokens_per_second_per_device(tokens, seconds, self.world_size)
            flops = train_flops(self.shape, lengths)
            used = mfu(flops, metrics["timing_s/train"], self.device_name, self.world_size)
            if used is not None:
                metrics["perf/mfu"] = used
        self.log.log(step, metrics)
        if step:
            self.console.step(step, total_steps, metrics)
        elif "val/accuracy" in metrics:
            self.console.note(f"before training: held-out accuracy {metrics['val/accuracy']:.1%}")

    def events(self, errors: Sequence[str]) -> None:
        """Show what went wrong with single samples: their groups were dropped."""
        for error in errors[:_SHOWN_EVENTS]:
            self.console.note(f"  dropped a group: {error}")
        if len(errors) > _SHOWN_EVENTS:
            self.console.note(f"  ... and {len(errors) - _SHOWN_EVENTS} more")

    def finish(self) -> None:
        """The table and the picture at the end of a run."""
        self.log.close()
        self.console.close()
        if self.is_writer:
            records = read_metrics(self.dir)
            plot_rewards(records, self.dir / PLOT_FILE, title=self.cfg.run.name)
            self.console.table(f"{self.cfg.algorithm}: {self.dir}", summary(records))


def _set_aside(folder: Path) -> None:
    """Keep the log of an earlier run of this name under another name, so that a new one starts with its own step 1."""
    if not (folder / METRICS_FILE).exists():
        return
    number = 1 + sum(1 for _ in folder.glob("earlier-*"))
    earlier = folder / f"earlier-{number}"
    earlier.mkdir()
    for name in (METRICS_FILE, TENSORBOARD_FOLDER, CONFIG_FILE, PLOT_FILE):
        if (folder / name).exists():
            (folder / name).rename(earlier / name)
