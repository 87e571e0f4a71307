"""Engines of several ranks, beside megatron's process groups, under torchrun: `vllm_ranks.py <scratch folder>`.

All cases run in one start; any number of ranks that 2 divides.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megarl.config import RolloutConfig
from megarl.rollout.vllm_engine import Completion, Sampling, VLLMEngine
from tests.distributed import tiny_models

assert "vllm" not in sys.modules, "importing megarl.rollout.vllm_engine must stay light"

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5], [3], list(range(40, 57)), [77, 78]]
SAMPLING = Sampling(n=4, max_tokens=12)


def make(model_dir: Path, tp: int, **settings: Any) -> VLLMEngine:
    rollout = RolloutConfig(tensor_parallel_size=tp, kv_cache_gb=0.02, max_num_seqs=8, **settings)
    return VLLMEngine(str(model_dir), rollout, dtype="fp32", device_type="cpu", max_model_len=64, seed=0)


def everywhere(value: object) -> list[object]:
    """The value of each rank."""
    values: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def check_logps(model_dir: Path, groups: list[list[Completion]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for sample in group:
            expected = tiny_models.reference_logps(model, prompt, sample.tokens)
            worst = (expected - torch.tensor(sample.logps)).abs().max().item()
            assert worst < 1e-5, f"log-probs differ by {worst} after {prompt}"


def check_groups_work(megatron_group: dist.ProcessGroup) -> None:
    for group in (None, megatron_group):
        ones = torch.ones(1)
        dist.all_reduce(ones, group=group)
        assert ones.item() == dist.get_world_size(group), ones


def sent_by_rank_0(model_dir: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights as a trainer would send them: computed together while vLLM loads."""
    for name, tensor in load_file(model_dir / "model.safetensors").items():
        sent = tensor if dist.get_rank() == 0 else torch.zeros_like(tensor)
        dist.broadcast(sent, src=0)
        yield name, sent


def check_tensor_parallel(first: Path, second: Path) -> list[list[Completion]]:
    """One engine over two ranks: same result on both, equal to transformers, also after new weights. Returns greedy."""
    engine = make(first, tp=2)
    rank = dist.get_rank()
    assert (engine.replica, engine.num_replicas) == (rank // 2, dist.get_world_size() // 2)
    groups = engine.generate(PROMPTS, SAMPLING, seed=engine.replica)
    by_rank = everywhere(groups)
    assert by_rank[rank] == by_rank[rank ^ 1], "ranks of one engine disagree"
    if engine.num_replicas > 1:
        assert by_rank[0] != by_rank[2], "replicas with other seeds must sample other tokens"
    check_logps(first, groups)
    assert engine.generate(PROMPTS, SAMPLING, seed=engine.replica) == groups

    greedy = engine.generate(PROMPTS, Sampling(max_tokens=8, temperature=0), seed=0)
    engine.sleep()
    engine.wake_weights()
    engine.load_weights(sent_by_rank_0(second))
    engine.wake_kv_cache()
    check_logps(second, engine.generate(PROMPTS, SAMPLING, seed=0))
    engine.close()
    return greedy


def check_replicas(model_dir: Path, greedy: list[list[Completion]]) -> None:
    """An engine for each rank: they run on their own, with other prompts and other numbers of steps."""
    engine = make(model_dir, tp=1)
    rank = dist.get_rank()
    assert (engine.replica, engine.num_replicas) == (rank, dist.get_world_size())
    mine = engine.generate(PROMPTS[rank:], Sampling(max_tokens=8, temperature=0), seed=0)
    assert [group[0].tokens for group in mine] == [group[0].tokens for group in greedy[rank:]]
    engine.close()


def check_experts(model_dir: Path) -> None:
    """Mixture of experts: the same weights again must change nothing (vLLM itself packs experts once only). An
    engine's first rank reports the experts chosen."""
    engine = make(model_dir, tp=2, router_replay=True)
    groups = engine.generate(PROMPTS, SAMPLING, seed=0)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for sample in group:
            positions = len(prompt) + len(sample.tokens) - 1
            shape = None if sample.routed_experts is None else list(sample.routed_experts.shape)
            assert shape == ([positions, 2, 2] if dist.get_rank() % 2 == 0 else None), shape
    check_logps(model_dir, groups)
    engine.load_weights(sent_by_rank_0(model_dir))
    assert engine.generate(PROMPTS, SAMPLING, seed=0) == groups, "reloading the same experts changed log-probs"
    engine.close()


def main(scratch: Path) -> None:
    dist.init_process_group("gloo")
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    if dist.get_rank() == 0:
        tiny_models.qwen2(scratch / "first", seed=0, tied=True)
        tiny_models.qwen2(scratch / "second", seed=1, tied=True)
        tiny_models.mixtral(scratch / "experts", seed=0)
    dist.barrier()
    local_world_size = os.environ["LOCAL_WORLD_SIZE"]
    greedy = check_tensor_parallel(scratch / "first", scratch / "second")
    check_groups_work(parallel_state.get_tensor_model_parallel_group())
    check_replicas(scratch / "first", greedy)
    check_experts(scratch / "experts")
    check_groups_work(parallel_state.get_tensor_model_parallel_group())
    assert os.environ["LOCAL_WORLD_SIZE"] == local_world_size
    print("all cases passed", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
