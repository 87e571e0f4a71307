"""Pushes from megatron to vLLM on two ranks, under torchrun: `push_ranks.py <scratch folder> <case> ...`.

A case makes two random models of one shape: vLLM starts with the first, the trainer with the second, and after a push
vLLM samples with the second's probabilities. `greedy <model>` exports one instead, and serves it; `quantised <model>`
pushes to engines that quantise.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megarl.config import RolloutConfig, load
from megarl.data.records import Sample
from megarl.model.engine import Engine
from megarl.model.family import read_spec
from megarl.parallel.mesh import Mesh, build_mesh
from megarl.rollout.vllm_engine import Completion, Sampling, VLLMEngine
from megarl.rollout.vllm_layout import kept_by
from megarl.weights.plan import Box
from megarl.weights.rules import CanonTensor
from megarl.weights.stream import WeightStream
from megarl.weights.sync import SyncError, push, to_engines
from tests.conftest import TINY, TINY_OF
from tests.distributed.transport_cases import Damaged

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5], [3], list(range(40, 57)), [77, 78]]
SAMPLING = Sampling(n=4, max_tokens=12)

# Sizes that vLLM's CPU kernels have: heads of 32; latent attention of 512 + 64.
HEADS = {"num_hidden_layers": 2, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
LATENT = {
    "num_hidden_layers": 3,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "qwen2-tied": (
        "qwen2",
        {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "llama": ("llama", HEADS),
    "mistral": ("mistral", HEADS | {"sliding_window": None}),
    "qwen3": ("qwen3", HEADS),
    "seed_oss": ("seed_oss", HEADS),
    "qwen3_moe": ("qwen3_moe", HEADS | {"num_hidden_layers": 3}),
    "mixtral": ("mixtral", HEADS),
    "deepseek_v2": ("deepseek_v2", LATENT | {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}}),
    "deepseek_v2-groups": (
        "deepseek_v2",
        LATENT | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 3, "num_experts_per_tok": 3},
    ),
    "deepseek_v3": ("deepseek_v3", LATENT),
    "deepseek_v3-yarn": ("deepseek_v3", LATENT | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}),
    "gpt_oss": ("gpt_oss", HEADS | {"head_dim": 64}),
}


@dataclass(frozen=True)
class Case:
    model: str
    layout: tuple[str, ...]
    vllm_tp: int
    overrides: tuple[str, ...] = field(default=())


TP2 = ("parallel.tensor_model_parallel_size=2",)
PP2 = ("parallel.pipeline_model_parallel_size=2",)
EP2 = ("parallel.expert_model_parallel_size=2",)
CASES = {
    "dense TP2 to TP1": Case("qwen2", TP2, 1),
    "dense PP2 to TP2": Case("qwen3", PP2, 2),
    "tied TP2 to TP2": Case("qwen2-tied", TP2, 2),
    "qwen3_moe EP2 to TP1": Case("qwen3_moe", EP2, 1),
    "qwen3_moe EP2 to TP2": Case("qwen3_moe", EP2, 2),
    "mixtral EP2 to TP2": Case("mixtral", EP2, 2),
    "deepseek_v2 EP2 to TP1": Case("deepseek_v2", EP2, 1),
    "deepseek_v3 EP2 to TP1": Case("deepseek_v3", EP2, 1),
    "deepseek_v3 EP2 to TP2": Case("deepseek_v3", EP2, 2),
    "gpt_oss EP2 to TP1": Case("gpt_oss", EP2, 1),
}


def random_model(name: str, path: Path, seed: int) -> Path:
    """A random Hugging Face model with the config.json that the family's checkpoints have."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    family, changes = MODELS[name]
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**TINY | TINY_OF.get(family, {}) | changes)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if key.endswith("e_score_correction_bias"):
                tensor.uniform_(-0.3, 0.3)
            elif tensor.dim() == 1 and not key.endswith("inv_freq"):
                tensor.uniform_(0.5, 1.5)
    model.save_pretrained(path)
    return path


def vllm_of(path: Path, tp: int, dtype: str = "fp32", **rollout: Any) -> VLLMEngine:
    config = RolloutConfig(tensor_parallel_size=tp, kv_cache_gb=0.05, max_num_seqs=8, **rollout)
    return VLLMEngine(str(path), config, dtype=dtype, device_type="cpu", max_model_len=64, seed=0)


