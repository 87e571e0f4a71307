"""A run on this rank: its folder, its clock, its log. What loops report goes through here.

The folder holds one run: `config.yaml`, `metrics.jsonl`, `tensorboard/`, `events.jsonl` (what went wrong with single
samples, and with whole steps), `reward.png` or `loss.png`, the models saved under `hf/`, and `checkpoints/`. One run at
a time has it (`FolderInUse`). A run that resumes goes on with what is there, up to the step that it resumes from; for
any other, what an earlier run of the same name left is moved to `earlier-<n>/` first.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from megarl.config import Config, save
from megarl.model.family import read_spec
from megarl.model.flops import ModelFlops
from megarl.observe.console import Console, format_duration
from megarl.observe.journal import Journal
from megarl.observe.lock import RunLock
from megarl.observe.metrics import METRICS_FILE, TENSORBOARD_FOLDER, MetricsLog, read_metrics
from megarl.observe.report import (
    LOSS_PICTURE,
    REWARD_PICTURE,
    picture_name,
    plot_rewards,
    recorded_seconds,
    summary,
)
from megarl.observe.throughput import mfu, tokens_per_second_per_device
from megarl.observe.timers import Phases, PhaseWatchdog

CONFIG_FILE = "config.yaml"
EVENTS_FILE = "events.jsonl"
SCORES_FILE = "rewards.jsonl"
MODELS_FOLDER = "hf"
CHECKPOINTS_FOLDER = "checkpoints"
_SHOWN_EVENTS = 5


class ResumedFrom(Protocol):
    """The checkpoint a run goes on from, of which only this is read here."""

    @property
    def manifest(self) -> Any: ...

    @property
    def folder(self) -> Path: ...

    @property
    def skipped(self) -> list[str]: ...

    @property
    def in_place(self) -> bool: ...


class StopSource(PhaseWatchdog, Protocol):
    """A watchdog that also hears signals: why the run is to stop, if it is."""

    @property
    def stop_requested(self) -> str | None: ...


class Run:
    """Everything a loop needs to say what happens. Only the writer's rank touches files and prints."""

    def __init__(
        self,
        cfg: Config,
        rank: int,
        world_size: int,
        layout: str,
        device_name: str | None = None,
        watchdog: StopSource | None = None,
        resumed: ResumedFrom | None = None,
    ) -> None:
        self.cfg = cfg
        self._started = time.monotonic() - (time.time() - _process_start())
        self.resumed = resumed
        self.reported: dict[str, float] = {}  # what the last report said
        self.stopped: str | None = None  # why the run ended before its last step
        self._watchdog = watchdog
        self._stop: str | None = None
        self.device_name = device_name
        self.flops = ModelFlops.of(read_spec(cfg.model.path))
        self.dir = Path(cfg.run.root) / cfg.run.name
        self.is_writer = rank == 0
        self.world_size = world_size
        self.phases = Phases(watchdog)
        self.console = Console(self.is_writer)
        self._events, self._scores = Journal(self.dir / EVENTS_FILE), Journal(self.dir / SCORES_FILE)
        self._step = 0  # the last that was reported, and the seconds it was reported with
        self._timed: dict[str, float] = {}
        self._unlogged: dict[str, float] = {}
        if self.is_writer:
            self.dir.mkdir(parents=True, exist_ok=True)
            self._lock = RunLock(self.dir)
            if resumed is None or not resumed.in_place:
                _set_aside(self.dir, Path(cfg.model.path))
            else:
                for name in (METRICS_FILE, EVENTS_FILE, SCORES_FILE):
                    _cut_after(self.dir / name, resumed.manifest.step)
            save(cfg, self.dir / CONFIG_FILE)
        purge = None if resumed is None else resumed.manifest.step + 1
        self.log = MetricsLog(self.dir, cfg.logger, dataclasses.asdict(cfg), self.is_writer, purge)
        self.console.header(cfg, layout)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A named part of a step: timed, watched, and shown while it runs."""
        self.console.status(name)
        with self.phases(name):
            yield

    def dropped(self, counts: Mapping[str, int], kept: int) -> None:
        """Say how many records the data has, and how many of it were left out and why; the first report logs the
        latter as ``data/dropped_<why>``."""
        if self.resumed is None or not self.resumed.in_place:  # else its first report has it
            self._unlogged |= {f"data/dropped_{why}": float(count) for why, count in counts.items()}
        left_out = ", ".join(f"{count:,} {why.replace('_', ' ')}" for why, count in counts.items() if count)
        self.console.note(f"data: {kept:,} records" + (f"; dropped {left_out}" if left_out else ""))

    def report(
        self,
        step: int,
        total_steps: int,
        metrics: Mapping[str, float],
        lengths: Sequence[int] = (),
        epochs: int = 1,
    ) -> None:
        """Log a step with the seconds of its phases, and show its line.

        Args:
            lengths: tokens, prompt and response, of the sequences that the step trained on.
            epochs: how many times it trained on each.

        With lengths, ``perf/*`` are added. ``perf/throughput`` are their tokens per second of the whole step, and
        ``perf/generate_tokens_per_s`` the response tokens per second of the phase ``generate``; both per device.
        """
        timed = self.phases.pop()
        values = {**self._unlogged, **metrics, **timed}
        if lengths:
            values |= self._performance(values, lengths, epochs)
        self.log.log(step, values)
        self.reported = values
        self._step, self._timed, self._unlogged = step, timed, {}
        if step:
            self.console.step(step, total_steps, values)
        elif "val/accuracy" in values:
            self.console.note(f"before training: held-out accuracy {values['val/accuracy']:.1%}")

    def later(self, values: Mapping[str, float]) -> None:
        """Add these to the next report."""
        self._unlogged |= values

    def seconds(self) -> float:
        """Since this process started: what time limits count. A clock that is set meanwhile changes nothing."""
        return time.monotonic() - self._started

    def request_stop(self, why: str) -> None:
        """Let the run end, saved, after the step it is in."""
        self._stop = self._stop or why

    def stop_requested(self) -> str | None:
        """Why the run is to stop, asked by a signal or by `request_stop`."""
        return self._stop or (self._watchdog.stop_requested if self._watchdog is not None else None)

    def events(self, step: int, errors: Sequence[str], kind: str = "dropped a group") -> None:
        """Keep what went wrong, with single samples (their groups were dropped) or a whole step, in events.jsonl, and
        show the first."""
        if not errors or not self.is_writer:
            return
        self._events.append(json.dumps({"step": step, "kind": kind, "event": error}) for error in errors)
        for error in errors[:_SHOWN_EVENTS]:
            self.console.note(f"  {kind}: {error}")
        if len(errors) > _SHOWN_EVENTS:
            self.console.note(f"  ... and {len(errors) - _SHOWN_EVENTS:,} more, all of them in {self._events.path}")

    def scores(self, step: int, rewards: Sequence[tuple[str, float]]) -> None:
        """Keep the prompt's id and the reward of every sample of a step in rewards.jsonl."""
        if self.is_writer:
            self._scores.append(json.dumps({"step": step, "id": i, "reward": reward}) for i, reward in rewards)

    def finish(self) -> None:
        """Log what was timed after the last report, as part of that step; then the table and the picture."""
        if rest := self.phases.pop():
            # Added up, since the later value of a step wins and its own report may have had such a phase too.
            summed = {key: self._timed.get(key, 0.0) + seconds for key, seconds in rest.items()}
            self.log.log(self._step, self._unlogged | summed)
        self.log.close()
        self.console.close()
        if self.is_writer:
            self._events.close()
            self._scores.close()
            self._lock.close()
            records = read_metrics(self.dir)
            title = f"{self.cfg.algorithm} · {self.cfg.run.name}"
            plot_rewards(records, self.dir / picture_name(records), title=title)
            spent = f"{self._step} step{'s' * (self._step != 1)}, {format_duration(recorded_seconds(records))}"
            self.console.table(f"{title} · {spent} · {self.dir}", summary(records))

    def _performance(self, values: Mapping[str, float], lengths: Sequence[int], epochs: int) -> dict[str, float]:
        tokens = sum(lengths)
        throughput = tokens_per_second_per_device(tokens, values["timing_s/step"], self.world_size)
        out: dict[str, float] = {"perf/total_num_tokens": tokens, "perf/throughput": throughput}
        if "response_length/mean" in values and "timing_s/generate" in values:
            responses = values["response_length/mean"] * len(lengths)
            out["perf/generate_tokens_per_s"] = tokens_per_second_per_device(
                responses, values["timing_s/generate"], self.world_size
            )
        flops = epochs * self.flops.train(lengths)
        used = mfu(flops, values["timing_s/train"], self.device_name, self.world_size)
        return out if used is None else out | {"perf/mfu": used}


def _set_aside(folder: Path, model: Path) -> None:
    """Move what an earlier run of this name left into a folder of its own, so that a new one starts with its own
    step 1. Its models stay if this run starts from one of them."""
    if not (folder / METRICS_FILE).exists() and not (folder / CHECKPOINTS_FOLDER).exists():
        return
    names = [METRICS_FILE, TENSORBOARD_FOLDER, CONFIG_FILE, EVENTS_FILE, SCORES_FILE, REWARD_PICTURE, LOSS_PICTURE]
    names.append(CHECKPOINTS_FOLDER)
    if not model.resolve().is_relative_to((folder / MODELS_FOLDER).resolve()):
        names.append(MODELS_FOLDER)
    numbers = [path.name.removeprefix("earlier-") for path in folder.glob("earlier-*")]
    earlier = folder / f"earlier-{1 + max((int(n) for n in numbers if n.isdecimal()), default=0)}"
    earlier.mkdir()
    for name in names:
        if (folder / name).exists():
            (folder / name).rename(earlier / name)


def _cut_after(path: Path, step: int) -> None:
    """Leave only the lines of steps up to this one: what comes later will happen again."""
    if not path.exists():
        return
    whole = path.read_text(encoding="utf-8").split("\n")[:-1]  # a killed run may leave half a line
    kept = [line for line in whole if json.loads(line)["step"] <= step]
    new = path.with_name(path.name + ".tmp")
    new.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(new, path)


def _process_start() -> float:
    """Seconds since the epoch at which this process was started."""
    import psutil

    return psutil.Process().create_time()
