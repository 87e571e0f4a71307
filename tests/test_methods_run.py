"""examples/methods/run.py: what it takes for an objective that moved."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "methods"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("methods_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["methods_run"] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["methods_run"]


def judged(tool, tmp_path, name, base, values, seconds=5.0):
    objective = tool.OTHERS.get(name, tool.OBJECTIVES[base])[0]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i, objective: x}) + "\n" for i, x in enumerate(values)))
    return tool.judge(name, base, path, seconds, limit_s=120)


@pytest.mark.parametrize(
    "name, base, values, problem",
    [
        ("rl", "rl", [0.4, 0.5, 0.6, 0.1, 0.7, 0.8, 0.9], ""),  # means 0.5 and 0.8
        ("rl", "rl", [0.5, 0.5, 0.5, 0.5, 0.5, 0.5], "moved by +0.000, less than +0.1"),
        ("rl", "rl", [0.8, 0.8, 0.8, 0.5, 0.5, 0.5], "moved by -0.300, less than +0.1"),
        ("labels", "labels", [0.0, 0.0, 0.0, -0.4, -0.4, -0.4], ""),  # undesirable rewards go down
        ("labels", "labels", [0.0, 0.0, 0.0, 0.4, 0.4, 0.4], "moved by +0.400, less than -0.05"),
        ("distillation", "rl", [0.2, 0.2, 0.2, 0.1, 0.1, 0.1], ""),
    ],
)
def test_an_objective_has_a_direction_and_a_least_change(tool, tmp_path, name, base, values, problem):
    result = judged(tool, tmp_path, name, base, values)
    assert result.problem == problem and result.before == pytest.approx(sum(values[:3]) / 3)


def test_a_run_that_takes_too_long_is_a_problem(tool, tmp_path):
    assert judged(tool, tmp_path, "sft", "sft", [2.0] * 3 + [1.0] * 3, seconds=121).problem == "took longer than 120 s"


def test_every_recipe_has_a_base_with_an_objective(tool):
    """The base is the first recipe that a recipe's first line names."""
    assert {tool.base_of(name) for name in tool.METHODS} == set(tool.OBJECTIVES) == set(tool.DATA)
    assert tool.base_of("dpop") == "pairs" and tool.base_of("bco") == "labels" and tool.base_of("rl") == "rl"
    assert set(tool.OTHERS) | set(tool.REAL) <= set(tool.METHODS)
