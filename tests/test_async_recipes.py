"""The asynchronous recipes' CPU forms, from the command line: `megarl train` starts the server, and leaves none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megarl.config import load
from megarl.observe.metrics import read_metrics

EXAMPLES = Path(__file__).parents[1] / "examples"
BASE = EXAMPLES / "methods" / "rl.yaml"


def running(word: str) -> list[int]:
    """Processes whose command line has it."""
    return [p.pid for p in psutil.process_iter(["cmdline"]) if word in " ".join(p.info["cmdline"] or ())]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["one_step_off", "fully_async"])
def test_an_asynchronous_recipe_on_one_machine(name: str, tiny_chat_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(8) for b in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    here = [f"model.path={tiny_chat_model}", f"data.path={tmp_path / 'train.jsonl'}", f"run.root={tmp_path}"]
    settings = [str(BASE), str(EXAMPLES / "async" / f"{name}.yaml"), *here, "run.name=run", "run.max_num_steps=4"]
    command = [sys.executable, "-m", "megarl", "train", *settings]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
    serve = tmp_path / "run" / "engines" / "serve.log"
    assert done.returncode == 0, done.stderr[-3000:] + serve.read_text()
    records = read_metrics(tmp_path / "run")
    bound = load(settings).rollout.max_staleness
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert all(record["staleness/max"] <= bound for record in records)
    if name == "one_step_off":
        assert [record["staleness/max"] for record in records] == [0, 1, 1, 1]
        assert all(record["frac_mixed_version"] == 0 for record in records)
    deadline = time.monotonic() + 60
    while left := running(str(tmp_path)):
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.5)
    assert list((tmp_path / "run" / "engines").glob("*.json")) == []


def test_the_recipes_say_what_they_are_of() -> None:
    """One step off may be one update behind, and mixes no versions; the other may be four behind, and does."""
    for name, staleness, on_update in (("one_step_off", 1, "wait"), ("fully_async", 4, "recompute")):
        overlay = str(EXAMPLES / "async" / f"{name}.yaml")
        cfg = load([str(BASE), overlay, "model.path=none", "data.path=none"], check_model=False)
        assert (cfg.rollout.mode, cfg.rollout.max_staleness, cfg.rollout.on_update) == ("remote", staleness, on_update)
    recipes = [str(EXAMPLES / f"llama3.3_70b_{name}_grpo.yaml") for name in ("math", "async")]
    cfg = load(recipes, check_model=False)
    assert cfg.rollout.num_nodes * cfg.rollout.num_engines == 8 and cfg.cluster.num_nodes == 4
