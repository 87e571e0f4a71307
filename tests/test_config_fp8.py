"""FP8's checks: what a machine lacks is said before any model is built, from what the machine is told to be."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megarl.config import ConfigError, load
from megarl.config.fp8 import Machine, check_fp8_machine, check_fp8_model, tokens_multiple, version
from megarl.model.family import read_spec
from tests.test_config import no_launcher, overrides, problems, recipe

__all__ = ["no_launcher", "recipe"]  # fixtures

FP8 = {"fp8_cfg.enabled": "true"}
H100 = Machine("cuda", (9, 0), (12, 9), (2, 8))
B200 = Machine("cuda", (10, 0), (12, 9), (2, 8))


def said(recipe: Callable[..., Path], machine: Machine, fp8_recipe: str) -> list[str]:
    cfg = load([str(recipe()), *overrides(FP8), f"fp8_cfg.fp8_recipe={fp8_recipe}"], check_model=False)
    return [problem.text for problem in check_fp8_machine(cfg, machine)]


@pytest.mark.parametrize(
    ("fp8_recipe", "machine", "wanted"),
    [
        ("blockwise", H100, ""),
        ("tensorwise", H100, ""),
        ("delayed", Machine("cuda", (8, 9), (12, 1), (1, 0)), ""),
        ("mxfp8", B200, ""),
        ("mxfp8", H100, "needs Blackwell or later (compute capability 10.0), and this GPU has 9.0"),
        ("blockwise", Machine("cuda", (8, 9), (12, 9), (2, 8)), "needs Hopper or later (compute capability 9.0)"),
        ("delayed", Machine("cuda", (8, 0), (12, 9), (2, 8)), "needs Ada or later (compute capability 8.9), and this"),
        ("blockwise", Machine("cuda", (9, 0), (12, 8), (2, 8)), "needs CUDA 12.9, and torch was built for 12.8"),
        ("blockwise", Machine("cuda", (9, 0), (12, 9), (2, 2)), "needs Transformer Engine 2.3, and here is 2.2"),
        ("tensorwise", Machine("cuda", (9, 0), (12, 9), None), "needs Transformer Engine, which is not installed"),
        ("blockwise", Machine("cpu"), "needs a CUDA device"),
    ],
)
def test_machines(recipe: Callable[..., Path], fp8_recipe: str, machine: Machine, wanted: str) -> None:
    found = said(recipe, machine, fp8_recipe)
    assert len(found) == bool(wanted), found
    assert not wanted or wanted in found[0]


def test_refused_here_without_cuda_before_any_model_is_built(recipe: Callable[..., Path]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    found = problems(recipe(hidden_size=64, num_attention_heads=4), *overrides(FP8))
    assert len(found) == 1 and "fp8_cfg.enabled = true needs a CUDA device" in found[0]
    load([str(recipe()), *overrides(FP8)], check_model=False)  # for another machine


@pytest.mark.parametrize(
    ("fp8_recipe", "hf", "tp", "wanted"),
    [
        ("blockwise", {}, 1, []),
        # 64 / 2 = 32 queries a rank; 2 x 2 groups x 16 = 64 keys and values / 2 = 32; 96 / 2 = 48 columns
        ("blockwise", {}, 2, []),
        ("mxfp8", {}, 2, [("MLP columns 96 / parallel.tensor_model_parallel_size 2 = 48, % 32 = 16")]),
        ("blockwise", {"hidden_size": 72, "head_dim": 16}, 1, ["hidden size 72, % 16 = 8"]),
    ],
)
def test_dimensions(
    recipe: Callable[..., Path], fp8_recipe: str, hf: dict[str, Any], tp: int, wanted: list[str]
) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96} | hf
    path = recipe(architectures=["Qwen3ForCausalLM"], **({"head_dim": 16} | sizes))
    layout = {"cluster.gpus_per_node": tp, "parallel.tensor_model_parallel_size": tp}
    cfg = load([str(path), *overrides(FP8 | layout), f"fp8_cfg.fp8_recipe={fp8_recipe}"], check_model=False)
    found = [problem.text for problem in check_fp8_model(cfg, read_spec(cfg.model.path))]
    assert len(found) == len(wanted), found
    assert all(text in problem for text, problem in zip(wanted, found, strict=True))


def test_dimensions_of_experts_and_latent_attention(recipe: Callable[..., Path]) -> None:
    from tests.test_flops import V3

    path = recipe(**V3)
    layout = {"cluster.gpus_per_node": 8, "parallel.expert_model_parallel_size": 8}
    cfg = load([str(path), *overrides(FP8 | layout)], check_model=False)
    assert list(check_fp8_model(cfg, read_spec(cfg.model.path))) == []
    config = Path(cfg.model.path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"moe_intermediate_size": 2040, "kv_lora_rank": 500}))
    found = [problem.text for problem in check_fp8_model(cfg, read_spec(cfg.model.path))]
    assert [text.partition("the model's ")[2] for text in found] == [
        "key and value's rank 500, % 16 = 4",
        "latent down projection 564, % 16 = 4",
        "experts' columns 2040, % 16 = 8",
        "shared expert's columns 2040, % 16 = 8",
    ]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"model.dtype": "fp32"}, "needs model.dtype = bf16"),
        ({"fp8_cfg.fp8_recipe": "delayed", "fp8_cfg.first_last_layers_bf16": "true"}, "none of them in BF16"),
        ({"fp8_cfg.fp8_param": "true", "checkpoint.save_contents": "[hf]", "offload.params": "true"}, "offload.params"),
        ({"fp8_cfg.fp8_param": "true"}, "checkpoint.save_contents"),
        (
            {"fp8_cfg.fp8_param": "true", "checkpoint.save_contents": "[hf]", "loss.kl_loss_coef": 0.1},
            "a reference model",
        ),
        ({"fp8_cfg.enabled": "false", "fp8_cfg.metrics": "true"}, "would do nothing: fp8_cfg.enabled = false"),
        (
            {"fp8_cfg.num_layers_at_end_in_bf16": 2},
            "at_end_in_bf16 = 2 would do nothing: it is read with fp8_cfg.first_last_layers_bf16 = true; here",
        ),
        ({"model.model_overrides.fp8_recipe": "mxfp8"}, "cannot be overridden: set fp8_cfg.fp8_recipe"),
    ],
)
def test_settings(recipe: Callable[..., Path], settings: dict[str, Any], wanted: str) -> None:
    found = problems(recipe(), *overrides(FP8 | settings), check_model=False)
    assert len(found) == 1, found
    assert wanted in found[0]


def test_an_fp8_rollout_needs_a_correction(recipe: Callable[..., Path]) -> None:
    quantised = "rollout.quantization=fp8_per_tensor"
    [found] = problems(recipe(), quantised, check_model=False)
    assert "set loss.truncated_importance_sampling_type=tis" in found
    distilled = ["algorithm=distillation", "teacher.path=teacher", "train.train_global_batch_size=null"]
    found = problems(recipe(), quantised, *distilled, check_model=False)
    assert any("set loss.truncated_importance_sampling_type=tis" in text for text in found), found
    load([str(recipe()), quantised, "loss.truncated_importance_sampling_type=tis"], check_model=False)
    load([str(recipe()), quantised, "loss.use_rollout_logps=true"], check_model=False)


def test_tokens_are_padded_to_what_the_matrices_take(recipe: Callable[..., Path]) -> None:
    """128 tokens a rank: times TP where sequence parallelism cuts them, times CP."""
    from megarl.parallel.context import multiple_of

    settings = {"fp8_cfg.fp8_recipe": "blockwise"}
    cfg = load([str(recipe()), *overrides(FP8 | settings)], check_model=False)
    assert tokens_multiple(cfg) == 128 and tokens_multiple(load([str(recipe())], check_model=False)) == 1
    assert multiple_of(1, 1, 128) == (1, 128)
    assert multiple_of(2, 4, 128) == (4, 1024)
    assert multiple_of(3, 2, 16) == (6, 96)


def test_versions() -> None:
    assert version("12.8") == (12, 8) and version("2.11.0+c188b53") == (2, 11)


def test_every_problem_is_a_config_error(recipe: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError):
        load([str(recipe()), "fp8_cfg.fp8_recipe=int4"], check_model=False)
