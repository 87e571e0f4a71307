"""Everything that may be wrong with a torch_dist checkpoint: an error naming file and key, never other numbers."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from megarl.convert.inert_pickle import Record, read_pickle
from megarl.convert.torch_dist_chunk import parse
from megarl.convert.torch_dist_reader import TRACKER, TorchDistReader
from megarl.convert.torch_dist_writer import StoredTensor, TorchDistWriter
from megarl.weights.hf_files import CheckpointError
from tests.torch_dist_cases import TENSORS, change_metadata, read_all, save


@pytest.fixture
def saved(tmp_path) -> Path:
    return save(tmp_path / "iter_0000003", files=2)


def distcp(folder: Path) -> Path:
    return folder / "__1_0.distcp"


def shorten(path: Path, keep: int) -> None:
    os.truncate(path, keep)


def remove_chunk(metadata: Any) -> None:
    metadata.state_dict_metadata["a.weight"].chunks.pop(1)


def repeat_chunk(metadata: Any) -> None:
    chunks = metadata.state_dict_metadata["a.weight"].chunks
    chunks.append(chunks[2])


def overlap_chunks(metadata: Any) -> None:
    metadata.state_dict_metadata["a.weight"].chunks[0].sizes = torch.Size((3, 5))


def forget_place(metadata: Any) -> None:
    del metadata.storage_data[next(index for index in metadata.storage_data if index.fqn == "a.weight")]


def swap_places(metadata: Any) -> None:
    """Two chunks of different tensors, each where the other is."""
    one, two = (next(i for i in metadata.storage_data if i.fqn == key) for key in ("a.weight", "b.bias"))
    data = metadata.storage_data
    data[one], data[two] = data[two], data[one]


def share_bytes(metadata: Any) -> None:
    one, two = [index for index in metadata.storage_data if index.fqn == "a.weight"][:2]
    metadata.storage_data[one] = metadata.storage_data[two]


def leave_folder(metadata: Any) -> None:
    next(info for info in metadata.storage_data.values()).relative_path = "../../etc/passwd"


def grow_shape(metadata: Any) -> None:
    metadata.state_dict_metadata["a.weight"].size = torch.Size((14, 5))


def change_dtype(metadata: Any) -> None:
    metadata.state_dict_metadata["a.weight"].properties.dtype = torch.float16


FAULTS = {
    "metadata.json missing": (lambda d: (d / "metadata.json").unlink(), r"metadata\.json is missing.*did not finish"),
    "metadata.json of another backend": (
        lambda d: (d / "metadata.json").write_text('{"sharded_backend": "zarr"}'),
        "zarr",
    ),
    "metadata.json damaged": (lambda d: (d / "metadata.json").write_text("{"), r"metadata\.json: damaged"),
    ".metadata missing": (lambda d: (d / ".metadata").unlink(), r"\.metadata is missing"),
    ".metadata truncated": (lambda d: shorten(d / ".metadata", 300), r"\.metadata: damaged"),
    ".metadata empty": (lambda d: shorten(d / ".metadata", 0), r"\.metadata: damaged"),
    "file missing": (lambda d: distcp(d).unlink(), r"__1_0\.distcp is missing; it holds a part of \S+"),
    "file renamed": (lambda d: distcp(d).rename(d / "__2_0.distcp"), r"__1_0\.distcp is missing"),
    "file truncated": (
        lambda d: shorten(distcp(d), distcp(d).stat().st_size - 64),
        r"__1_0\.distcp: truncated: \d+ bytes, but b\.bias ends",
    ),
    "files swapped": (
        lambda d: [
            distcp(d).rename(d / "x"),
            (d / "__0_0.distcp").rename(distcp(d)),
            (d / "x").rename(d / "__0_0.distcp"),
        ],
        r"__0_0\.distcp: truncated: \d+ bytes, but stack ends",
    ),
    "chunk missing": (lambda d: change_metadata(d, remove_chunk), r"a\.weight: no chunk covers 4:6 of axis 0"),
    "chunk twice": (lambda d: change_metadata(d, repeat_chunk), r"a\.weight: chunk \[8:10, 0:5\] is there twice"),
    "chunks overlap": (lambda d: change_metadata(d, overlap_chunks), r"a\.weight: chunks .* overlap"),
    "place missing": (lambda d: change_metadata(d, forget_place), r"a\.weight: chunk .* is stored nowhere"),
    "places swapped": (lambda d: change_metadata(d, swap_places), r"distcp: a\.weight .*the file has shape \(2,\)"),
    "bytes shared": (
        lambda d: change_metadata(d, share_bytes),
        r"distcp: chunks of a\.weight and a\.weight share bytes",
    ),
    "outside": (lambda d: change_metadata(d, leave_folder), "outside of the checkpoint"),
    "misshapen": (lambda d: change_metadata(d, grow_shape), r"a\.weight: no chunk covers 12:14"),
    "another dtype": (lambda d: change_metadata(d, change_dtype), r"a\.weight .*float16: the file has .*float32"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(saved, fault):
    break_it, said = FAULTS[fault]
    break_it(saved)
    with pytest.raises(CheckpointError, match=said):
        read_all(saved)


def test_files_alike_that_changed_places(tmp_path):
    """As the files of two workers may be: each chunk has the shape it should have, but is another's."""
    tensors = {"a": torch.zeros(4, 3), "b": torch.ones(4, 3)}
    declared = [StoredTensor(key, (4, 3), torch.float32) for key in tensors]
    writer = TorchDistWriter(tmp_path / "d", declared)
    records = []
    for number, (key, tensor) in enumerate(tensors.items()):
        file = writer.chunk_file(number)
        file.write(key, (0, 0), (4, 3), tensor)
        records.append(file.finish())
    folder = writer.finish(records, {})
    (folder / "__0_0.distcp").rename(folder / "x")
    (folder / "__1_0.distcp").rename(folder / "__0_0.distcp")
    (folder / "x").rename(folder / "__1_0.distcp")
    with pytest.raises(
        CheckpointError, match=r"__0_0\.distcp: a \[0:4, 0:3\]: the file has another part there: b \[0, 0\]"
    ):
        TorchDistReader(folder).read("a")


