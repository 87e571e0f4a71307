"""What vLLM is told about a model beside its config.json. Its effect is in `tests/distributed/test_pushes.py`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megarl.model.family import read_spec
from megarl.rollout.vllm_config import missing_cpu_quantization, model_arguments

NATIVE_ROPE = {"custom_ops": ["-rotary_embedding"]}


def test_dense_and_other_experts_need_nothing(tiny_hf: Callable[..., Path]) -> None:
    for family in ("qwen2", "mixtral"):
        assert model_arguments(read_spec(tiny_hf(family)), on_cpu=True) == {}


def test_deepseek_v3_as_transformers_saves_it(tiny_hf: Callable[..., Path]) -> None:
    """It writes neither how experts are scored nor how they are chosen."""
    path = tiny_hf("deepseek_v3")
    assert not {"scoring_func", "topk_method"} & json.loads((path / "config.json").read_text()).keys()
    arguments = model_arguments(read_spec(path), on_cpu=True)
    router = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_group": 4, "topk_group": 2}
    assert arguments == {"hf_overrides": router | {"routed_scaling_factor": 1.5}, "compilation_config": NATIVE_ROPE}
    assert "compilation_config" not in model_arguments(read_spec(path), on_cpu=False)


@pytest.mark.parametrize(
    ("changes", "groups"),
    [
        ({}, (1, 1)),  # null in its config.json, which vLLM would stop at
        ({"topk_method": "greedy", "n_group": 4, "topk_group": 3}, (1, 1)),  # not looked at, in transformers
        ({"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 3}, (4, 3)),
    ],
)
def test_deepseek_v2_groups(tiny_hf: Callable[..., Path], changes: dict[str, object], groups: tuple[int, int]) -> None:
    router = model_arguments(read_spec(tiny_hf("deepseek_v2", **changes)), on_cpu=False)["hf_overrides"]
    assert (router["n_group"], router["topk_group"]) == groups
    assert (router["scoring_func"], router["topk_method"]) == ("softmax", "greedy")


def test_published_deepseek_v3_is_told_what_it_says(tiny_hf: Callable[..., Path], tmp_path: Path) -> None:
    said = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_group": 8, "topk_group": 4}
    said |= {"routed_scaling_factor": 2.5}
    config = json.loads((tiny_hf("deepseek_v3") / "config.json").read_text()) | said
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_routed_experts": 256, "num_experts_per_tok": 8}))
    assert model_arguments(read_spec(tmp_path), on_cpu=False) == {"hf_overrides": said}


def test_quantisation_on_cpus(tiny_hf: Callable[..., Path]) -> None:
    dense, experts = read_spec(tiny_hf("qwen2")), read_spec(tiny_hf("mixtral"))
    assert missing_cpu_quantization(dense, None) is None
    assert missing_cpu_quantization(dense, "fp8_per_channel") is None
    for spec, quantization in [(dense, "fp8_per_tensor"), (dense, "fp8_per_block"), (experts, "fp8_per_channel")]:
        assert f"rollout.quantization={quantization}" in str(missing_cpu_quantization(spec, quantization))
