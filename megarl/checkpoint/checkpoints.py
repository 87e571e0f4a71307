"""What a loop knows of checkpoints: it makes one `Checkpoints`, resumes, and takes its steps from it.

    checkpoints = Checkpoints(cfg, run, mesh, policy=policy, stream=stream)
    checkpoints.resume()
    for step in checkpoints.steps(total):
        with run.phase("step"):
            ...
            checkpoints.save_if_due(step)
        run.report(step, ...)

Parts are engines (the ``policy`` is also what is exported for Hugging Face), and anything with ``state_dict`` and
``load_state_dict`` over plain values and tensors, which may differ from rank to rank. Random generators, the schedule
and the guard against bad steps are saved unasked.

`steps` ends early when the run is told to stop or its time is up: it saves first, and `Run.stopped` says why. Between
steps it also publishes what a thread has written, and goes back to the last checkpoint when the guard says so. All of
it is collective, and all ranks decide alike.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import save as safetensors_bytes

from megarl.checkpoint import folder as disk
from megarl.checkpoint.folder import CHECKPOINTS, CONFIG, FileEntry, Manifest
from megarl.checkpoint.guard import Guard
from megarl.checkpoint.resume import changes, length_of, verified
from megarl.checkpoint.retention import export_name, forget, prune
from megarl.checkpoint.state import (
    engine_state,
    join,
    load_engine_state,
    load_rng_state,
    rng_state,
    sharded_state,
    split,
    tensors_of,
)
from megarl.checkpoint.writer import DistWriter, Share, free_bytes
from megarl.config import Config
from megarl.config.running import duration_seconds
from megarl.model.engine import Engine, NonFiniteError
from megarl.observe.run import MODELS_FOLDER, ResumedFrom, Run
from megarl.parallel.collectives import gather_objects
from megarl.parallel.mesh import Mesh
from megarl.weights.hf_files import CheckpointError

POLICY, STREAM = "policy", "stream"
_FINE, _STOP, _ROLLBACK, _ABORT = range(4)
_CALLS = {"fine": _FINE, "rollback": _ROLLBACK, "abort": _ABORT}


class Stateful(Protocol):
    """A part of a loop that a checkpoint keeps."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class _Saving:
    """A save that a thread is writing."""

    step: int
    folder: Path
    share: Share
    written: Future[tuple[list[Any], dict[str, FileEntry]]]
    started: float
    metric: float | None = None


