"""What of vLLM only a GPU can show; `tests/test_vllm_fp8.py` has more of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megarl.config import RolloutConfig
from megarl.rollout.vllm_engine import Completion, Sampling, VLLMEngine
from tests.distributed import remote_cases, tiny_models
from tests.distributed.servers import generate, serving

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5], list(range(40, 57))]
SAMPLING = Sampling(n=2, max_tokens=12)
WIDTH = 4  # heads of 128
BF16 = 0.15  # a log-prob of these models in bf16 is off by 0.02 on average


def mean_error(model_dir: Path, groups: list[list[Completion]]) -> float:
    """Of log-probs, against transformers in fp32 on the CPU."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    differences = [
        tiny_models.reference_logps(model, prompt, sample.tokens) - torch.tensor(sample.logps)
        for prompt, group in zip(PROMPTS, groups, strict=True)
        for sample in group
    ]
    return torch.cat(differences).abs().mean().item()


def weights(model_dir: Path) -> dict[str, torch.Tensor]:
    """As the trainer sends them: on the device."""
    stored = load_file(model_dir / "model.safetensors", device="cuda")
    return {name: tensor.to(torch.bfloat16) for name, tensor in stored.items()}


@pytest.mark.parametrize("model", [tiny_models.qwen2, tiny_models.mixtral])
@pytest.mark.parametrize(("sleep_level", "enforce_eager"), [(1, True), (2, False)])
def test_a_push_between_sleep_and_sampling(tmp_path: Path, model, sleep_level: int, enforce_eager: bool) -> None:
    """The order of a training step, with CUDA graphs that were captured with other weights."""
    first, second = (model(tmp_path / str(seed), seed=seed, width=WIDTH) for seed in range(2))
    rollout = RolloutConfig(
        max_num_seqs=8, gpu_memory_utilization=0.3, sleep_level=sleep_level, enforce_eager=enforce_eager
    )
    engine = VLLMEngine(str(first), rollout, dtype="bf16", device_type="cuda", max_model_len=64, seed=0)
    assert mean_error(first, engine.generate(PROMPTS, SAMPLING, seed=0)) < BF16
    awake = torch.cuda.mem_get_info()[0]
    for path in (second, first, second):
        engine.sleep()
        assert torch.cuda.mem_get_info()[0] > awake  # memory came back
        engine.wake_weights()
        engine.load_weights(weights(path).items())
        engine.wake_kv_cache()
        assert mean_error(path, engine.generate(PROMPTS, SAMPLING, seed=0)) < BF16
    bits = engine.checksums()
    engine.spoil()
    engine.load_weights(weights(second).items())
    assert engine.checksums() == bits
    engine.close()


def test_experts_of_every_token(tmp_path: Path) -> None:
    """vLLM's own report: of each token that was read, different experts of those that exist."""
    rollout = RolloutConfig(max_num_seqs=8, gpu_memory_utilization=0.3, router_replay=True)
    path = tiny_models.mixtral(tmp_path, seed=0, width=WIDTH)
    engine = VLLMEngine(str(path), rollout, dtype="bf16", device_type="cuda", max_model_len=64, seed=0)
    for prompt, group in zip(PROMPTS, engine.generate(PROMPTS, SAMPLING, seed=0), strict=True):
        for completion in group:
            routed = completion.routed_experts
            assert routed is not None
            assert routed.shape == (len(prompt) + len(completion.tokens) - 1, 2, 2)  # positions, layers, top-k
            assert routed.max() < 4 and (routed[..., 0] != routed[..., 1]).all()
    engine.close()


@pytest.mark.parametrize("model", [tiny_models.qwen2, tiny_models.mixtral])
def test_a_server_gets_weights_over_nccl(ranks, tmp_path: Path, model) -> None:
    """The trainer on the first GPU, the server on the second."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices: NCCL refuses two ranks on one")
    served, new = (model(tmp_path / str(seed), seed=seed, width=WIDTH) for seed in range(2))
    data, recipe = tmp_path / "data.jsonl", tmp_path / "recipe.yaml"
    data.touch()
    recipe.write_text(
        "algorithm: sft\ncluster: {device: cuda, gpus_per_node: 1}\nmodel: {dtype: bf16}\n"
        f"data: {{path: {data}, max_prompt_length: 32}}\nrollout: {{max_response_length: 32}}\n"
        "train: {train_global_batch_size: 4}\n"
    )
    reference = AutoModelForCausalLM.from_pretrained(new, dtype=torch.float32)

    def error() -> float:
        differences = []
        for prompt in PROMPTS:
            tokens, logps = generate(url, prompt, temperature=1.0)
            differences.append(tiny_models.reference_logps(reference, prompt, tokens) - torch.tensor(logps))
        return torch.cat(differences).abs().mean().item()

    with serving(served, tmp_path / "server.log", dtype="bfloat16", gpu=1) as url:
        assert error() > 2 * BF16  # it still has other weights
        ranks.run(remote_cases.pushed, 1, recipe=str(recipe), model=str(new), overrides=[], urls=[url])
        assert error() < BF16
