"""The experts that vLLM reports are those that transformers' routers choose for the same tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megarl.config import RolloutConfig
from megarl.model.family import read_spec
from megarl.rollout.router_replay import compact
from megarl.rollout.vllm_engine import Completion, RolloutError, Sampling, VLLMEngine
from tests.distributed import tiny_models
from tests.distributed.push_ranks import random_model

# A prompt of 17 does not fit into one step of 16 tokens.
ROLLOUT = RolloutConfig(kv_cache_gb=0.05, max_num_seqs=8, max_num_batched_tokens=16, router_replay=True)
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5], [3], list(range(40, 57)), [77, 78]]
SAMPLING = Sampling(n=4, max_tokens=12)


def make(path: Path) -> VLLMEngine:
    return VLLMEngine(str(path), ROLLOUT, dtype="fp32", device_type="cpu", max_model_len=64, seed=0)


class Routers:
    """Of a transformers model: their choices for a sequence, `[tokens, layers with experts, top-k]`, sorted."""

    def __init__(self, path: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.chosen: list[torch.Tensor] = []
        for name, module in self.model.named_modules():
            if name.endswith((".mlp.gate", ".mlp.router")):
                module.register_forward_hook(lambda module, args, output: self.chosen.append(output[-1]))

    @torch.no_grad()
    def __call__(self, tokens: list[int]) -> torch.Tensor:
        self.chosen.clear()
        self.model(torch.tensor([tokens]))
        return torch.stack(self.chosen, dim=1).sort(-1).values


def assert_chosen(path: Path, groups: list[list[Completion]]) -> None:
    routers = Routers(path)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            expected = routers(prompt + completion.tokens)[:-1]  # nobody reads the last token
            assert completion.routed_experts is not None
            assert torch.equal(completion.routed_experts.long().sort(-1).values, expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_experts_of_every_token(tmp_path: Path, family: str) -> None:
    first, second = (random_model(family, tmp_path / str(seed), seed) for seed in range(2))
    engine = make(first)
    assert_chosen(first, engine.generate(PROMPTS, SAMPLING, seed=0))
    engine.load_weights(load_file(second / "model.safetensors").items())
    assert_chosen(second, engine.generate(PROMPTS, SAMPLING, seed=1))
    engine.close()


def test_layers_without_experts_are_left_out(tmp_path: Path) -> None:
    spec = read_spec(random_model("qwen3_moe", tmp_path, seed=0))  # layer 1 of its three is dense
    rows = np.arange(2 * 3 * 2, dtype=np.uint16).reshape(2, 3, 2)
    out = compact(rows, spec)
    assert out.dtype == torch.uint8
    assert out.tolist() == [[[0, 1], [4, 5]], [[6, 7], [10, 11]]]


def test_models_without_experts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RolloutError, match="has no experts"):
        make(tiny_models.qwen2(tmp_path, seed=0))