def test_flipped_bits_in_the_frame_or_metadata_are_no_other_numbers(saved):
    """Flip one bit anywhere but in the numbers themselves (no checksum covers those): an error, or the same tensors."""
    numbers = []
    reader = TorchDistReader(saved)
    for span in reader._spans.values():
        found = parse(io.BytesIO((saved / span.file).read_bytes()[span.offset : span.offset + span.length]))
        start = span.offset + found.start
        numbers.append((span.file, start, start + found.count * found.dtype.itemsize))
    generator = torch.Generator().manual_seed(0)
    errors = 0
    for file in ("__0_0.distcp", "__1_0.distcp", ".metadata"):
        whole = (saved / file).read_bytes()
        for _ in range(60):
            at = int(torch.randint(len(whole), (1,), generator=generator))
            if any(name == file and start <= at < stop for name, start, stop in numbers):
                continue
            flipped = bytearray(whole)
            flipped[at] ^= 1 << int(torch.randint(8, (1,), generator=generator))
            (saved / file).write_bytes(flipped)
            try:
                found = read_all(saved)
            except CheckpointError:
                errors += 1
            else:
                for key in set(found) & set(TENSORS):
                    same = found[key].shape == TENSORS[key].shape and torch.equal(found[key], TENSORS[key])
                    assert same, f"{file}, byte {at}: {key} read differently"
        (saved / file).write_bytes(whole)
    assert errors > 20


def test_flipped_numbers_are_found_where_torch_wrote_a_checksum(tmp_path):
    from torch.distributed import checkpoint

    folder = tmp_path / "d"
    checkpoint.save({"w": torch.full((64, 64), 1.5)}, checkpoint_id=folder, no_dist=True)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    (file,) = folder.glob("*.distcp")
    data = bytearray(file.read_bytes())
    at = data.find(torch.full((2,), 1.5).numpy().tobytes()) + 400
    data[at] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"distcp: w \[0:64, 0:64\]: its numbers are damaged"):
        TorchDistReader(folder).read("w")
    assert TorchDistReader(folder, check_crc=False).read("w").shape == (64, 64)


def test_missing_keys_and_entries(saved):
    reader = TorchDistReader(saved)
    with pytest.raises(CheckpointError, match=r"\.metadata: c\.weight is missing"):
        reader.read("c.weight")
    for index in ((), (0,), (2, 0), (0, 3), (0, -1)):
        with pytest.raises(CheckpointError, match=r"stack of shape .* has no entry"):
            reader.read("stack", index)
    with pytest.raises(CheckpointError, match="names iter_0000009, which is not there"):
        (saved.parent / TRACKER).write_text("9\n")
        TorchDistReader(saved.parent)
    with pytest.raises(CheckpointError, match="neither an iteration"):
        (saved.parent / TRACKER).write_text("../x")
        TorchDistReader(saved.parent)


class Exploit:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['EXPLOITED']}",)


def test_hostile_pickles_do_not_run(saved, tmp_path, monkeypatch):
    proof = tmp_path / "exploited"
    monkeypatch.setenv("EXPLOITED", str(proof))
    torch.save({"iteration": 3, "args": Exploit()}, saved / "common.pt")
    said = TorchDistReader(saved).common()
    assert said["iteration"] == 3 and isinstance(said["args"], Record)
    (saved / ".metadata").write_bytes(pickle.dumps(Exploit()))
    with pytest.raises(CheckpointError, match=r"\.metadata: damaged"):
        TorchDistReader(saved)
    said = read_pickle(pickle.dumps({"x": [Exploit(), eval]}))
    assert said["x"][0].kind == "posix.system" and said["x"][1].name == "builtins.eval"
    assert not proof.exists()


def test_classes_of_older_cores_need_not_exist(saved):
    """Cores up to 0.15 pickled a class of their own; its state is that of torch's Metadata."""
    module = types.ModuleType("megatron_of_old")
    from torch.distributed.checkpoint.metadata import Metadata

    module.MCoreMetadata = type("MCoreMetadata", (Metadata,), {"__module__": "megatron_of_old"})
    sys.modules["megatron_of_old"] = module
    try:
        old = pickle.loads((saved / ".metadata").read_bytes())
        new = module.MCoreMetadata(old.state_dict_metadata, old.planner_data, old.storage_data)
        new.mcore_data = {"a.weight": {"nd_reformulated_orig_global_shape": (12, 5)}}
        (saved / ".metadata").write_bytes(pickle.dumps(new))
    finally:
        del sys.modules["megatron_of_old"]
    assert torch.equal(TorchDistReader(saved).read("a.weight"), TENSORS["a.weight"])
