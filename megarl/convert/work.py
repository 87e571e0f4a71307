"""A conversion as units of work, one a layer: shared out to processes, recorded when they are on the disk, resumed.

A `Job` says what to do and is sent to worker processes; `Job.open` gives the `Converter` that does it there. A unit is
*filled* (bytes copied) and then *settled* (hashed, and on the disk), which overlaps with filling the next one. Only a
settled unit is recorded, as one line of ``megarl_progress.jsonl``; a resumed run hashes again what the record says is
done, and does the rest.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import queue
import re
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

import torch

from megarl.convert.files import PROGRESS, FolderLock, Staging, TargetError
from megarl.convert.manifest import entry_from
from megarl.convert.progress import ProgressBar
from megarl.model.family import ModelSpec
from megarl.weights.durable import sync
from megarl.weights.hf_files import CheckpointError
from megarl.weights.rules import CanonTensor

_LAYER = re.compile(r"(decoder|mtp)\.layers\.(\d+)\.")
_SECONDS_BETWEEN_LOOKS = 0.2
Record = dict[str, Any]  # JSON: what a unit wrote; "unit" is its name
Moved = Callable[[int], None]  # told how many bytes have been copied


@dataclass(frozen=True)
class Unit:
    """Tensors that are converted, and recorded, together: a layer, or what lies before or behind all layers."""

    name: str
    tensors: tuple[CanonTensor, ...]


def units(spec: ModelSpec) -> list[Unit]:
    """All tensors of a model, in streaming order."""
    grouped: dict[str, list[CanonTensor]] = {}
    for tensor in spec.tensors():
        match = _LAYER.match(tensor.name)
        name = f"{match[1]} layer {match[2]}" if match else tensor.name.partition(".")[0]
        grouped.setdefault(name, []).append(tensor)
    return [Unit(name, tuple(tensors)) for name, tensors in grouped.items()]


class Converter(Protocol):
    """Does units. `fill` is called for one unit after another, `settle` from another thread."""

    def fill(self, unit: Unit, moved: Moved) -> Callable[[], Record]:
        """Copy the unit's bytes; what is returned settles it: hashes, waits for the disk, and gives the record."""

    def intact(self, unit: Unit, record: Record) -> bool:
        """Whether what the record says is in the target still is."""

    def close(self) -> None: ...


class Job(Protocol):
    """A conversion, as plain values that another process understands."""

    def open(self) -> Converter: ...


class ProgressFile:
    """The records of finished units in ``folder``, for a run that is known by ``identity``."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.path = folder / PROGRESS
        self.identity = json.loads(json.dumps(identity))
        self.records: dict[str, Record] = {}

    def read(self) -> None:
        """Take over what an interrupted run recorded. Raises TargetError where that run was another one."""
        whole = [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        first, *records = [json.loads(line) for line in whole] or [{}]
        if first and first != self.identity:
            changed = sorted(key for key in {*first, *self.identity} if first.get(key) != self.identity.get(key))
            raise TargetError(
                f"{self.path}: the interrupted run had another {', '.join(changed)}: --overwrite starts again"
            )
        self.records = {record["unit"]: record for record in records}

    def start(self) -> None:
        """Write the file anew: the identity, and what has been taken over."""
        partial = self.path.with_suffix(".new")
        partial.write_text("".join(json.dumps(line) + "\n" for line in (self.identity, *self.records.values())))
        os.replace(partial, self.path)
        sync(self.path.parent)

    def add(self, record: Record) -> None:
        self.records[record["unit"]] = record
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def begin(staging: Staging, identity: dict[str, Any], nbytes: int) -> ProgressFile:
    """The record of a run that starts, or goes on, in a folder that will take ``nbytes``."""
    progress = ProgressFile(staging.folder, identity)
    if staging.resumed:
        progress.read()
    else:
        staging.need(nbytes)
    progress.start()
    return progress


def run(
    job: Job, todo: Sequence[Unit], progress: ProgressFile, workers: int, lock: FolderLock, bar: ProgressBar
) -> list[Record]:
    """Do all units, and return their records in the units' order. Raises what the first failing unit raised."""
    if workers > 1:
        done = _in_processes(job, todo, progress.records, workers, lock, bar)
    else:
        done = _here(job, todo, progress.records, bar)
    for record, is_new in done:
        if is_new:
            progress.add(record)
    return [progress.records[unit.name] for unit in todo]