class Checkpoints:
    """The checkpoints of one run. Every method is a collective over all ranks."""

    def __init__(self, cfg: Config, run: Run, mesh: Mesh, **parts: Engine | Stateful) -> None:
        self.cfg, self.run, self.mesh = cfg, run, mesh
        self.engines = {name: part for name, part in parts.items() if isinstance(part, Engine)}
        self.guard = Guard(cfg.guard)
        self.parts: dict[str, Stateful] = {n: p for n, p in parts.items() if not isinstance(p, Engine)}
        self.parts["guard"] = self.guard
        self.root = run.dir / CHECKPOINTS
        self.step = 0  # the last step whose effects the state has
        self.total = 0
        self._writer = DistWriter(mesh.groups.dp_cp)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="megarl-checkpoint")
        self._saving: _Saving | None = None
        self._saved = 0  # the last step that was saved, or is being saved
        self._ending = False  # there will be no later save
        self._refused: list[NonFiniteError] = []
        for engine in self.engines.values():
            engine.refused = self._refused.append
        must = cfg.checkpoint.checkpoint_must_save_by
        self._must_save_by = None if must is None else duration_seconds(must)
        self._longest_step = 0.0

    # ---- what loops call ---------------------------------------------------------------------------------------------

    def resume(self) -> int:
        """Load what the run goes on from, if anything. Returns the last step that is done: 0 for a run that begins."""
        if self.mesh.rank == 0:
            with self._clearing_away():
                for path in disk.leftovers(self.root):
                    disk.remove(path)
        if (found := self.run.resumed) is None:
            return 0
        self._load(found.folder, found.manifest)
        self.step = self._saved = found.manifest.step
        self._tell(found)
        if found.in_place and self.mesh.rank == 0:
            with self._clearing_away():
                for path in disk.finished(self.root):
                    if (disk.step_of(path) or 0) > self.step and not any(str(path) in said for said in found.skipped):
                        path.rename(path.with_name(path.name + f".before-{int(time.time())}"))
                if disk.pointed(self.root) != self.step:
                    disk.point(self.root, self.step)
        dist.barrier(group=self.mesh.host_group)
        return self.step

    @contextlib.contextmanager
    def _clearing_away(self) -> Iterator[None]:
        """Where the disk refuses, the run says so and begins: what its saves come to is `checkpoint.on_save_error`."""
        try:
            yield
        except OSError as reason:
            said = f"what an earlier start left in {self.root} could not be cleared away: {reason}"
            self.run.events(self.step, [said], kind="checkpoint")

    def steps(
        self, total: int, on_rollback: Callable[[], None] = lambda: None, make_room: Callable[[], None] = lambda: None
    ) -> Iterator[int]:
        """The steps that are left of ``total``. ``on_rollback`` is called when older weights were loaded; ``make_room``
        before the whole state is needed between steps, when others may have the memory that it takes."""
        self.total = total
        while self.step < total:
            began = time.monotonic()
            self.step += 1
            yield self.step
            self._longest_step = max(self._longest_step, time.monotonic() - began)  # the clock is asked next
            call = self._look_around()
            if call in (_ROLLBACK, _STOP):
                make_room()
            if call == _ROLLBACK:
                self._roll_back()
                on_rollback()
            if call == _ABORT:
                raise self._end()
            self._longest_step = max(self._longest_step, time.monotonic() - began)
            if call == _STOP:
                self._stop()
                return
        self._complete(wait=True)

    def save_if_due(self, step: int) -> None:
        """Save after this step if ``checkpoint`` says so: every ``save_period`` steps, and at the end; not in between
        after a step whose update was refused, which nothing should go back to."""
        c = self.cfg.checkpoint
        last = step == self.total
        if self._refused and not last:
            return
        if not ((c.save_period and step % c.save_period == 0) or (last and c.save_at_end)):
            return
        with self.run.phase("save"):
            if "model" in c.save_contents:
                self._begin(step)
            if "hf" in c.save_contents:
                self._export(step, last=last)

    # ---- between steps -----------------------------------------------------------------------------------------------

    def _look_around(self) -> int:
        """Publish what is written, ask the guard and the clock, and agree with all ranks on what comes next."""
        if self._saving is not None and self._saving.step == self.step:
            name = self.cfg.checkpoint.metric_name
            self._saving.metric = self.run.reported.get(name) if name else None
        wanted = self._wanted() if self.mesh.rank == 0 else _FINE
        stopping = self.run.stop_requested() is not None
        busy = self._saving is not None and not self._saving.written.done()
        ours = torch.tensor([wanted, int(stopping), int(busy)])
        dist.all_reduce(ours, op=dist.ReduceOp.MAX, group=self.mesh.host_group)
        call, stopping, busy = ours[0].item(), bool(ours[1]), bool(ours[2])
        if self._saving is not None and (not busy or not self.cfg.checkpoint.async_save):
            self._complete(wait=True)
        self._report_refusals()
        if call == _FINE and stopping and self.step < self.total:
            return _STOP
        return int(call)

    def _wanted(self) -> int:
        """Rank 0's view of the step that has ended."""
        verdict, said = self.guard.look(self.run.reported, bool(self._refused))
        self.run.events(self.step, said, kind="guard")
        if verdict == "fine" and self._must_save_by is not None and self.step < self.total:
            left = self._must_save_by - self.run.seconds()
            if left < 1.5 * self._longest_step:
                self.run.request_stop(f"{left:.0f} s are left until checkpoint.checkpoint_must_save_by")
        return _CALLS[verdict]

    def _report_refusals(self) -> None:
        """Say, once for all ranks, whose numbers were not finite."""
        mine = [str(error) for error in self._refused]
        self._refused.clear()
        if not mine:
            return
        everyone = [said for each in gather_objects(mine, self.mesh.host_group) for said in each]
        began = (NonFiniteError.OWN, NonFiniteError.HERE, "")
        culprits = next(found for mark in began if (found := [said for said in everyone if mark in said]))
        self.run.events(self.step, culprits, kind="non-finite")

    def _stop(self) -> None:
        """Save, and let the loop end."""
        why = next(filter(None, gather_objects(self.run.stop_requested(), self.mesh.host_group)), "told to stop")
        self._ending = True
        with self.run.phase("save"):
            self._complete(wait=True)
            if self._saved < self.step and "model" in self.cfg.checkpoint.save_contents:
                self._begin(self.step)
                self._complete(wait=True)
        self.run.stopped = f"stopped after step {self.step} of {self.total} ({why}); the checkpoint is {self.root}"

    def _end(self) -> NonFiniteError:
        self._complete(wait=True)
        return NonFiniteError(
            f"the run ends after step {self.step}: see events.jsonl in {self.run.dir}; the last good checkpoint is of "
            f"step {disk.pointed(self.root) or 0}"
        )

    def _roll_back(self) -> None:
        """Go back to the newest checkpoint before this step that verifies; the data goes on where it is. A checkpoint
        of this step, which a jump may have had, is removed."""
        self._complete(wait=True)
        stream = self.parts[STREAM].state_dict() if STREAM in self.parts else None
        folders = [[path for path in disk.finished(self.root) if (disk.step_of(path) or 0) < self.step]]
        dist.broadcast_object_list(folders, 0, group=self.mesh.host_group)
        for folder in folders[0]:
            manifest, why = verified(folder, self.mesh)
            if manifest is None:
                self.run.events(self.step, [why], kind="checkpoint")
                continue
            rollbacks = self.guard.rollbacks
            self._load(folder, manifest)
            self.guard.rollbacks, self.guard.bad_in_a_row = rollbacks, 0
            if stream is not None:
                self.parts[STREAM].load_state_dict(stream)
            if self.mesh.rank == 0:
                forget(self.root, self.run.dir / MODELS_FOLDER, manifest.step, self.step)
            said = f"back from step {self.step} to {manifest.step}; the data in between is left out"
            self.run.events(self.step, [said], kind="rollback")
            self.step = self._saved = manifest.step
            return
        raise CheckpointError(f"{self.root}: there is no checkpoint before step {self.step} to go back to")

    @contextlib.contextmanager
    def _resident(self) -> Iterator[None]:
        """What is saved or filled is there, wherever it waits between an engine's verbs."""
        with contextlib.ExitStack() as stack:
            for engine in self.engines.values():
                stack.enter_context(engine.residency.on_device("params", "optimizer"))
            yield

    # ---- saving ------------------------------------------------------------------------------------------------------

    def _begin(self, step: int) -> None:
        """Copy the state, and let a thread write it."""
        self._complete(wait=True)
        started = time.monotonic()
        folder = self._new_folder(step)
        if folder is None:
            return
        state: dict[str, Any] = {}
        with self._resident():
            for name, engine in self.engines.items():
                prefix = "" if name == POLICY else f"{name}."
                optimizer = "optimizer" in self.cfg.checkpoint.save_contents
                state |= sharded_state(engine, prefix=prefix, optimizer=optimizer)
            with self.mesh.platform():
                share = self._writer.stage(state, folder)
        own = self._own_state()
        config = OmegaConf.to_yaml(OmegaConf.structured(self.cfg)) if self.mesh.rank == 0 else None
        written = self._thread.submit(_write, share, own, config, self.mesh.rank)
        self._saving = _Saving(step, folder, share, written, started)
        self._saved = step
        self.run.later({"checkpoint/blocking_s": time.monotonic() - started})

    def _new_folder(self, step: int) -> Path | None:
        """The folder to write in, the same on all ranks; None (and an event) where it cannot be made."""
        made: list[Any] = [None, None]
        if self.mesh.rank == 0:
            try:
                made = [disk.begin(self.root, step), None]
            except OSError as reason:
                made = [None, str(reason)]
        dist.broadcast_object_list(made, 0, group=self.mesh.host_group)
        if made[1] is not None:
            self._failed(step, "checkpoint", made[1])
        return made[0]

    def _own_state(self) -> bytes:
        """All of this rank that is not sharded."""
        tree = {
            "rng": rng_state(),
            "engines": {name: engine_state(engine) for name, engine in self.engines.items()},
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }
        said, tensors = split(tree)
        return safetensors_bytes(tensors, metadata={"state": disk.json.dumps(said)})

    def _complete(self, *, wait: bool) -> None:
        """Publish the save that is in flight, once all ranks have written; with an error on any, remove it."""
        if (saving := self._saving) is None or not (wait or saving.written.done()):
            return
        self._saving = None
        results: list[Any] = []
        entries: dict[str, FileEntry] = {}
        error = None
        try:
            results, entries = saving.written.result()
        except Exception as reason:  # whatever a rank's disk says, all ranks have to hear of it
            error = f"rank {self.mesh.rank}: {type(reason).__name__}: {reason}"
        gathered: list[Any] | None = [None] * self.mesh.world_size if self.mesh.rank == 0 else None
        dist.gather_object((results, entries, error), gathered, 0, group=self.mesh.host_group)
        outcome: list[str | None] = [None]
        if gathered is not None:
            outcome = [self._publish(saving, gathered)]
        dist.broadcast_object_list(outcome, 0, group=self.mesh.host_group)
        if outcome[0] is not None:
            self._failed(saving.step, "checkpoint", outcome[0])
            return
        self._prune(saving.step)
        seconds = time.monotonic() - saving.started
        self.run.later({"checkpoint/total_s": seconds, "checkpoint/step": float(saving.step)})

    def _publish(self, saving: _Saving, gathered: list[Any]) -> str | None:
        """Rank 0: tie the ranks' files together, and give the checkpoint its name. Returns what went wrong; then
        nothing of it stays on the disk, which may be full."""
        errors = [error for _, _, error in gathered if error]
        try:
            if errors:
                raise OSError(errors[0])
            files = {name: entry for _, entries, _ in gathered for name, entry in entries.items()}
            files |= DistWriter.finish(saving.share, [results for results, _, _ in gathered])
            manifest = Manifest(
                step=saving.step,
                total_steps=self.total,
                length=length_of(self.cfg),
                layout=layout_of(self.mesh),
                metric=saving.metric,
                contents=[what for what in self.cfg.checkpoint.save_contents if what != "hf"],
                files=files,
            )
            disk.publish(saving.folder, manifest)
        except Exception as reason:  # the other ranks wait to hear of it
            if not saving.folder.exists():  # it has its name: only what comes after failed, which no resume reads
                self.run.events(saving.step, [f"{disk.name_of(saving.step)} is whole, but: {reason}"], "checkpoint")
                return None
            with contextlib.suppress(OSError):
                disk.remove(saving.folder)
            return errors[0] if errors else f"rank 0: {type(reason).__name__}: {reason}"
        return None

    def _prune(self, newest: int) -> None:
        """Remove what is not kept any more. What the disk does not let go of is no reason to end a run."""
        if self.mesh.rank == 0:
            try:
                prune(self.root, self.run.dir / MODELS_FOLDER, self.cfg.checkpoint, newest)
            except OSError as reason:
                said = f"after step {newest} was saved, what is not kept any more could not be removed: {reason}"
                self.run.events(newest, [said], kind="checkpoint")

    def _failed(self, step: int, what: str, why: str) -> None:
        """A checkpoint or export could not be written. The one before is untouched; whether the run goes on is
        `checkpoint.on_save_error`, unless it is to end now."""
        said = f"the {what} of step {step} was not written: {why}; {free_bytes(self.run.dir):,} bytes are free in "
        said += f"{self.run.dir}; the last whole checkpoint is of step {disk.pointed(self.root) or 0}"
        if what == "checkpoint":
            self._saved = min(self._saved, step - 1)
        self.run.events(step, [said], kind="checkpoint")
        if self.cfg.checkpoint.on_save_error == "stop" or step == self.total or self._ending:
            raise CheckpointError(said)

    def _export(self, step: int, *, last: bool) -> None:
        """The policy as a Hugging Face directory under the run's folder."""
        policy = self.engines[POLICY]
        target = self.run.dir / MODELS_FOLDER / ("final" if last else export_name(step))
        try:
            policy.save_hf(target, self.cfg.weight_sync.bucket_size_mb << 20)
        except OSError as reason:  # the same on all ranks
            self._failed(step, "export", f"{target}: {reason}")
            return
        if "model" not in self.cfg.checkpoint.save_contents:
            self._prune(step)

    # ---- loading -----------------------------------------------------------------------------------------------------

    def _load(self, folder: Path, manifest: Manifest) -> None:
        """From a checkpoint that is `verified`. Only tensors are asked for: objects would be unpickled."""
        state: dict[str, Any] = {}
        with self._resident():
            for name, engine in self.engines.items():
                state |= tensors_of(sharded_state(engine, prefix="" if name == POLICY else f"{name}."))
            with self.mesh.platform(), torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch's, of the names by which megatron calls it
                dist_checkpointing.load(state, str(folder), validate_access_integrity=False)
        same = manifest.layout == layout_of(self.mesh)
        own = _read_own(folder / rank_file(self.mesh.rank if same else 0))
        for name, engine in self.engines.items():
            load_engine_state(engine, own["engines"][name])
        for name, part in self.parts.items():
            if name not in own["parts"]:
                raise CheckpointError(
                    f"{folder}: holds no {name!r}, which this recipe has; it has {list(own['parts'])}"
                )
            part.load_state_dict(own["parts"][name])
        if same:  # elsewhere the generators begin anew from run.seed
            load_rng_state(own["rng"])

    def _tell(self, found: ResumedFrom) -> None:
        for why in found.skipped:
            self.run.console.note(f"  skipped a checkpoint: {why}")
        self.run.events(found.manifest.step, [f"skipped: {why}" for why in found.skipped], kind="resume")
        self.run.console.note(f"resumed from step {found.manifest.step}: {found.folder}")
        if different := changes(found.folder, self.cfg):
            self.run.console.note("  with other settings than it was made with: " + "; ".join(different))


def layout_of(mesh: Mesh) -> dict[str, int]:
    """Sizes of the groups; the same sizes put the same things on the same ranks."""
    sizes = {"tp": mesh.tp_size, "pp": mesh.pp_size, "dp": mesh.dp_size, "ep": mesh.ep_size, "etp": mesh.etp_size}
    return sizes | {"world": mesh.world_size}


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def _write(share: Share, own: bytes, config: str | None, rank: int) -> tuple[list[Any], dict[str, FileEntry]]:
    """In the thread: everything this rank has to put on the disk."""
    results, entries = DistWriter.write(share)
    entries[rank_file(rank)] = disk.write_file(share.folder / rank_file(rank), own)
    if config is not None:
        entries[CONFIG] = disk.write_file(share.folder / CONFIG, config.encode())
    return results, entries


def _read_own(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        said = disk.json.loads(file.metadata()["state"])
    return join(said, tensors)
