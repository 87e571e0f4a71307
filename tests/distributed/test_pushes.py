"""Pushes of every family to vLLM, and exports that vLLM serves: see `push_ranks.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PUSHES = [
    "dense TP2 to TP1",
    "dense PP2 to TP2",
    "tied TP2 to TP2",
    "qwen3_moe EP2 to TP1",
    "qwen3_moe EP2 to TP2",
    "mixtral EP2 to TP2",
    "deepseek_v2 EP2 to TP1",
    "deepseek_v3 EP2 to TP1",
    "deepseek_v3 EP2 to TP2",
    "gpt_oss EP2 to TP1",
    "quantised qwen3",
]
SERVED = [
    "llama",
    "mistral",
    "qwen2",
    "qwen2-tied",
    "qwen3",
    "seed_oss",
    "qwen3_moe",
    "mixtral",
    "deepseek_v2",
    "deepseek_v2-groups",
    "deepseek_v3",
    "deepseek_v3-yarn",
    "gpt_oss",
]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("cases", [PUSHES, [f"greedy {model}" for model in SERVED]], ids=["push", "export"])
def test_vllm_computes_what_megatron_computes(tmp_path: Path, cases: list[str]) -> None:
    script = Path(__file__).parent / "push_ranks.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [*command, str(tmp_path), *cases], capture_output=True, text=True, timeout=580, env=environment
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-6000:]
    assert run.stdout.count("all cases passed") == 2