def kl_error(policy: Engine, groups: list[list[Completion]]) -> float:
    """Mean over all sampled tokens of exp(d) - 1 - d, d the difference of log-probabilities: `gen_kl_error`."""
    samples, sampled = [], []
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for index, completion in enumerate(group):
            samples.append(Sample(f"p{len(samples)}", index, prompt + completion.tokens, len(prompt)))
            sampled.append(torch.tensor(completion.logps))
    difference = torch.cat([a - b for a, b in zip(policy.logps(samples), sampled, strict=True)]).double()
    return float((difference.exp() - 1 - difference).mean())


def policy_of(scratch: Path, path: Path, layout: tuple[str, ...], mesh: Mesh | None = None) -> Engine:
    (scratch / "data.jsonl").touch()
    recipe = scratch / f"recipe-{dist.get_rank()}.yaml"
    recipe.write_text(
        "algorithm: sft\ncluster: {device: cpu, gpus_per_node: 2}\nmodel: {dtype: fp32}\n"
        f"data: {{path: {scratch / 'data.jsonl'}, max_prompt_length: 32}}\nrollout: {{max_response_length: 32}}\n"
        "train: {train_global_batch_size: 4}\n"
    )
    cfg = load([str(recipe), f"model.path={path}", *layout])
    return Engine(cfg, mesh or build_mesh(cfg), read_spec(path), temperature=1.0, total_updates=1)


def run(name: str, scratch: Path) -> None:
    """Push, sample and compare; verify, and be caught."""
    case = CASES[name]
    folder = scratch / name.replace(" ", "-")
    if dist.get_rank() == 0:
        random_model(case.model, folder / "first", seed=0)
        random_model(case.model, folder / "second", seed=1)
    dist.barrier()
    policy = policy_of(scratch, folder / "second", case.layout)
    engine = vllm_of(folder / "first", case.vllm_tp)
    deal = to_engines(policy.spec, policy.mesh, case.vllm_tp)
    stream = policy.stream(1 << 17, deal)
    before = kl_error(policy, engine.generate(PROMPTS, SAMPLING, seed=0))
    push(stream, engine)
    after = kl_error(policy, engine.generate(PROMPTS, SAMPLING, seed=0))
    push(stream, engine, verify=True)
    verified = kl_error(policy, engine.generate(PROMPTS, SAMPLING, seed=0))
    caught = check_flips(stream, engine)
    check_damage(stream, engine)
    if case.vllm_tp > 1:
        check_boxes(policy, engine)
    print(f"{name}: {before:.2e} {after:.2e} {verified:.2e} {caught}", flush=True)
    assert before > 1e-4 and after < 1e-9 and verified < 1e-9, name
    engine.close()
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


def quantised(model_name: str, scratch: Path) -> None:
    """A push from TP2 to TP2, where vLLM's ranks agree on scales, quantises bit for bit as a fresh engine does."""
    from megatron.core import parallel_state

    folder = scratch / f"quantised-{model_name}"
    if dist.get_rank() == 0:
        random_model(model_name, folder / "first", seed=0)
        random_model(model_name, folder / "second", seed=1)
    dist.barrier()
    settings = {"tp": 2, "dtype": "bf16", "quantization": "fp8_per_channel"}
    fresh = vllm_of(folder / "second", **settings)
    expected = fresh.checksums(), fresh.generate(PROMPTS, SAMPLING, seed=0)
    fresh.close()
    policy = policy_of(scratch, folder / "second", TP2)
    engine = vllm_of(folder / "first", **settings)
    assert engine.checksums() != expected[0]
    stream = policy.stream(1 << 17, to_engines(policy.spec, policy.mesh, 2))
    for verify in (False, True):
        push(stream, engine, verify=verify)
        assert (engine.checksums(), engine.generate(PROMPTS, SAMPLING, seed=0)) == expected
    print(f"{model_name}: quantised alike", flush=True)
    engine.close()
    parallel_state.destroy_model_parallel()


