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


def run(tool, tmp_path, monkeypatch, *options, rows=ROWS):
    rewards, out = tmp_path / "rewards.jsonl", tmp_path / "out.jsonl"
    rewards.write_text("".join(json.dumps({"step": s, "id": i, "reward": r}) + "\n" for s, i, r in rows))
    monkeypatch.setattr(sys, "argv", ["select_prompts.py", str(rewards), str(out), *options])
    assert tool.main() == 0
    return {row["id"]: row["pass_rate"] for row in map(json.loads, out.read_text().splitlines())}


def test_pass_rates_are_means(tool, tmp_path, monkeypatch):
    assert run(tool, tmp_path, monkeypatch) == {"a": 0.5, "b": 0.0}


def test_an_epoch_that_a_prompt_lacks_is_left_out_for_all(tool, tmp_path, monkeypatch):
    """b was there a third time, a was not: two epochs, with means 0 and 1/2, and (1 - 0)^2 + (1 - 1/2)^2 = 5/4."""
    deviation = (1 - 0.5) ** 2  # of both, in the second epoch
    expected = 1 - deviation / 1.25
    assert run(tool, tmp_path, monkeypatch, "--limr") == pytest.approx({"a": expected, "b": expected})


def test_a_run_within_its_first_epoch_has_no_scores(tool, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"rewards.jsonl: no prompt was sampled in two steps, so that not one epoch"):
        run(tool, tmp_path, monkeypatch, "--limr", rows=[(1, "a", 0.0), (1, "a", 1.0), (2, "b", 0.5)])
