"""Logits of a checkpoint in megatron-core and in transformers, from one process, as a command would ask for them."""

import json
import shutil
import subprocess
import sys

COMPARE = "import sys; from megarl.model.compare import compare_logits; print(compare_logits(*sys.argv[1:]).equal)"


def compared(first, second) -> str:
    run = subprocess.run([sys.executable, "-c", COMPARE, str(first), str(second)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_same_model_same_logits(tiny_hf):
    path = tiny_hf("qwen3", head_dim=32)
    assert compared(path, path).endswith("True\n")


def test_perfect_weights_under_a_wrong_config_are_seen(tiny_hf, tmp_path):
    right = tiny_hf("qwen3", head_dim=32)
    wrong = tmp_path / "wrong"
    shutil.copytree(right, wrong)
    config = json.loads((wrong / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 77.0
    (wrong / "config.json").write_text(json.dumps(config))
    assert compared(right, wrong).endswith("False\n")
