"""megatron-core itself reads what `megarl convert` wrote, and writes what it will read.

Under torchrun with 4 ranks: ``mcore_cases.py <scratch folder>``. The models are plain GPTModels of megatron's local
layers, not megarl's own. Every tensor's numbers follow from its canonical name, so that no rank needs another's.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.model.family import ModelSpec, read_spec
from megarl.weights.names import canonical_parameters
from megarl.weights.rules import CanonTensor, Shard
from megarl.weights.shard import columns_of, padded_vocab, rows_of

# (TP, PP, EP); what is left of 4 ranks is data parallel
LAYOUTS = [(1, 1, 1), (2, 1, 1), (2, 2, 1), (1, 4, 1), (1, 1, 2)]
MASTER_SCALE = 1 + 2.0**-12  # fp32 masters that bf16 cannot hold


def numbers(tensor: CanonTensor, dtype: torch.dtype) -> Tensor:
    """The whole canonical tensor: random, the same everywhere."""
    generator = torch.Generator().manual_seed(zlib.crc32(tensor.name.encode()))
    return torch.randn(tensor.shape, generator=generator).to(torch.float32 if tensor.keep_fp32 else dtype)


def local_numbers(tensor: CanonTensor, dtype: torch.dtype, tp_size: int, tp_rank: int) -> Tensor:
    """A rank's part of `numbers`; rows that pad the vocabulary are 0."""
    whole = numbers(tensor, dtype)
    if tensor.shard is Shard.VOCAB:
        padding = padded_vocab(tensor.shape[0], tp_size) - tensor.shape[0]
        whole = torch.cat([whole, whole.new_zeros(padding, *tensor.shape[1:])])
    rows = torch.cat([whole[start:stop] for start, stop in rows_of(tensor, tp_size, tp_rank)])
    columns = columns_of(tensor, tp_size, tp_rank)
    return rows if columns is None else rows[:, columns]


def build(spec: ModelSpec, layout: tuple[int, int, int], dtype: torch.dtype) -> torch.nn.Module:
    """This rank's part of a GPTModel, every number NaN."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    tp, pp, ep = layout
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tp, pp, expert_model_parallel_size=ep)
    model_parallel_cuda_manual_seed(0, force_reset_rng=True)
    experts: dict[str, Any] = {}
    if spec.moe:
        experts = {"num_moe_experts": spec.moe.num_experts, "moe_ffn_hidden_size": spec.moe.ffn_hidden_size}
        experts |= {"moe_router_topk": spec.moe.topk, "moe_grouped_gemm": False}
    config = TransformerConfig(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.ffn_hidden_size,
        num_attention_heads=spec.num_attention_heads,
        num_query_groups=spec.num_query_groups,
        kv_channels=spec.kv_channels,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        qk_layernorm=spec.qk_layernorm,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        **experts,
    )
    layer = get_gpt_layer_local_spec(
        num_experts=experts.get("num_moe_experts"), qk_layernorm=spec.qk_layernorm, normalization="RMSNorm"
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=layer,
        vocab_size=padded_vocab(spec.vocab_size, tp),
        max_sequence_length=spec.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=spec.tied,
        position_embedding_type="rope",
    ).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    return model


def expected(model: torch.nn.Module, spec: ModelSpec, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(canonical name, parameter, the numbers it must have) of every parameter of this rank."""
    from megatron.core import parallel_state

    tensors = {tensor.name: tensor for tensor in spec.tensors()}
    tp = (parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank())
    etp = (parallel_state.get_expert_tensor_parallel_world_size(), parallel_state.get_expert_tensor_parallel_rank())
    ep_size, ep_rank = (
        parallel_state.get_expert_model_parallel_world_size(),
        parallel_state.get_expert_model_parallel_rank(),
    )
    first_expert = ep_rank * (spec.moe.num_experts // ep_size) if spec.moe else 0
    for name, parameter in canonical_parameters(model, spec, first_expert):
        tensor = tensors[name]
        yield name, parameter, local_numbers(tensor, dtype, *(tp if tensor.expert is None else etp))


def read_with_megatron(folder: Path, spec: ModelSpec, dtype: torch.dtype, stacked: bool, strict: str) -> None:
    """Load with every layout, and compare every parameter bitwise."""
    from megatron.core import dist_checkpointing

    for layout in [layout for layout in LAYOUTS if spec.moe or layout[2] == 1]:
        model = build(spec, layout, dtype)
        sharded = model.sharded_state_dict(metadata={"non_homogeneous_layers": not stacked})
        loaded = dist_checkpointing.load({"model": sharded}, str(folder), strict=strict)
        model.load_state_dict(loaded["model"])
        compared = 0
        for name, parameter, wanted in expected(model, spec, dtype):
            assert parameter.dtype == wanted.dtype and torch.equal(parameter, wanted), (folder.name, layout, name)
            compared += 1
        assert compared and loaded["iteration"] == 7, (folder.name, layout, loaded.keys())
        if dist.get_rank() == 0:
            print(
                f"read {folder.parent.name} at TP, PP, EP {layout}: {compared} parameters of rank 0 equal", flush=True
            )


def write_with_megatron(folder: Path, spec: ModelSpec, layout: tuple[int, int, int], stacked: bool) -> None:
    """Save a bf16 model with its optimizer, whose masters are the weights times `MASTER_SCALE`."""
    from megatron.core import dist_checkpointing
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    dtype = torch.bfloat16
    bare = build(spec, layout, dtype)
    with torch.no_grad():
        for _, parameter, wanted in expected(bare, spec, dtype):
            parameter.copy_(wanted)
    settings = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    model = DistributedDataParallel(bare.config, settings, bare)
    adam = OptimizerConfig(optimizer="adam", lr=1e-3, bf16=True, params_dtype=dtype, use_distributed_optimizer=True)
    optimizer = get_megatron_optimizer(adam, [model], use_gloo_process_groups=False)
    for parameter in model.parameters():
        parameter.main_grad.fill_(1e-3)
    optimizer.step()  # makes Adam's state
    with torch.no_grad():
        for _, parameter, wanted in expected(bare, spec, dtype):
            parameter.copy_(wanted)
    for part in optimizer.chained_optimizers:
        part.reload_model_params()
        for group in part.shard_fp32_from_float16_groups:
            for master in group:
                master.data.mul_(MASTER_SCALE)
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "non_homogeneous_layers": not stacked}
    metadata["chained_optim_avoid_prefix"] = True
    weights = bare.sharded_state_dict(metadata=metadata)
    state = {
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(weights, metadata=metadata),
        "args": argparse.Namespace(num_layers=spec.num_layers, odd=Path("a")),
        "iteration": 9,
        "checkpoint_version": 3.0,
    }
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(state, str(folder), content_metadata=metadata)


def main(scratch: Path) -> None:
    import megatron.core

    from megarl.parallel.cpu import megatron_on_cpu

    dist.init_process_group("gloo")
    with megatron_on_cpu():
        for job in json.loads((scratch / "jobs.json").read_text()):
            spec = read_spec(job["model"])
            if job["do"] == "read":
                dtype = getattr(torch, job["dtype"])
                read_with_megatron(Path(job["folder"]), spec, dtype, job["stacked"], job["strict"])
            else:
                write_with_megatron(Path(job["folder"]), spec, tuple(job["layout"]), job["stacked"])
    if dist.get_rank() == 0:
        print(f"all cases passed with megatron-core {megatron.core.__version__}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