def _here(
    job: Job, todo: Sequence[Unit], records: dict[str, Record], bar: ProgressBar
) -> Iterator[tuple[Record, bool]]:
    moved = bar.done

    def count(nbytes: int) -> None:
        nonlocal moved
        moved += nbytes
        bar.to(moved)

    with contextlib.closing(job.open()) as converter:
        yield from _convert(converter, ((unit, records.get(unit.name)) for unit in todo), count)


def _convert(
    converter: Converter, todo: Iterator[tuple[Unit, Record | None]], moved: Moved
) -> Iterator[tuple[Record, bool]]:
    """(record, whether it is new) of each unit. While one settles the next is filled."""
    with ThreadPoolExecutor(1) as settling:
        waiting: Future[Record] | None = None
        for unit, record in todo:
            if record and converter.intact(unit, record):
                moved(sum(entry_from(entry).nbytes for entry in record["tensors"].values()))
                yield record, False
                continue
            settle = converter.fill(unit, moved)
            if waiting:
                yield waiting.result(), True
            waiting = settling.submit(settle)
        if waiting:
            yield waiting.result(), True


@dataclass(frozen=True)
class _Failure:
    """An exception of a worker: the error itself where it is one of ours, its traceback otherwise."""

    error: CheckpointError | None
    text: str


def _in_processes(
    job: Job, todo: Sequence[Unit], records: dict[str, Record], workers: int, lock: FolderLock, bar: ProgressBar
) -> Iterator[tuple[Record, bool]]:
    """As `_here`, in processes that take the next unit when they are ready for it."""
    context = multiprocessing.get_context("spawn")
    tasks, results = context.Queue(), context.Queue()
    moved = context.Value("q", bar.done)
    for unit in todo:
        tasks.put((unit, records.get(unit.name)))
    for _ in range(workers):
        tasks.put(None)
    args = (job, tasks, results, moved, lock)
    processes = [context.Process(target=_serve, args=args, daemon=True) for _ in range(workers)]
    for process in processes:
        process.start()
    try:
        for _ in todo:
            result = _next_result(results, processes, lambda: bar.to(moved.value))
            if isinstance(result, _Failure):
                raise result.error or RuntimeError(f"a worker failed:\n{result.text}")
            yield result
        bar.to(moved.value)
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.terminate()
            process.join()
        for channel in (tasks, results):
            channel.cancel_join_thread()
            channel.close()


def _next_result(results: Any, processes: list[Any], look: Callable[[], None]) -> Any:
    """Wait for a worker's result. Raises RuntimeError where one has died, which sends none."""
    while True:
        dead = [process for process in processes if process.exitcode not in (None, 0)]
        try:
            return results.get(timeout=_SECONDS_BETWEEN_LOOKS)
        except queue.Empty:
            look()
            if dead:
                raise RuntimeError(f"worker {dead[0].pid} was killed (exit code {dead[0].exitcode})") from None


def _serve(job: Job, tasks: Any, results: Any, moved: Any, lock: FolderLock) -> None:
    """A worker: it ends with its parent, however that ends, and holds ``lock`` until it has."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def count(nbytes: int) -> None:
        with moved.get_lock():
            moved.value += nbytes

    try:
        with contextlib.closing(job.open()) as converter:
            for result in _convert(converter, iter(tasks.get, None), count):
                results.put(result)
    except CheckpointError as error:
        results.put(_Failure(CheckpointError(str(error)), ""))
    except Exception:
        results.put(_Failure(None, traceback.format_exc()))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        wait([parent.sentinel])
        os._exit(1)
