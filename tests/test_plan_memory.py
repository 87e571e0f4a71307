"""The planner: Llama-70B's terms by hand, and large recipes against the published sizes of their models."""

import json
from pathlib import Path
from typing import Any

import pytest

from megarl.cli import main
from megarl.config import Config, load
from megarl.config.machine import check_model
from megarl.model.family import ModelSpec, read_spec
from megarl.plan import layer_activations, plan, rows_of, too_much, total_parameters
from tests.fixtures.published_models import PUBLISHED
from tests.test_config import no_launcher, overrides

__all__ = ["no_launcher"]  # a fixture

EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPES = [
    "llama3.3_70b_math_grpo",
    "llama3.3_70b_32k_grpo",
    "qwen3_30b_a3b_grpo",
    "qwen3_235b_a22b_grpo",
    "deepseek_v3_grpo_fp8",
    "llama3.1_8b_fp8_grpo",
]


def planned(tmp_path: Path, recipe: str, **settings: Any) -> tuple[Config, ModelSpec]:
    """The recipe with its model's published config.json."""
    path = str(EXAMPLES / f"{recipe}.yaml")
    name = Path(load([path], check_model=False).model.path).name
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    given = {"model.path": tmp_path} | {name.replace("__", "."): value for name, value in settings.items()}
    return load([path, *overrides(given)], check_model=False), read_spec(tmp_path)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Llama-3.1-8B-Instruct", 8.03),
        ("Llama-3.3-70B-Instruct", 70.55),
        ("Qwen3-30B-A3B", 30.5),
        ("Qwen3-235B-A22B", 235),
        ("DeepSeek-V3", 671),
    ],
)
def test_models_have_their_published_sizes(tmp_path: Path, name: str, billions: float) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    assert total_parameters(read_spec(tmp_path)) == pytest.approx(billions * 1e9, rel=0.002)


@pytest.mark.parametrize(
    ("layout", "state", "activations"),
    [
        # 32k tokens a microbatch; 20 layers x 0.8556 B + 1.0507 B = 18.16 B / TP 8 = 2.270 B x (6 + 12 / d) bytes
        ({"cp": 2, "pp": 4, "nodes": 8, "full": True}, 27.2, 3.2),
        ({"cp": 2, "pp": 4, "nodes": 8, "full": False}, 27.2, 45.0),  # 274 kB x 16384 x 20 layers x 4 in flight / 8
        ({"cp": 4, "pp": 2, "nodes": 8, "full": False}, 39.7, 22.5),  # half of the tokens, 40 layers, 2 in flight
        ({"cp": 4, "pp": 4, "nodes": 32, "full": False}, 17.0, 22.5),
        ({"cp": 2, "pp": 4, "nodes": 32, "full": False}, 17.0, 45.0),
    ],
)
def test_llama_70b_at_32k(tmp_path: Path, layout: dict[str, int], state: float, activations: float) -> None:
    settings: dict[str, Any] = {
        "cluster__num_nodes": layout["nodes"],
        "parallel__context_parallel_size": layout["cp"],
        "parallel__pipeline_model_parallel_size": layout["pp"],
        "train__train_mb_tokens": 32768 // layout["cp"],
        "train__logprob_mb_tokens": 32768 // layout["cp"],
    }
    if not layout["full"]:
        names = ("granularity", "method", "num_layers")
        settings |= {f"model__recompute_{name}": "null" for name in names}
    cfg, spec = planned(tmp_path, "llama3.3_70b_32k_grpo", **settings)
    found = plan(cfg, spec)
    assert layer_activations(spec, 0) == 12 * 8192 + 4 * 8 * 128 + 6 * 28672 == 274_432
    assert (found.weights + found.gradients + found.optimizer) / 1e9 == pytest.approx(state, abs=0.1)
    assert found.activations / 1e9 == pytest.approx(activations, rel=0.02)


def test_levers_by_their_bytes(tmp_path: Path) -> None:
    """2.270 B parameters, whose optimizer is divided over 2 ranks."""
    terms = {}
    for lever in ("none", "optimizer__optimizer_cpu_offload", "optimizer__use_precision_aware_optimizer"):
        more = {} if lever == "none" else {lever: True}
        if "precision" in lever:
            more |= {"checkpoint__save_contents": "[hf]", "checkpoint__resume_mode": "disable"}
        terms[lever] = plan(*planned(tmp_path, "llama3.3_70b_32k_grpo", **more))
    mine = 2.270e9 / 2
    expected = {"none": 12 * mine, "optimizer__optimizer_cpu_offload": 4 * mine}
    expected["optimizer__use_precision_aware_optimizer"] = 8 * mine
    for lever, size in expected.items():
        assert terms[lever].optimizer == pytest.approx(size, rel=1e-3)
    kept = terms["none"].weights + terms["none"].gradients + terms["none"].optimizer
    assert kept - terms["none"].away == terms["none"].weights  # the recipe offloads gradients and optimizer


@pytest.mark.parametrize("recipe", RECIPES)
def test_large_recipes_fit_their_models_and_80_gb(tmp_path: Path, recipe: str) -> None:
    cfg, spec = planned(tmp_path, recipe)
    assert [problem.text for problem in check_model(cfg)] == []
    assert too_much(plan(cfg, spec), cfg, gpu_gb=80) == []


def test_what_does_not_fit_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg, _ = planned(tmp_path, "llama3.1_8b_fp8_grpo")
    recipe, path = str(EXAMPLES / "llama3.1_8b_fp8_grpo.yaml"), f"model.path={cfg.model.path}"
    assert main(["plan", recipe, path]) == 0
    assert "training, at its peak" in capsys.readouterr().out
    assert main(["plan", recipe, path, "--gpu-gb", "40"]) == 1
    assert "does not fit: training takes" in capsys.readouterr().err
    assert main(["plan", recipe, path, "parallel.tensor_model_parallel_size=5", "cluster.gpus_per_node=5"]) == 2


def test_servers_elsewhere_take_nothing_of_the_ranks_gpus(tmp_path: Path) -> None:
    """0.95 x 80 = 76 GB for vLLM leave 4 for what the trainer keeps beside it, which is more."""
    share = {"rollout__gpu_memory_utilization": 0.95}
    cfg, spec = planned(tmp_path, "llama3.1_8b_fp8_grpo", **share)
    assert any("and the trainer's" in reason for reason in too_much(plan(cfg, spec), cfg, gpu_gb=80))
    cfg, spec = planned(tmp_path, "llama3.1_8b_fp8_grpo", **share, rollout__mode="remote")
    assert too_much(plan(cfg, spec), cfg, gpu_gb=80) == []
    assert "a server's share of a GPU" in dict(rows_of(plan(cfg, spec), cfg, gpu_gb=80))
