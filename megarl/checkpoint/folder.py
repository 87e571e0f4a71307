"""Training checkpoints on the disk: whole or absent, every file with its hash, the newest that verifies is taken.

``<run>/checkpoints/iter_0000010`` is the checkpoint after step 10, as Megatron names it; beside it the file `POINTER`
holds the newest step, and `BEST` the one with the best metric. A checkpoint is written in ``iter_0000010.incomplete``;
when all of its files are on the disk, so is a manifest with their sizes and hashes (XXH3 of 128 bits); then the folder
gets its name by one rename, and the pointer is replaced by another. A process killed at any moment leaves the
checkpoint before, or this one, and `leftovers`, which the next run removes. Only rank 0 calls what changes names here.

Nothing here knows torch or megatron. Errors are OSError, with the path; `Broken` is a checkpoint that does not verify.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from megarl import __version__

CHECKPOINTS = "checkpoints"
POINTER = "latest_checkpointed_iteration.txt"
BEST = "best_checkpointed_iteration.txt"
MANIFEST = "megarl_checkpoint.json"
CONFIG = "config.yaml"
_UNFINISHED = ".incomplete"
_REPLACED = ".replaced"
_NAME = re.compile(r"iter_(\d{7,})")
_AT_ONCE = 1 << 22


class Broken(ValueError):
    """A checkpoint that is not what was written. The message names the file."""


@dataclass(frozen=True)
class FileEntry:
    """One file: its size, and the hash of its content."""

    bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    step: int
    total_steps: int
    length: dict[str, int | None]  # run.max_num_steps and run.max_num_epochs it was to run for
    layout: dict[str, int]  # sizes of the parallel groups that wrote it
    metric: float | None  # checkpoint.metric_name at this step
    contents: list[str]
    files: dict[str, FileEntry]
    tool: str = field(default=f"megarl {__version__}")

    def as_json(self) -> str:
        """Text with a hash of itself, so that damage to the manifest is found too."""
        said = dataclasses.asdict(self)
        return json.dumps(said | {"xxh3_128": _hash_of(said)}, indent=1)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises Broken."""
        path = folder / MANIFEST
        try:
            said = json.loads(path.read_text())
            claimed = said.pop("xxh3_128")
            if claimed != _hash_of(said):
                raise Broken(f"{path}: its content is not what was written (its own hash differs)")
            files = {name: FileEntry(**entry) for name, entry in said.pop("files").items()}
            return cls(files=files, **said)
        except Broken:
            raise
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as reason:
            raise Broken(f"{path}: no manifest can be read: {reason!r}") from reason


def _hash_of(said: dict[str, Any]) -> str:
    return str(xxhash.xxh3_128_hexdigest(json.dumps(said, sort_keys=True).encode()))


# ---- names -----------------------------------------------------------------------------------------------------------


def name_of(step: int) -> str:
    return f"iter_{step:07d}"


