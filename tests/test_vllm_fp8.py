"""Weights that vLLM quantises itself, when it starts and at every push: the second time is as good as the first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megarl.config import RolloutConfig
from megarl.rollout.vllm_engine import Completion, Sampling, VLLMEngine
from tests.distributed import tiny_models

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5], list(range(40, 57))]
SAMPLING = Sampling(n=2, max_tokens=12)
MODELS = {"dense": tiny_models.qwen2, "experts": tiny_models.mixtral}
CASES = [
    pytest.param("cpu", "fp8_per_channel", "dense", marks=pytest.mark.slow),
    *(
        pytest.param("cuda", quantization, model, marks=pytest.mark.gpu)
        for quantization in ("fp8_per_tensor", "fp8_per_channel", "fp8_per_block")
        for model in MODELS
    ),
]


def make(path: Path, device: str, quantization: str | None, dtype: str = "bf16") -> VLLMEngine:
    rollout = RolloutConfig(
        kv_cache_gb=0.02, max_num_seqs=8, gpu_memory_utilization=0.2, enforce_eager=True, quantization=quantization
    )
    return VLLMEngine(str(path), rollout, dtype=dtype, device_type=device, max_model_len=64, seed=0)


def behaviour(engine: VLLMEngine) -> tuple[dict[str, int], list[list[Completion]]]:
    """The bits that it computes with, and what comes of them."""
    return engine.checksums(), engine.generate(PROMPTS, SAMPLING, seed=0)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.to(torch.bfloat16) for name, tensor in load_file(path / "model.safetensors").items()}


def mean_error(path: Path, groups: list[list[Completion]]) -> float:
    """Of log-probs, against transformers in fp32."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    differences = [
        tiny_models.reference_logps(model, prompt, sample.tokens) - torch.tensor(sample.logps)
        for prompt, group in zip(PROMPTS, groups, strict=True)
        for sample in group
    ]
    return torch.cat(differences).abs().mean().item()


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("device", "quantization", "model"), CASES)
def test_a_push_quantises_as_a_start_does(tmp_path: Path, device: str, quantization: str, model: str) -> None:
    first, second = (
        MODELS[model](tmp_path / name, seed=seed, width=4) for seed, name in enumerate(["first", "second"])
    )
    engine = make(first, device, quantization)
    of_first = behaviour(engine)
    assert any(name.endswith("_scale") or "_scale_" in name for name in of_first[0]), "nothing was quantised"
    engine.load_weights(weights(first).items())
    assert behaviour(engine) == of_first  # the same weights again change no bit
    engine.load_weights(weights(second).items())
    of_second = behaviour(engine)
    assert of_second[1] != of_first[1]
    engine.spoil()
    engine.load_weights(weights(first).items())
    assert behaviour(engine) == of_first  # all of it came with the push: nothing of it had to be there before
    engine.close()

    fresh = make(second, device, quantization)
    assert behaviour(fresh) == of_second
    fresh.close()
    # Three bits of mantissa cost random models 0.2 (bf16: 0.02); those of other weights are no guess at all.
    assert mean_error(second, of_second[1]) < 0.4 < 1 < mean_error(first, of_second[1])
