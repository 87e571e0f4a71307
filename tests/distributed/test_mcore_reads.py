"""megatron-core's own dist_checkpointing, in real ranks, against our reader and writer: bitwise in both directions.

``megarl/convert`` imports no megatron and starts no process group, so this is where the format itself is proven. The
ranks run under torchrun, because saving starts processes, which those of a pool may not. With another megatron-core
first on PYTHONPATH (``tests/test_compat.py``) it is that one's format.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megarl.convert.inert_pickle import Record
from megarl.convert.torch_dist_names import StoredNames, detect, master_keys
from megarl.convert.torch_dist_reader import TorchDistReader
from megarl.convert.torch_dist_writer import StoredTensor, TorchDistWriter, row_chunks
from megarl.model.family import ModelSpec, read_spec
from megarl.weights.rules import Shard
from megarl.weights.shard import padded_vocab
from tests.distributed.mcore_cases import MASTER_SCALE, numbers

SCRIPT = Path(__file__).with_name("mcore_cases.py")
ROOT = Path(__file__).parents[2]
CORE = tuple(map(int, importlib.metadata.version("megatron-core").split(".")[:2]))
CHANGES: dict[str, dict[str, Any]] = {"llama": {}, "qwen3_moe": {"mlp_only_layers": []}}
SAVED_AT = {"llama": [(2, 2, 1), (1, 1, 1)], "qwen3_moe": [(2, 2, 1), (1, 1, 2)]}  # stacked; layer by layer


def write(folder: Path, spec: ModelSpec, names: StoredNames, core_version: tuple[int, int]) -> None:
    """In chunks of few rows and in two files, the vocabulary padded as for TP 2."""
    padded = padded_vocab(spec.vocab_size, 2)
    declared = [StoredTensor(key, shape, torch.bfloat16) for key, shape in names.shapes(padded).items()]
    writer = TorchDistWriter(folder, declared, names.extra_states())
    files = [writer.chunk_file(0), writer.chunk_file(1)]
    for count, tensor in enumerate(spec.tensors()):
        whole = numbers(tensor, torch.bfloat16)
        if tensor.shard is Shard.VOCAB:
            whole = torch.cat([whole, whole.new_zeros(padded - whole.shape[0], whole.shape[1])])
        key, index = names.stored(tensor.name)
        for rows in row_chunks(whole.shape[0], row_bytes=128, limit=7 * 128):
            part = whole[rows]
            offsets = (*index, rows.start, *[0] * (whole.dim() - 1))
            files[count % 2].write(key, offsets, (*[1] * len(index), *part.shape), part)
    writer.finish([file.finish() for file in files], {"iteration": 7, "checkpoint_version": 3.0}, core_version)
    if core_version >= (0, 19):
        (folder / "common.pt").unlink()  # what such a core reads is then the newer common state


@pytest.fixture(scope="module")
def scratch(tiny_hf: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of both models, stacked and layer by layer: ``ours-*`` read by megatron-core, ``core-*`` written."""
    scratch = tmp_path_factory.mktemp("mcore")
    jobs: list[dict[str, Any]] = []
    for family, changes in CHANGES.items():
        model = tiny_hf(family, **changes)
        for stacked, layout in zip((True, False), SAVED_AT[family], strict=True):
            common = {"model": str(model), "stacked": stacked}
            kind = f"{family}-{'stacked' if stacked else 'layers'}"
            ours, core = scratch / f"ours-{kind}", scratch / f"core-{kind}"
            write(ours, read_spec(model), StoredNames(read_spec(model), "local", stacked), CORE)
            jobs.append(common | {"do": "read", "folder": str(ours), "dtype": "bfloat16", "strict": "raise_all"})
            jobs.append(common | {"do": "write", "folder": str(core), "layout": layout})
    (scratch / "jobs.json").write_text(json.dumps(jobs))
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", str(SCRIPT)]
    done = subprocess.run([*launch, str(scratch)], env=environment, capture_output=True, text=True)
    (scratch / "output").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return scratch


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["stacked", "layers"])
@pytest.mark.parametrize("family", CHANGES)
def test_megatron_reads_ours(scratch: Path, family: str, kind: str) -> None:
    """Strictly: nothing missing, nothing left over. The ranks compared every parameter, see `read_with_megatron`."""
    said = (scratch / "output").read_text()
    layouts = ["1, 1, 1", "2, 1, 1", "2, 2, 1", "1, 4, 1"] + (["1, 1, 2"] if family == "qwen3_moe" else [])
    for layout in layouts:
        assert f"read ours-{family}-{kind} at TP, PP, EP ({layout})" in said
    version = importlib.metadata.version("megatron-core")
    assert f"all cases passed with megatron-core {version}" in said


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["stacked", "layers"])
@pytest.mark.parametrize("family", CHANGES)
def test_we_read_megatrons(scratch: Path, tiny_hf: Callable[..., Path], family: str, kind: str) -> None:
    spec = read_spec(tiny_hf(family, **CHANGES[family]))
    reader = TorchDistReader(scratch / f"core-{family}-{kind}")
    reader.check(reader.keys())
    names = detect(spec, reader.keys(), reader.path)
    names.check(reader.keys(), reader.path)
    assert names.stacked == (kind == "stacked")
    masters = master_keys(reader.keys())
    for tensor in spec.tensors():
        (place,) = names.places(tensor)
        rows = slice(0, tensor.shape[0])  # without the vocabulary's padding
        wanted = numbers(tensor, torch.bfloat16)
        assert torch.equal(reader.read(place.key, place.index, rows), wanted), tensor.name
        master = reader.read(masters[place.key], place.index, rows)
        assert master.dtype == torch.float32 and torch.equal(master, wanted.float() * MASTER_SCALE), tensor.name
    common = reader.common()
    assert common["iteration"] == 9 and isinstance(common["args"], Record)
    assert common["args"].fields()["num_layers"] == spec.num_layers
    local = StoredNames(spec, "local", names.stacked)
    assert {key for key in reader.objects() if "_extra_state" in key} == set(local.extra_states())
