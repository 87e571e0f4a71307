"""torch_dist checkpoints written and read by our own code.

That megatron-core reads them, and we what it writes, is in ``distributed/test_mcore_reads.py``; what may be wrong with
one in ``test_torch_dist_faults.py``.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megarl.convert.inert_pickle import Record
from megarl.convert.torch_dist_chunk import frame, parse
from megarl.convert.torch_dist_reader import TRACKER, TorchDistReader
from megarl.convert.torch_dist_writer import (
    MAX_CHUNK_BYTES,
    ChunkFile,
    FileRecord,
    StoredTensor,
    TorchDistWriter,
    row_chunks,
)
from megarl.weights.hf_files import CheckpointError
from tests.torch_dist_cases import TENSORS, read_all, save


@pytest.fixture
def saved(tmp_path) -> Path:
    return save(tmp_path / "iter_0000003", files=2)


def test_what_is_written_is_read(saved):
    found = read_all(saved.parent)  # through the tracker file
    assert all(torch.equal(found[key], tensor) and found[key].dtype == tensor.dtype for key, tensor in TENSORS.items())
    assert (saved.parent / TRACKER).read_text() == "3"
    reader = TorchDistReader(saved)
    assert reader.iteration == 3 and reader.common() == {"iteration": 3} and reader.objects() == set()
    assert torch.equal(reader.read("a.weight", rows=slice(3, 8)), TENSORS["a.weight"][3:8])
    assert torch.equal(reader.read("stack", (1, 2), slice(1, 3)), TENSORS["stack"][1, 2, 1:3])
    out = torch.zeros(4, 5)
    assert reader.read("stack", (0, 1), out=out) is out and torch.equal(out, TENSORS["stack"][0, 1].float())
    assert not list(saved.parent.glob("*incomplete*"))


def test_torch_itself_reads_it(saved):
    from torch.distributed import checkpoint

    state = {key: torch.zeros_like(tensor) for key, tensor in TENSORS.items()}
    checkpoint.load(state, checkpoint_id=saved, no_dist=True)
    assert all(torch.equal(state[key], tensor) for key, tensor in TENSORS.items())


def test_what_torch_saves_is_read(tmp_path):
    """Whole tensors in one chunk each, behind the checksums that torch.save writes."""
    from torch.distributed import checkpoint

    checkpoint.save(dict(TENSORS), checkpoint_id=tmp_path / "d", no_dist=True)
    (tmp_path / "d" / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    found = read_all(tmp_path / "d")
    assert all(torch.equal(found[key], tensor) for key, tensor in TENSORS.items())


def test_one_chunk_is_read_without_a_copy(saved):
    reader = TorchDistReader(saved)
    (piece,) = reader.pieces("a.weight", rows=slice(2, 4))
    again = reader.read("a.weight", rows=slice(2, 4))
    assert piece.view.data_ptr() == again.data_ptr() and piece.rows == slice(0, 2) and piece.columns == slice(0, 5)


def test_release_and_the_newer_common_state(tmp_path):
    common = {"iteration": 0, "args": Namespace(num_layers=4)}
    writer = TorchDistWriter(tmp_path / "release", [], ["x._extra_state/shard_0_2", "x._extra_state/shard_1_2"])
    folder = writer.finish([], common, core_version=(0, 19))
    assert (tmp_path / TRACKER).read_text() == "release"
    for state in range(2):  # from common.pt, then without it
        reader = TorchDistReader(tmp_path)
        said = reader.common()
        assert reader.iteration == "release" and said["iteration"] == 0
        assert isinstance(said["args"], Record) and said["args"].fields() == {"num_layers": 4}
        assert "common_state/shard_0_1" in reader.objects(), state
        assert reader.read_object("x._extra_state/shard_1_2") is None
        (folder / "common.pt").unlink(missing_ok=True)
    with open(folder / "common.pt", "wb") as file:
        file.write(b"PK\3\4 nothing")
    with pytest.raises(CheckpointError, match=r"common\.pt: damaged"):
        TorchDistReader(tmp_path).common()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16, torch.int64])
@pytest.mark.parametrize("sizes", [(1,), (3, 5), (1, 2, 7, 64)])
def test_a_chunk_is_what_torch_load_reads(dtype, sizes):
    tensor = torch.arange(torch.Size(sizes).numel()).view(sizes).to(dtype)
    around = frame(dtype, sizes, "w", (2,))
    chunk = around.head + tensor.view(torch.uint8).numpy().tobytes() + around.tail
    read = torch.load(io.BytesIO(chunk), weights_only=True)
    assert torch.equal(read, tensor) and read.dtype == dtype and read.shape == sizes
    numbers = parse(io.BytesIO(chunk))
    assert (numbers.start, numbers.sizes, numbers.dtype) == (len(around.head), sizes, dtype)
    assert numbers.whose == b"w [2]"
    assert numbers.start % 64 == 0


def test_parts_are_written_from_where_they_are(tmp_path):
    """Rows from several places, one of them a transposed view larger than what is copied at once."""
    writer = TorchDistWriter(tmp_path / "d", [StoredTensor("w", (3000, 4000), torch.float32)])
    file = writer.chunk_file(0)
    turned = torch.arange(2998 * 4000.0).view(4000, 2998).T
    above, below = torch.full((1, 4000), -1.0), torch.full((1, 4000), -2.0)
    file.write("w", (0, 0), (3000, 4000), [above, turned, below])
    folder = writer.finish([file.finish()], {})
    assert torch.equal(TorchDistReader(folder).read("w"), torch.cat([above, turned, below]))


def test_many_small_parts(tmp_path):
    rows = torch.arange(3000.0).view(3000, 1)
    writer = TorchDistWriter(tmp_path / "d", [StoredTensor("w", (3000, 1), torch.float32)])
    file = writer.chunk_file(0)
    file.write("w", (0, 0), (3000, 1), [row[None] for row in rows])
    assert torch.equal(TorchDistReader(writer.finish([file.finish()], {})).read("w"), rows)


def test_row_chunks():
    assert [(s.start, s.stop) for s in row_chunks(10, 100, 300)] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert [(s.start, s.stop) for s in row_chunks(2, 1000, 300)] == [(0, 1), (1, 2)]
    assert MAX_CHUNK_BYTES == 64 * 2**20


def test_what_is_not_whole_is_not_finished(tmp_path):
    declared = [StoredTensor("a", (4, 3), torch.float32), StoredTensor("b", (2,), torch.float32)]

    def attempt(write: Callable[[ChunkFile], None], change: Callable[[FileRecord, Path], FileRecord] | None = None):
        writer = TorchDistWriter(tmp_path / "iter_0000001", declared)
        file = writer.chunk_file(0)
        write(file)
        record = file.finish()
        record = change(record, writer.folder) if change else record
        writer.finish([record], {})

    def whole(file: ChunkFile) -> None:
        file.write("a", (0, 0), (4, 3), torch.zeros(4, 3))
        file.write("b", (0,), (2,), torch.zeros(2))

    def cut(record: FileRecord, folder: Path) -> FileRecord:
        os.truncate(folder / record.name, record.nbytes - 1)
        return record

    def write_a_only(file: ChunkFile) -> None:
        file.write("a", (0, 0), (4, 3), torch.zeros(4, 3))

    def again(file: ChunkFile) -> None:
        whole(file)
        file.write("a", (1, 0), (1, 3), torch.zeros(1, 3))

    def stranger(file: ChunkFile) -> None:
        whole(file)
        file.write("c", (0,), (1,), torch.zeros(1))

    def half(file: ChunkFile) -> None:
        write_a_only(file)
        file.write("b", (0,), (2,), torch.zeros(2, dtype=torch.bfloat16))

    for write, change, said in [
        (write_a_only, None, "b: no chunk covers 0:2"),
        (again, None, "a: chunks .* overlap"),
        (stranger, None, "c: not declared"),
        (half, None, "b: a chunk of bfloat16 in a tensor of float32"),
        (whole, cut, "bytes were written|were written"),
    ]:
        with pytest.raises(CheckpointError, match=said):
            attempt(write, change)
        assert not (tmp_path / "iter_0000001").exists() and not (tmp_path / TRACKER).exists()
        with pytest.raises(CheckpointError, match="did not finish"):
            TorchDistReader(tmp_path / "iter_0000001.incomplete")
    attempt(whole)
    with pytest.raises(CheckpointError, match="exists already"):
        attempt(whole)
    with pytest.raises(ValueError, match="are no chunk"):
        ChunkFile(tmp_path, 5).write("a", (0, 0), (4, 3), torch.zeros(3, 3))


def test_workers_and_resume(tmp_path):
    """Records travel as JSON; a second attempt keeps the first one's files and drops what no record names."""
    declared = [StoredTensor("a", (4, 3), torch.float32)]
    writer = TorchDistWriter(tmp_path / "iter_0000001", declared)
    file = writer.chunk_file(0)
    file.write("a", (0, 0), (2, 3), torch.ones(2, 3))
    kept = json.dumps(file.finish().to_json())
    ChunkFile(writer.folder, 7).write("a", (2, 0), (2, 3), torch.zeros(2, 3))  # interrupted: no record
    resumed = TorchDistWriter(tmp_path / "iter_0000001", declared, resume=True)
    other = resumed.chunk_file(1)
    other.write("a", (2, 0), (2, 3), torch.full((2, 3), 2.0))
    folder = resumed.finish([FileRecord.from_json(json.loads(kept)), other.finish()], {})
    assert sorted(path.name for path in folder.glob("*.distcp")) == ["__0_0.distcp", "__1_0.distcp"]
    assert TorchDistReader(folder).read("a")[:, 0].tolist() == [1, 1, 2, 2]
    again = TorchDistWriter(folder, declared, overwrite=True)
    file = again.chunk_file(0)
    file.write("a", (0, 0), (4, 3), torch.full((4, 3), 3.0))
    assert TorchDistReader(folder).read("a")[0, 0] == 1  # the old one stays until the new one is whole
    again.finish([file.finish()], {})
    assert TorchDistReader(folder).read("a")[:, 0].tolist() == [3, 3, 3, 3]