def greedy(model_name: str, scratch: Path) -> None:
    """What megatron exports, vLLM serves: the same greedy tokens as transformers with the original."""
    from megatron.core import parallel_state
    from transformers import AutoModelForCausalLM

    folder = scratch / f"greedy-{model_name}"
    if dist.get_rank() == 0:
        random_model(model_name, folder / "model", seed=2)
    dist.barrier()
    # Before vLLM is imported, which changes some of transformers' models.
    reference = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = []
    for prompt in PROMPTS:
        given = torch.tensor([prompt])
        tokens = reference.generate(given, attention_mask=torch.ones_like(given), **settings)[0, len(prompt) :]
        expected.append(tokens.tolist())
    policy = policy_of(scratch, folder / "model", EP2 if read_spec(folder / "model").moe else PP2)
    policy.save_hf(folder / "export", bucket_bytes=1 << 16)
    engine = vllm_of(folder / "export", tp=1)
    groups = engine.generate(PROMPTS, Sampling(max_tokens=12, temperature=0), seed=0)
    assert [group[0].tokens for group in groups] == expected, model_name
    print(f"{model_name}: {sum(len(group[0].tokens) for group in groups)} greedy tokens equal", flush=True)
    engine.close()
    parallel_state.destroy_model_parallel()


class Flipping:
    """An engine in one of whose weights a bit changes after the first load."""

    def __init__(self, engine: VLLMEngine, which: str) -> None:
        self.engine, self.which, self.loads = engine, which, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        self.engine.load_weights(weights)
        self.loads += 1
        if self.loads == 1 and dist.get_rank() == 1:
            self.engine._engine.apply_model(self.flip)

    def flip(self, model: torch.nn.Module) -> None:
        tensor = dict(model.named_parameters())[self.which].data
        tensor[(-1,) * tensor.dim()].view(torch.int32).bitwise_xor_(1)  # the last bit of the last element


def check_flips(stream: WeightStream, engine: VLLMEngine) -> list[str]:
    """One flipped bit in one rank's copy of one weight stops all ranks, with its name."""
    [names] = engine._engine.apply_model(flippable)
    for name in names:
        try:
            push(stream, Flipping(engine, name), verify=True)
        except SyncError as error:
            assert "rank 1: " in str(error) and name in str(error) and "rank 0" not in str(error), error
        else:
            raise AssertionError(f"a flipped bit of {name} was not found")
    return names


def check_damage(stream: WeightStream, engine: VLLMEngine) -> None:
    """A bit that changes on the way to one rank stops all, with the name of the tensor."""
    transport, (bucket,) = stream.transport, [b for b in stream.buckets if b.receives][:1]
    name = Damaged.victim(bucket).item.name
    if dist.get_rank() == 1:
        stream.transport = Damaged(transport, bucket)
    said: list[str] = [name] * dist.get_world_size()
    dist.all_gather_object(said, name)
    try:
        push(stream, engine, verify=True)
    except SyncError as error:
        assert f"rank 1: {said[1]}" in str(error) and "rank 0" not in str(error), error
    else:
        raise AssertionError(f"a flipped bit of {said[1]} was not found")
    stream.transport = transport


def check_boxes(policy: Engine, engine: VLLMEngine) -> None:
    """Boxes that are not what vLLM takes, by one row, are refused at any push, with the name of the tensor."""
    kept = kept_by(policy.spec, dist.get_world_size())

    def shifted(tp_rank: int, tensor: CanonTensor, name: str) -> Box:
        box = kept(tp_rank, tensor, name)
        return box if box.bottom is None else Box(box.top + 1, box.bottom + 1)

    with mock.patch("megarl.weights.sync.kept_by", lambda spec, size: shifted):
        deal = to_engines(policy.spec, policy.mesh, dist.get_world_size())
    try:
        push(policy.stream(1 << 17, deal), engine)
    except SyncError as error:
        assert "of it, of which only [" in str(error) and ".weight: " in str(error), error
    else:
        raise AssertionError("boxes that are a row off were not found")


def flippable(model: torch.nn.Module) -> list[str]:
    """One weight of every kind that vLLM keeps as a tensor."""
    kinds: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        if parameter.numel():
            kinds.setdefault(".".join(part for part in name.split(".") if not part.isdigit()), name)
    return list(kinds.values())


def main(scratch: Path, names: list[str]) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for name in names:
        kind, _, model = name.partition(" ")
        if kind == "greedy":
            greedy(model, scratch)
        elif kind == "quantised":
            quantised(model, scratch)
        else:
            run(name, scratch)
    dist.barrier()
    print("all cases passed", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
