"""A live model as a Hugging Face directory: every rank writes whole files, straight from the exchange into the mapped
file."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import torch

from megarl.convert.manifest import HF, Entry, Manifest, describe, entry
from megarl.model.family import ModelSpec, as_classifier
from megarl.parallel.collectives import gather_objects
from megarl.parallel.mesh import Mesh
from megarl.weights.hf_writer import HFDirectory, HFTensor, OpenFile, PlannedFile, plan_files
from megarl.weights.plan import EVERYTHING, Box, Holders, Item, Needs, with_copies
from megarl.weights.rules import CanonTensor
from megarl.weights.stream import Deal, WeightStream

MAX_FILE_BYTES = 5 << 30
T = TypeVar("T")


def save_hf(
    stream_of: Callable[[Deal], WeightStream],
    spec: ModelSpec,
    mesh: Mesh,
    path: str | Path,
    carry_from: str | Path,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    overwrite: bool = False,
) -> None:
    """Write what transformers and vLLM load. A collective over all ranks.

    ``stream_of`` gives the model's tensors to the ranks that this says. Files are dealt to ranks in turn, replicas
    included. A rank gets the tensors of one of its files at a time, and of no other rank's. Config and tokenizer come
    from ``carry_from``, and a manifest says each tensor's hash; the directory has its name only when all of it is on
    disk. Raises OSError, on all ranks, where the disk of any refuses it: then nothing of it stays, and a directory that
    was there before is untouched.
    """
    files: list[PlannedFile] = []

    def deal(items: list[Item], holders: Holders) -> tuple[list[Item], Needs]:
        items = with_copies(items, spec.duplicates())
        files.extend(plan_files([HFTensor(i.name, i.shape, i.dtype) for i in items], max_file_bytes))
        writer = {t.name: k % mesh.world_size for k, file in enumerate(files) for t in file.tensors}

        def needs(position: int, tensor: CanonTensor, name: str) -> Box | None:
            return EVERYTHING if writer[name] == mesh.replica_ranks[position] else None

        return _side_by_side(items, files, mesh.world_size), needs

    stream = stream_of(deal)
    directory = HFDirectory(path, files, overwrite=overwrite)
    try:
        _together(mesh, directory.begin if mesh.rank == 0 else None)
        written = _together(mesh, lambda: _write(stream, directory))
        entries = {name: said for each in written if each for name, said in each.items()}
        options = {"max_file_bytes": max_file_bytes, "layout": mesh.describe()}
        manifest = Manifest(HF, describe(spec), f"a model in training, from {carry_from}", options, entries)

        def finish() -> None:
            manifest.write(directory.partial)
            directory.finish(carry_from, config_changes=_changes(spec))

        _together(mesh, finish if mesh.rank == 0 else None)
    except OSError:
        if mesh.rank == 0:
            shutil.rmtree(directory.partial, ignore_errors=True)  # of a disk that may be full
        raise


def _together(mesh: Mesh, work: Callable[[], T] | None) -> list[T | None]:
    """Let this rank work, if it has work, and wait for all. Returns what it came to on each rank. Raises OSError on
    every rank if it was raised on one."""
    error, value = None, None
    try:
        if work is not None:
            value = work()
    except OSError as reason:
        error = f"rank {mesh.rank}: {reason}"
    everywhere = gather_objects((error, value), mesh.host_group)
    if errors := [said for said, _ in everywhere if said]:
        raise OSError(errors[0])
    return [value for _, value in everywhere]


def _changes(spec: ModelSpec) -> dict[str, Any]:
    """What config.json says otherwise than the source's."""
    dropped = spec.mtp_in_checkpoint > spec.mtp_num_layers
    changes: dict[str, Any] = {"num_nextn_predict_layers": spec.mtp_num_layers} if dropped else {}
    return changes | (as_classifier(spec.family.hf_architectures[0]) if spec.scalar_head else {})


def _side_by_side(items: list[Item], files: list[PlannedFile], world_size: int) -> list[Item]:
    """Tensors in the order in which they travel: those of as many files as there are ranks, in turn, so that all ranks
    write at the same time."""
    by_name = {item.name: item for item in items}
    out = []
    for first in range(0, len(files), world_size):
        for row in zip_longest(*(file.tensors for file in files[first : first + world_size])):
            out += [by_name[tensor.name] for tensor in row if tensor is not None]
    return out


def _write(stream: WeightStream, directory: HFDirectory) -> dict[str, Entry]:
    """Fill this rank's files, one after the other, each on disk before the next begins. Returns their tensors' hashes,
    of what the files hold. An OSError waits for the end of the stream, which all ranks have to take part in; the space
    was taken before, so that filling itself needs none."""
    file_of = {tensor.name: file for file in directory.files for tensor in file.tensors}
    being_filled: dict[str, OpenFile] = {}
    left: Counter[str] = Counter()
    entries: dict[str, Entry] = {}
    error: OSError | None = None

    def place(name: str) -> torch.Tensor:
        file = file_of[name]
        if file.name not in being_filled:
            assert not being_filled, f"{file.name} begins while {list(being_filled)} is being filled"
            being_filled[file.name] = file.open(directory.partial)
            left[file.name] = len(file.tensors)
        return being_filled[file.name].tensor(name)

    for name, _ in stream.tensors(place):
        file = file_of[name].name
        entries[name] = entry(being_filled[file].tensor(name))
        left[file] -= 1
        if left[file] == 0:
            try:
                being_filled.pop(file).finish()
            except OSError as reason:
                error = error or reason
    if error is not None:
        raise error
    assert not being_filled, f"tensors that did not come: {left}"
    return entries
