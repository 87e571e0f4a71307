"""Logits of a checkpoint in megatron-core and in transformers, from one process, as a command would ask for them."""

import json
import shutil
import subprocess
import sys

import pytest

from megarl.cli import main

COMPARE = "import sys; from megarl.model.compare import compare_logits; print(compare_logits(*sys.argv[1:]).equal)"


def compared(first, second) -> str:
    run = subprocess.run([sys.executable, "-c", COMPARE, str(first), str(second)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_same_model_same_logits(tiny_hf):
    path = tiny_hf("qwen3", head_dim=32)
    assert compared(path, path).endswith("True\n")


@pytest.mark.slow
def test_perfect_weights_under_a_wrong_config_are_seen(tiny_hf, tmp_path):
    right = tiny_hf("qwen3", head_dim=32)
    wrong = tmp_path / "wrong"
    shutil.copytree(right, wrong)
    config = json.loads((wrong / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 77.0
    (wrong / "config.json").write_text(json.dumps(config))
    assert compared(right, wrong).endswith("False\n")


# Exit code of each comparison; what it says is on a line of JSON.
VERIFY = """
import sys
from megarl.cli import main
hf, *megatron = sys.argv[1:]
print([main(["convert", "verify", "--logits", hf, each]) for each in megatron])
"""


def test_verify_compares_logits_of_a_megatron_checkpoint(tiny_hf, tmp_path):
    """One layer, so the default of two is one too many. The second has another config beside the same weights."""
    hf, right, wrong = tiny_hf("qwen2", num_hidden_layers=1), tmp_path / "right", tmp_path / "wrong"
    assert main(["convert", "hf2mcore", str(hf), str(right)]) == 0
    shutil.copytree(right, wrong)
    config = json.loads((wrong / "hf" / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 77.0
    (wrong / "hf" / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-c", VERIFY, str(hf), str(right), str(wrong)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    *lines, codes = run.stdout.splitlines()
    same, other = (json.loads(line) for line in lines if line.startswith("{"))
    assert codes == "[0, 1]"
    assert same["equal"] and same["layers"] == 1 and same["between"] == 0 and same["megatron"] < 1e-5 < same["std"]
    assert not other["equal"] and min(other["between"], other["megatron"]) > 1e-3
