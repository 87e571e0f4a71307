"""Pass rates and LIMR's scores from the rewards of a run."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "select_prompts.py"
# Step, prompt, reward: a is solved from its second time on, b never; a is in steps 1 and 3, b in 1, 2 and 3.
ROWS = [(1, "a", 0.0), (1, "a", 0.0), (1, "b", 0.0), (2, "b", 0.0), (3, "a", 1.0), (3, "a", 1.0), (3, "b", 0.0)]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("select_prompts", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(tool, tmp_path, monkeypatch, *options):
    rewards, out = tmp_path / "rewards.jsonl", tmp_path / "out.jsonl"
    rewards.write_text("".join(json.dumps({"step": s, "id": i, "reward": r}) + "\n" for s, i, r in ROWS))
    monkeypatch.setattr(sys, "argv", ["select_prompts.py", str(rewards), str(out), *options])
    assert tool.main() == 0
    return {row["id"]: row["pass_rate"] for row in map(json.loads, out.read_text().splitlines())}


def test_pass_rates_are_means(tool, tmp_path, monkeypatch):
    assert run(tool, tmp_path, monkeypatch) == {"a": 0.5, "b": 0.0}


def test_epochs_count_a_prompts_own_steps(tool, tmp_path, monkeypatch):
    """b alone was there a third time, so that a has no score: its last epoch has no reward."""
    # Means are 0 in every epoch, as of b alone, which follows them exactly: 1 - 0 / 3.
    assert run(tool, tmp_path, monkeypatch, "--limr") == {"b": 1.0}
