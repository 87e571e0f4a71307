"""A model's directory may bring Python code. It runs where the config says so, and nowhere else."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CANARY = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path({canary!r}).touch()
class Canary(PreTrainedTokenizerFast):
    pass
"""
LOAD = """
import sys
from megarl.config import ModelConfig
from megarl.data.reading import DataError
from megarl.data.tokenizer import load_tokenizer
try:
    print(type(load_tokenizer(ModelConfig(path=sys.argv[1], trust_remote_code=sys.argv[2] == "true"))).__name__)
except DataError as error:
    print(error)
"""


@pytest.mark.parametrize("trusted", ["false", "true"])
def test_a_tokenizers_own_code_runs_only_where_the_config_says_so(tiny_chat_model, tmp_path, trusted):
    """Somebody on standard input who would say yes is not asked."""
    folder, canary = tmp_path / "model", tmp_path / "canary"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((tiny_chat_model / "tokenizer.json").read_bytes())
    config = {"tokenizer_class": "Canary", "auto_map": {"AutoTokenizer": [None, "bird.Canary"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "bird.py").write_text(CANARY.format(canary=str(canary)))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", LOAD, str(folder), trusted]
    done = subprocess.run(command, env=environment, input="y\n" * 9, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    if trusted == "true":
        assert canary.exists() and done.stdout == "Canary\n"
    else:
        assert not canary.exists() and "set model.trust_remote_code=true if it may run" in done.stdout


def test_every_loader_is_told_whether_code_may_run():
    """transformers, left alone, asks on standard input; vLLM has its own default."""
    calls = []
    for path in (ROOT / "megarl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else None
            if name in ("from_pretrained", "EngineArgs"):
                calls.append((f"{path.relative_to(ROOT)}:{node.lineno}", {word.arg for word in node.keywords}))
    assert len(calls) >= 3
    assert [place for place, words in calls if "trust_remote_code" not in words] == []