def step_of(folder: Path) -> int | None:
    """The step of a finished checkpoint's folder; None for any other name."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def finished(root: Path) -> list[Path]:
    """Checkpoints that have their name, newest first."""
    if not root.is_dir():
        return []
    steps = {step: path for path in root.iterdir() if (step := step_of(path)) is not None}
    return [steps[step] for step in sorted(steps, reverse=True)]


def leftovers(root: Path) -> list[Path]:
    """What a killed run did not finish writing, replacing or removing. Only while no other run writes here."""
    if not root.is_dir():
        return []
    endings = (_UNFINISHED, _REPLACED, ".tmp")
    return sorted(path for path in root.iterdir() if path.name.endswith(endings))


def pointed(root: Path, pointer: str = POINTER) -> int | None:
    """The step that the pointer names; None without a pointer, or with one that is damaged."""
    try:
        return int((root / pointer).read_text())
    except (OSError, ValueError):
        return None


# ---- writing ---------------------------------------------------------------------------------------------------------


def begin(root: Path, step: int) -> Path:
    """A new, empty folder to write the checkpoint of ``step`` in."""
    folder = root / (name_of(step) + _UNFINISHED)
    remove(folder)
    folder.mkdir(parents=True)
    return folder


class HashedFile:
    """A binary file that is only appended to, hashed on the way. `close` waits for the disk; then `entry`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb", buffering=0)
        self._hash = xxhash.xxh3_128()
        self._bytes = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._hash.update(view)
        left = view
        with _naming(self.path):
            while len(left):  # an unbuffered write may take a part
                left = left[self._file.write(left) :]
        self._bytes += len(view)
        return len(view)

    def tell(self) -> int:
        return self._bytes

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        if not self._file.closed:
            try:
                with _naming(self.path):
                    os.fsync(self._file.fileno())
            finally:
                self._file.close()

    def entry(self) -> FileEntry:
        return FileEntry(self._bytes, self._hash.hexdigest())

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Give an OSError of a descriptor the name of its file."""
    try:
        yield
    except OSError as reason:
        raise OSError(reason.errno, reason.strerror, str(path)) from reason


def write_file(path: Path, data: bytes) -> FileEntry:
    """Write one file and wait until it is on the disk."""
    with HashedFile(path) as file:
        file.write(data)
    return file.entry()


def publish(folder: Path, manifest: Manifest) -> Path:
    """Give a checkpoint that is on the disk its manifest, its name, and the pointer. Returns its folder."""
    root = folder.parent
    target = root / name_of(manifest.step)
    write_file(folder / MANIFEST, manifest.as_json().encode())
    _sync(folder)
    replaced = target.with_name(target.name + _REPLACED)
    if target.exists():  # after a rollback a step is saved a second time
        remove(replaced)
        os.rename(target, replaced)
    os.rename(folder, target)
    _sync(root)
    point(root, manifest.step)
    remove(replaced)
    return target


def point(root: Path, step: int, pointer: str = POINTER) -> None:
    """Let the pointer name a step, at once or not at all."""
    new = root / (pointer + ".tmp")
    write_file(new, str(step).encode())
    os.replace(new, root / pointer)
    _sync(root)


def discard(folder: Path) -> None:
    """Remove a finished checkpoint. It loses its name first: no half of it is ever taken for a checkpoint."""
    doomed = folder.with_name(folder.name + _REPLACED)
    remove(doomed)
    os.rename(folder, doomed)
    remove(doomed)


def remove(folder: Path) -> None:
    """Remove a folder or file, if it is there."""
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- reading ---------------------------------------------------------------------------------------------------------


def check_listing(folder: Path, manifest: Manifest) -> None:
    """Every file of the manifest lies in the folder and has its size, and no other is there. Raises Broken."""
    for name, entry in manifest.files.items():
        path = folder / name
        if Path(name).name != name or path.is_symlink():
            raise Broken(f"{folder / MANIFEST}: names {name!r}, which is not a plain file of this folder")
        if not path.is_file():
            raise Broken(f"{path}: is missing")
        if (size := path.stat().st_size) != entry.bytes:
            raise Broken(f"{path}: has {size:,} bytes, {entry.bytes:,} were written")
    if strange := sorted(path.name for path in folder.iterdir() if path.name not in {MANIFEST, *manifest.files}):
        raise Broken(f"{folder / strange[0]}: does not belong to the checkpoint")


def check_content(folder: Path, names: Iterable[str], manifest: Manifest) -> None:
    """The files ``names`` hold what was written. Raises Broken."""
    for name in names:
        if (found := hash_file(folder / name)) != manifest.files[name].xxh3_128:
            raise Broken(f"{folder / name}: its content is not what was written (XXH3 {found})")


def verify(folder: Path, share: tuple[int, int] = (0, 1)) -> Manifest:
    """The manifest of a checkpoint that verifies; raises Broken. ``share`` = (k, n) hashes every n-th file only: n
    readers divide the work, of which each has to succeed."""
    manifest = Manifest.read(folder)
    if manifest.step != step_of(folder):
        raise Broken(f"{folder / MANIFEST}: is of step {manifest.step}")
    check_listing(folder, manifest)
    largest_first = sorted(manifest.files, key=lambda name: (-manifest.files[name].bytes, name))
    check_content(folder, largest_first[share[0] :: share[1]], manifest)
    return manifest


def hash_file(path: Path) -> str:
    hashed = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_AT_ONCE))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            hashed.update(buffer[:count])
    return str(hashed.hexdigest())


# ---- retention -------------------------------------------------------------------------------------------------------


def kept(
    metrics: Mapping[int, float | None], *, keep_last: int, keep_every: int, keep_top_k: int, higher_is_better: bool
) -> set[int]:
    """Which of the steps with a checkpoint (and the metric each had) stay: the newest ``keep_last`` (always one), every
    multiple of ``keep_every``, and the ``keep_top_k`` with the best metric, the newer where two are equal."""
    steps = sorted(metrics)
    keep = set(steps[-max(keep_last, 1) :])
    if keep_every:
        keep |= {step for step in steps if step % keep_every == 0}
    return keep | set(ranked(metrics, higher_is_better)[:keep_top_k])


def ranked(metrics: Mapping[int, float | None], higher_is_better: bool) -> list[int]:
    """The steps that have a metric, best first, the newer where two are equal. A metric that is no number is none."""
    measured = {step: value for step, value in metrics.items() if value is not None and value == value}
    return sorted(measured, key=lambda step: (measured[step] if higher_is_better else -measured[step], step))[::-1]