MEMORY = """
import sys, torch
from megarl.convert.torch_dist_reader import TorchDistReader
from megarl.convert.torch_dist_writer import StoredTensor, TorchDistWriter, row_chunks

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024

folder, rows = sys.argv[1], 48 * 1024
before = peak = anonymous()
writer = TorchDistWriter(folder + "/a", [StoredTensor("w", (rows, 4096), torch.bfloat16)])
file = writer.chunk_file(0)
for part in row_chunks(rows, 8192):
    count = part.stop - part.start
    file.write("w", (part.start, 0), (count, 4096), torch.ones(count, 4096, dtype=torch.bfloat16))
    peak = max(peak, anonymous())
reader = TorchDistReader(writer.finish([file.finish()], {}))
copy = TorchDistWriter(folder + "/b", [StoredTensor("w", (rows, 4096), torch.bfloat16)])
file = copy.chunk_file(0)
read = anonymous()
for part in row_chunks(rows, 8192, 10 << 20):
    pieces = [piece.view for piece in reader.pieces("w", rows=part)]
    file.write("w", (part.start, 0), (part.stop - part.start, 4096), pieces)
    read = max(read, anonymous())
copy.finish([file.finish()], {})
print(peak - before, read - before)
"""


def test_memory_is_bounded_by_a_chunk(tmp_path):
    """384 MB written from 64-MB chunks, and copied from the mapped file without any of them."""
    said = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True)
    written, copied = map(float, said.stdout.split())
    assert written < 64 + 40 and copied < 64 + 40
    shutil.rmtree(tmp_path / "a")
