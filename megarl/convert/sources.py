"""A checkpoint of either format as canonical tensors: what conversions and comparisons read.

`open_source` looks which format a folder has. A source lists its problems before anything is read, and gives the rows
of a canonical tensor as blocks: views of mapped files where nothing has to be computed.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megarl.convert.arguments import disagreements
from megarl.convert.manifest import MANIFEST, Entry, Hash, Manifest, dtype_name, entry_in_file, raw_bytes, read_manifest
from megarl.convert.torch_dist_names import StoredNames, detect, master_keys
from megarl.convert.torch_dist_reader import TorchDistReader
from megarl.model.family import ModelSpec, read_spec
from megarl.weights.hf_files import CheckpointError, HFCheckpoint, Stored, read_json
from megarl.weights.rules import CanonTensor, Shard
from megarl.weights.shard import Segment, row_segments

CHUNK_BYTES = 64 << 20  # the most of a tensor that is in memory at a time
HF_FOLDER = "hf"  # beside the iterations of a Megatron checkpoint: config.json, tokenizer
_SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class Block:
    """Rows from ``start`` on of a canonical tensor; of a 2-D one perhaps some ``columns`` only. Not to be written."""

    start: int
    columns: slice | None
    view: torch.Tensor


def rows_per_chunk(shape: tuple[int, ...], itemsize: int) -> int:
    """How many rows of a tensor make a chunk of at most `CHUNK_BYTES`."""
    row = torch.Size(shape[1:]).numel() * itemsize
    return max(1, min(shape[0], CHUNK_BYTES // max(row, 1)))


def refuse(what: str, problems: list[str]) -> None:
    """Raise CheckpointError with the first 20 problems, if there are any."""
    if problems:
        more = [f"... and {len(problems) - _SHOWN_PROBLEMS} more"] if len(problems) > _SHOWN_PROBLEMS else []
        raise CheckpointError("\n  ".join([what, *problems[:_SHOWN_PROBLEMS], *more]))


def check_rules(tensors: list[CanonTensor]) -> None:
    """Assert that rules fill every row of every tensor once, on both sides."""
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in tensors:
        shapes |= tensor.hf_shapes()
    visits: dict[tuple[str, int | None], np.ndarray] = {}
    for tensor in tensors:
        assert sum(run.rows for run in tensor.runs) == tensor.shape[0], f"{tensor.name}: its runs are not its rows"
        for run in tensor.runs:
            own = shapes[run.hf][1:] if run.index is not None else shapes[run.hf]
            seen = visits.setdefault((run.hf, run.index), np.zeros(own[-1] if run.transposed else own[0], np.uint8))
            seen[run.start : run.start + run.rows * run.step : run.step] += 1
    for (name, index), seen in visits.items():
        assert (seen == 1).all(), f"rules fill rows of {name} {index} not exactly once"


@dataclass
class HFSource:
    """A Hugging Face directory; quantised weights are dequantised as they are read."""

    path: Path
    spec: ModelSpec
    checkpoint: HFCheckpoint
    manifest: Manifest | None

    def problems(self) -> list[str]:
        """Every tensor of the model is there in its shape, in one dtype per canonical tensor, and nothing else is."""
        self.checkpoint.check()
        tensors = self.spec.tensors()
        wanted: dict[str, tuple[int, ...]] = {}
        for tensor in tensors:
            wanted |= tensor.hf_shapes()
        repeated = self.repeated()
        for name, original in repeated.items():
            wanted[name] = wanted[original]
        present = {name for name in self.checkpoint.names() if not self.spec.passes_over(name)}
        index = self.path
        out = [f"{index}: {name} is missing" for name in sorted(wanted.keys() - present - repeated.keys())]
        out += [f"{self.file(n)}: {n} is no part of {self.spec.family.name}" for n in sorted(present - wanted.keys())]
        for name in sorted(wanted.keys() & present):
            if (shape := self.checkpoint.shape(name)) != wanted[name]:
                out.append(f"{self.file(name)}: {name} has shape {shape}, config.json says {wanted[name]}")
        if out:
            return out
        for tensor in tensors:
            dtypes = {name: dtype_name(self.checkpoint.dtype(name)) for name in tensor.hf_shapes()}
            if len(set(dtypes.values())) > 1:
                out.append(f"{self.path}: parts of one tensor have different dtypes: {dtypes}")
        return out + [
            f"{self.file(name)}: {name} repeats {original}, but is not equal to it"
            for name, original in repeated.items()
            if name in present and not self._equal(name, original)
        ]

    def repeated(self) -> dict[str, str]:
        """{name: name of the tensor it repeats}: copies that may be there, and that nothing is read from."""
        copies = self.spec.duplicates()
        if self.spec.tied:
            copies = {name: self._tied(of) for name, of in copies.items()} | {
                "lm_head.weight": self._tied("lm_head.weight")
            }
        return copies

    def _tied(self, name: str) -> str:
        return "model.embed_tokens.weight" if name == "lm_head.weight" else name

    def _equal(self, name: str, other: str) -> bool:
        """Whether two matrices hold the same bytes."""
        rows, columns = self.checkpoint.shape(name)
        step = rows_per_chunk((rows, columns), self.checkpoint.dtype(name).itemsize)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            a, b = (self.checkpoint.read(Segment(n, part, part, slice(0, columns))) for n in (name, other))
            if not same_bits(a, b):
                return False
        return True

    def file(self, name: str) -> Path:
        return self.checkpoint.stored(name)[0].file

    def where(self, tensor: CanonTensor) -> str:
        return ", ".join(f"{name} in {self.file(name).name}" for name in tensor.hf_shapes())

    def rows_stored(self, tensor: CanonTensor) -> int:
        """Rows with vocabulary padding, which these checkpoints have none of."""
        return tensor.shape[0]

    def dtype(self, tensor: CanonTensor) -> torch.dtype:
        return self.checkpoint.dtype(tensor.runs[0].hf)

    def blocks(self, tensor: CanonTensor, start: int, stop: int) -> Iterator[Block]:
        """The rows from ``start`` to ``stop``, in blocks."""
        for segment in row_segments(tensor, start, stop, local=start):
            yield Block(segment.local_rows.start, segment.columns, self.checkpoint.read(segment))

    def stored_names(self, tensor: CanonTensor) -> list[str]:
        """Entries of the manifest that this tensor is read from."""
        return [part.name for name in tensor.hf_shapes() for part in self.checkpoint.stored(name)]

    def all_stored_names(self) -> list[str]:
        return list(self._stored)

    def entry(self, stored: str) -> Entry:
        """Shape, dtype and hash of a stored tensor."""
        part = self._stored[stored]
        return entry_in_file(part.file, part.offset, part.shape, part.dtype)

    @functools.cached_property
    def _stored(self) -> dict[str, Stored]:
        return {part.name: part for name in self.checkpoint.names() for part in self.checkpoint.stored(name)}

    def where_stored(self, stored: str) -> str:
        return str(self._stored[stored].file)

    def identity(self) -> dict[str, Any]:
        return fingerprint(self.path)

    def close(self) -> None:
        self.checkpoint.close()


@dataclass
class MegatronSource:
    """An iteration of a torch_dist checkpoint; its weights, or with ``masters`` the optimizer's fp32 copies of them (a
    weight that is fp32 itself needs none)."""

    path: Path
    spec: ModelSpec
    reader: TorchDistReader
    names: StoredNames
    manifest: Manifest | None
    masters: dict[str, str] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)  # hashes are checked while others read

    def problems(self) -> list[str]:
        """Every tensor of the model is there in its shape, and nothing else is; with masters, every one has its own;
        and the checkpoint was trained as config.json says."""
        try:
            self.names.check(self.reader.keys(), self.reader.path)
        except CheckpointError as problem:
            return [str(problem)]
        out = [f"{self.path}: {each}" for each in disagreements(self.reader.common(), self.spec)]
        if self.masters is None:
            return out
        keys = {place.key for t in self.spec.tensors() if not t.keep_fp32 for place in self.names.places(t)}
        stored = self.reader.keys()
        lacking = sorted(key for key in keys - self.masters.keys() if stored[key][1] != torch.float32)
        return out + [f"{self.path}: {key} has no fp32 master" for key in lacking]

    def where(self, tensor: CanonTensor) -> str:
        return ", ".join(f"{place.key}{list(place.index) or ''}" for place in self.names.places(tensor))

    def rows_stored(self, tensor: CanonTensor) -> int:
        """Rows with vocabulary padding."""
        if tensor.shard is not Shard.VOCAB:
            return tensor.shape[0]
        shape, _ = self.reader.keys()[self.names.places(tensor)[0].key]
        return shape[0]

    def dtype(self, tensor: CanonTensor) -> torch.dtype:
        dtypes = {self.reader.keys()[self._key(place.key)][1] for place in self.names.places(tensor)}
        if len(dtypes) > 1:
            raise CheckpointError(f"{self.path}: {self.where(tensor)} have different dtypes: {dtypes}")
        return dtypes.pop()

    def _key(self, key: str) -> str:
        return (self.masters or {}).get(key, key)

    def blocks(self, tensor: CanonTensor, start: int, stop: int) -> Iterator[Block]:
        """The rows from ``start`` to ``stop``, in blocks. The padding of a vocabulary may be among them."""
        for place in self.names.places(tensor):
            end = stop if tensor.shard is Shard.VOCAB else place.stop
            low, high = max(start, place.start), min(stop, end)
            if low < high:
                rows = slice(low - place.start, high - place.start)
                with self.lock:
                    pieces = list(self.reader.pieces(self._key(place.key), place.index, rows))
                for piece in pieces:
                    yield Block(low + piece.rows.start, piece.columns, piece.view)

    def stored_names(self, tensor: CanonTensor) -> list[str]:
        return [tensor.name]

    def all_stored_names(self) -> list[str]:
        return [tensor.name for tensor in self.spec.tensors()]

    def entry(self, stored: str) -> Entry:
        """Shape, dtype and hash of a canonical tensor, padding included."""
        tensor = self._tensors[stored]
        rows = self.rows_stored(tensor)
        hashed = Hash()
        step = rows_per_chunk((rows, *tensor.shape[1:]), self.dtype(tensor).itemsize)
        for start in range(0, rows, step):
            hashed.update(raw_bytes(gather(self, tensor, start, min(start + step, rows))))
        return Entry((rows, *tensor.shape[1:]), dtype_name(self.dtype(tensor)), hashed.hexdigest())

    @functools.cached_property
    def _tensors(self) -> dict[str, CanonTensor]:
        return {tensor.name: tensor for tensor in self.spec.tensors()}

    def where_stored(self, stored: str) -> str:
        places = self.names.places(self._tensors[stored])
        files = {file for place in places for file in self.reader.files(self._key(place.key), place.index)}
        return f"{self.path}: {', '.join(sorted(files))}"

    def identity(self) -> dict[str, Any]:
        return fingerprint(self.path)

    def close(self) -> None:
        self.reader.close()


Source = HFSource | MegatronSource


def gather(source: Source, tensor: CanonTensor, start: int, stop: int) -> torch.Tensor:
    """Rows of a canonical tensor in one piece: a view of the mapped file where they lie so."""
    shape = (stop - start, *tensor.shape[1:])
    out: torch.Tensor | None = None
    for block in source.blocks(tensor, start, stop):
        if block.view.shape == shape and block.view.is_contiguous():
            return block.view
        out = torch.empty(shape, dtype=source.dtype(tensor)) if out is None else out
        put(block, out, start)
    assert out is not None, f"{tensor.name}: no rows from {start} to {stop}"
    return out


def put(block: Block, out: torch.Tensor, start: int) -> None:
    """Copy a block to its place in ``out``, whose first row is row ``start`` of the tensor."""
    rows = out[block.start - start : block.start - start + block.view.shape[0]]
    (rows if block.columns is None else rows[:, block.columns]).copy_(block.view)


def fingerprint(folder: Path) -> dict[str, Any]:
    """What tells that a source is still the same: its place, and size and time of its files."""
    stats = {file.name: file.stat() for file in sorted(folder.iterdir()) if file.is_file()}
    files = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    return {"source": str(folder.resolve()), "files": files}


def check_source(source: Source, tensor: CanonTensor) -> None:
    """Compare what ``tensor`` is read from with the source's manifest, if it has one.

    Raises CheckpointError naming file and tensor where a hash differs: the data was damaged after it was written.
    """
    if source.manifest is None or (isinstance(source, MegatronSource) and source.masters is not None):
        return
    for stored in source.stored_names(tensor):
        if problem := damage(source, source.manifest, stored):
            raise CheckpointError(problem)


def damage(source: Source, manifest: Manifest, stored: str) -> str | None:
    """What is wrong with a stored tensor according to the manifest; None where nothing is."""
    said = manifest.tensors.get(stored)
    if said is None:
        return f"{source.where_stored(stored)}: {stored} is not in {MANIFEST}"
    found = source.entry(stored)
    if (found.shape, found.dtype) != (said.shape, said.dtype):
        return f"{source.where_stored(stored)}: {stored} is {found.dtype} {found.shape}, {MANIFEST} says {said}"
    if found.xxh3_128 != said.xxh3_128:
        return f"{source.where_stored(stored)}: {stored} has other bytes than {MANIFEST} says: damaged or changed"
    return None


def is_hf(path: Path) -> bool:
    """Whether a folder is a Hugging Face directory; any other is taken for a Megatron checkpoint."""
    return (path / "config.json").is_file() or any(path.glob("*.safetensors"))


def open_source(
    path: Path,
    config_from: Path | None = None,
    *,
    keep_mtp: bool = True,
    from_master: bool = False,
    part: str | None = None,
) -> Source:
    """Open a checkpoint of either format.

    ``config_from`` is the HF directory whose config.json describes a Megatron checkpoint that has none beside it.
    Without ``keep_mtp`` its multi-token-prediction layers are passed over. ``part``: not the policy but the model of
    that name, such as ``critic``. Raises CheckpointError, or what `read_spec` raises.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    if is_hf(path):
        if part is not None:
            raise CheckpointError(f"{path}: a Hugging Face directory has no part {part}")
        spec = _spec(path)
        return HFSource(path, spec if keep_mtp else spec.without_mtp(), HFCheckpoint(path), read_manifest(path))
    reader = TorchDistReader(path)
    config = config_folder(reader.path, config_from)
    spec = _spec(config)
    if not keep_mtp:
        spec = dataclasses.replace(spec.without_mtp(), mtp_in_checkpoint=max(spec.mtp_in_checkpoint, 1))
    names = detect(spec, reader.keys(), reader.path, part)
    masters = master_keys(reader.keys()) if from_master else None
    return MegatronSource(reader.path, names.spec, reader, names, read_manifest(reader.path), masters)


def _spec(folder: Path) -> ModelSpec:
    read_json(folder / "config.json")  # says what is wrong with a file that is missing or damaged
    return read_spec(folder)


def config_folder(iteration: Path, config_from: Path | None = None) -> Path:
    """The folder with the config.json of a Megatron checkpoint: ``config_from``, or ``hf/`` in it or beside it."""
    candidates = [config_from] if config_from else [iteration / HF_FOLDER, iteration.parent / HF_FOLDER]
    for folder in candidates:
        if (folder / "config.json").is_file():
            return folder
    looked = " or ".join(str(folder / "config.json") for folder in candidates)
    raise CheckpointError(f"{iteration}: there is no {looked}; --config-from names the model's Hugging Face directory")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same bytes: equal NaNs are equal, and 0.0 is not -0.0."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(as_bits(a), as_bits(b))


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers as integers of their width."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
