"""megatron-core's own dist_checkpointing, in real ranks, against `megarl convert`: bitwise in both directions.

``megarl/convert`` imports no megatron and starts no process group, so this is where the format itself is proven. The
ranks run under torchrun, because saving starts processes, which those of a pool may not. With another megatron-core
first on PYTHONPATH (``tests/test_compat.py``) it is that one's format.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megarl.cli import main
from megarl.convert import hf2mcore
from megarl.convert.inert_pickle import Record
from megarl.convert.torch_dist_names import StoredNames, detect
from megarl.convert.torch_dist_reader import TorchDistReader
from megarl.model.family import read_spec
from megarl.weights.shard import row_segments
from tests.convert_cases import assert_same, load_hf, save_hf
from tests.distributed.mcore_cases import MASTER_SCALE, numbers

SCRIPT = Path(__file__).with_name("mcore_cases.py")
ROOT = Path(__file__).parents[2]
CORE = importlib.metadata.version("megatron-core")
CHANGES: dict[str, dict[str, Any]] = {"llama": {}, "qwen3_moe": {"mlp_only_layers": []}}
# Layouts (TP, PP, EP) that megatron-core saves at; what it reads it reads at all of `mcore_cases.LAYOUTS`.
SAVED_AT = {
    "llama-stacked": [(1, 1, 1), (2, 2, 1)],
    "llama-layers": [(2, 1, 1), (1, 4, 1)],
    "qwen3_moe-stacked": [(1, 1, 2)],
    "qwen3_moe-layers": [(2, 2, 1), (1, 1, 2)],
}


def hugging_face(config: Path, folder: Path) -> Path:
    """A bf16 directory of a model whose canonical tensors are `numbers`, which the ranks know too."""
    folder.mkdir()
    shutil.copyfile(config / "config.json", folder / "config.json")
    tensors: dict[str, torch.Tensor] = {}
    for tensor in read_spec(folder).tensors():
        whole = numbers(tensor, torch.bfloat16)
        for name, shape in tensor.hf_shapes().items():
            tensors.setdefault(name, torch.empty(shape, dtype=whole.dtype))
        for part in row_segments(tensor, 0, tensor.shape[0]):
            part.view(tensors[part.hf]).copy_(whole[part.local_rows])
    save_hf(folder, tensors)
    return folder


def hf2mcore_as(model: Path, target: Path, stacked: bool) -> Path:
    """In chunks of few rows, the vocabulary padded as for TP 2."""
    keys = "--stacked-keys" if stacked else "--per-layer-keys"
    options = ["--layers", "local", keys, "--core-version", CORE, "--iteration", "7"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf2mcore, "CHUNK_BYTES", 7 * 128)
        command = ["convert", "hf2mcore", str(model), str(target), *options, "--target-tensor-parallel-size", "2"]
        assert main(command) == 0
    folder = target / "iter_0000007"
    if tuple(map(int, CORE.split(".")[:2])) >= (0, 19):
        (folder / "common.pt").unlink()  # what such a core reads is then the newer common state
    return folder


pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def scratch(tiny_hf: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of both models, stacked and layer by layer: ``ours-*`` read by megatron-core, ``core-*`` written."""
    scratch = tmp_path_factory.mktemp("mcore")
    jobs: list[dict[str, Any]] = []
    for family, changes in CHANGES.items():
        model = hugging_face(tiny_hf(family, **changes), scratch / f"hf-{family}")
        for stacked in (True, False):
            common = {"model": str(model), "stacked": stacked}
            kind = f"{family}-{'stacked' if stacked else 'layers'}"
            ours = hf2mcore_as(model, scratch / f"ours-{kind}", stacked)
            jobs.append(common | {"do": "read", "folder": str(ours), "dtype": "bfloat16", "strict": "raise_all"})
            for number, layout in enumerate(SAVED_AT[kind]):
                core = scratch / f"core-{kind}-{number}"
                jobs.append(common | {"do": "write", "folder": str(core), "layout": layout})
    (scratch / "jobs.json").write_text(json.dumps(jobs))
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", str(SCRIPT)]
    done = subprocess.run([*launch, str(scratch)], env=environment, capture_output=True, text=True)
    (scratch / "output").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return scratch


@pytest.mark.parametrize("kind", ["stacked", "layers"])
@pytest.mark.parametrize("family", CHANGES)
def test_megatron_reads_ours(scratch: Path, family: str, kind: str) -> None:
    """Strictly: nothing missing, nothing left over. The ranks compared every parameter, see `read_with_megatron`."""
    said = (scratch / "output").read_text()
    layouts = ["1, 1, 1", "2, 1, 1", "2, 2, 1", "1, 4, 1"] + (["1, 1, 2"] if family == "qwen3_moe" else [])
    for layout in layouts:
        assert f"read ours-{family}-{kind} at TP, PP, EP ({layout})" in said
    assert f"all cases passed with megatron-core {CORE}" in said


@pytest.mark.parametrize("kind, number", [(kind, k) for kind, layouts in SAVED_AT.items() for k in range(len(layouts))])
def test_we_read_megatrons(scratch: Path, tmp_path: Path, kind: str, number: int) -> None:
    """By the command: the model's weights, and the optimizer's fp32 ones, which bf16 could not hold."""
    model, core = scratch / f"hf-{kind.partition('-')[0]}", scratch / f"core-{kind}-{number}"
    weights = load_hf(model)
    masters = {name: tensor.float() * MASTER_SCALE for name, tensor in weights.items()}
    for wanted, options in ((weights, []), (masters, ["--from-master"])):
        target = tmp_path / f"back{len(options)}"
        assert main(["convert", "mcore2hf", str(core), str(target), "--config-from", str(model), *options]) == 0
        assert_same(wanted, load_hf(target))
    spec = read_spec(model)
    reader = TorchDistReader(core)
    names = detect(spec, reader.keys(), reader.path)
    assert names.stacked == kind.endswith("stacked")
    common = reader.common()
    assert common["iteration"] == 9 and isinstance(common["args"], Record)
    assert common["args"].fields()["num_layers"] == spec.num_layers
    local = StoredNames(spec, "local", names.stacked)
    assert {key for key in reader.objects() if "_extra_state" in key} == set(local.extra_states())
