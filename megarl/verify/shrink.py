"""A recipe made small: a random model of the same family with the same features and few layers, and a layout in which
every dimension that the recipe divides is divided by two.

What composes in the recipe composes here: tied embeddings, grouped queries, sliding windows, rope types, experts and
their groups, shared experts, latent attention, uneven stages.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megarl.config import (
    ClusterConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrimeConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from megarl.config.memory import ENGINE_ONLY

VOCABULARY = 320
LONGEST_PROMPT, LONGEST_RESPONSE = 20, 40
MODEL, SCORED = "model", "scored"  # folders of the small model, and of the same with a scalar head
_SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "head_dim": 32,
    "moe_intermediate_size": 64,
    "kv_lora_rank": 512,  # with the 64 below: the only latent that vLLM's CPU attention has a kernel for
    "q_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "sliding_window": 16,
    "n_group": 2,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_DROPPED = ("quantization_config", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype")


@dataclasses.dataclass(frozen=True)
class SmallLayout:
    """Sizes of the small layout, in `ParallelConfig`'s names where it has them, and the ranks they make."""

    parallel: ParallelConfig
    dp: int

    @property
    def world_size(self) -> int:
        p = self.parallel
        return p.tensor_model_parallel_size * p.pipeline_model_parallel_size * p.context_parallel_size * self.dp

    def describe(self) -> str:
        p = self.parallel
        sizes = {
            "TP": p.tensor_model_parallel_size,
            "PP": p.pipeline_model_parallel_size,
            "VPP": p.virtual_pipeline_model_parallel_size or 1,
            "CP": p.context_parallel_size,
            "EP": p.expert_model_parallel_size,
            "ETP": p.expert_tensor_parallel_size or 1,
            "DP": self.dp,
        }
        shown = [f"{name}{size}" for name, size in sizes.items() if size > 1] or ["1 rank"]
        shown += ["dynamic"] if p.dynamic_context_parallel else []
        uneven = p.num_layers_in_first_pipeline_stage or p.num_layers_in_last_pipeline_stage
        return " ".join([*shown, *(["SP"] if p.sequence_parallel else []), *(["uneven stages"] if uneven else [])])


def small_layout(cfg: Config, max_ranks: int) -> SmallLayout:
    """Every dimension of the recipe's layout, cut to two. Data parallelism is given up first where ranks are too many.

    Raises ValueError where the model's own dimensions already need more than ``max_ranks``.
    """
    p = cfg.parallel
    world = cfg.cluster.num_nodes * cfg.cluster.gpus_per_node
    model = p.tensor_model_parallel_size * p.pipeline_model_parallel_size * p.context_parallel_size

    def two(size: int) -> int:
        return min(size, 2)

    tp, ep = two(p.tensor_model_parallel_size), two(p.expert_model_parallel_size)
    etp = None if p.expert_tensor_parallel_size is None else two(p.expert_tensor_parallel_size)
    first, last = p.num_layers_in_first_pipeline_stage, p.num_layers_in_last_pipeline_stage
    pp, cp = two(p.pipeline_model_parallel_size), two(p.context_parallel_size)
    small = dataclasses.replace(
        p,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        virtual_pipeline_model_parallel_size=None if p.virtual_pipeline_model_parallel_size is None else 2,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        # Uneven stay uneven, below: fewer layers on the stage that the recipe sets apart.
        num_layers_in_first_pipeline_stage=None,
        num_layers_in_last_pipeline_stage=None,
    )
    if first is not None or last is not None:
        ends = (2, 4) if small.virtual_pipeline_model_parallel_size else (1, 3)
        less, more = ends if first is not None else ends[::-1]
        small = dataclasses.replace(
            small, num_layers_in_first_pipeline_stage=less, num_layers_in_last_pipeline_stage=more
        )
    needed = tp * pp * cp
    experts = ep * (etp or tp) * pp
    dp = max(1, experts // needed)  # experts may lie on data-parallel ranks
    if dp == 1 and world > model and 2 * needed <= max_ranks:
        dp = 2
    if needed * dp > max_ranks:
        raise ValueError(
            f"TP{tp} x PP{pp} x CP{cp} with EP{ep} needs {needed * dp} ranks, more than --max-ranks {max_ranks}: "
            "raise it (CPU ranks may share cores), or leave a dimension out with an override"
        )
    return SmallLayout(small, dp)


def one_rank(layout: SmallLayout) -> SmallLayout:
    """The same without anything divided."""
    whole = ParallelConfig()
    divided = {name: vars(whole)[name] for name in vars(whole) if name.endswith(("_size", "_stage", "_parallel"))}
    return SmallLayout(dataclasses.replace(layout.parallel, **divided), dp=1)


def small_recipe(cfg: Config, layout: SmallLayout, folder: Path, device: str) -> Config:
    """The recipe with the small model of ``folder``, in fp32, in several microbatches; its losses, its recomputation
    and its overrides of the model as they are.

    Gradients stay whole on every rank, and are not clipped, to be compared: clipping would hide a factor. What has no
    part in an update, such as rewards, data and files, is as it is by default.
    """
    tokens = 144 // layout.parallel.context_parallel_size
    # What balances experts depends on which samples share a microbatch: that is not the same in every layout.
    model = dataclasses.replace(cfg.model, path=str(folder / MODEL), dtype="fp32", moe_aux_loss_coeff=0.0)
    model = small_recomputation(model, transformer_engine=False)
    return Config(
        algorithm=cfg.algorithm,
        run=RunConfig(name="verify", root=str(folder / "runs"), seed=cfg.run.seed),
        cluster=ClusterConfig(num_nodes=1, gpus_per_node=layout.world_size, device=device),
        model=model,
        parallel=layout.parallel,
        optimizer=OptimizerConfig(
            use_distributed_optimizer=False, clip_grad=0.0, overlap_grad_reduce=cfg.optimizer.overlap_grad_reduce
        ),
        train=TrainConfig(
            train_global_batch_size=6 if cfg.algorithm == "online_dpo" else 12,  # pairs, or responses
            train_mb_tokens=tokens,
            logprob_mb_tokens=tokens,
        ),
        data=DataConfig(
            path=str(folder / "data.jsonl"),
            max_prompt_length=LONGEST_PROMPT,
            reference_prompt_key=cfg.data.reference_prompt_key,
        ),
        rollout=RolloutConfig(
            max_response_length=LONGEST_RESPONSE,
            num_prompts_per_step=6,
            num_generations_per_prompt=2,
            temperature=cfg.rollout.temperature,
            kv_cache_gb=0.1,
            gpu_memory_utilization=cfg.rollout.gpu_memory_utilization,
        ),
        loss=cfg.loss,
        prime=PrimeConfig(beta=cfg.prime.beta),
        teacher=cfg.teacher,
        preference=cfg.preference,
    )


def left_out(cfg: Config, small: Config) -> list[str]:
    """What of the recipe is not compared."""
    modules = [name for name in cfg.model.recompute_modules if name not in small.model.recompute_modules]
    parts = {
        "model.dtype bf16: layers are megatron's local ones in fp32, not Transformer Engine's": cfg.model.dtype
        == "bf16",
        "fp8_cfg": cfg.fp8_cfg.enabled,
        f"model.recompute_modules {', '.join(modules)}, which need Transformer Engine": bool(modules),
        "model.moe_aux_loss_coeff: it depends on which samples share a microbatch": cfg.model.moe_aux_loss_coeff > 0,
        "optimizer.use_distributed_optimizer: gradients stay whole": cfg.optimizer.use_distributed_optimizer,
        "rollout.router_replay: experts are the router's own choice": cfg.rollout.router_replay,
        "critic.own_layout: its critic lies as its policy does": cfg.critic.own_layout,
        "offload: everything stays where it is": cfg.offload != small.offload,
    }
    return [line for line, is_so in parts.items() if is_so]


def small_recomputation(model: ModelConfig, *, transformer_engine: bool) -> ModelConfig:
    """Activations computed again as in the recipe, but a layer at a time, of which there are few, and without what only
    Transformer Engine's layers can, where there are none."""
    modules = [name for name in model.recompute_modules if transformer_engine or name not in ENGINE_ONLY]
    nothing = model.recompute_granularity == "selective" and not modules
    return dataclasses.replace(
        model,
        recompute_granularity=None if nothing else model.recompute_granularity,
        recompute_num_layers=None if model.recompute_num_layers is None else 1,
        recompute_modules=modules,
    )


def as_truth(cfg: Config) -> Config:
    """Of the one rank: nothing is computed twice."""
    plain = {f"recompute_{name}": None for name in ("granularity", "method", "num_layers")}
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **plain, recompute_modules=[]))


def small_config(hf: Mapping[str, Any], layout: SmallLayout) -> dict[str, Any]:
    """config.json of the small model: the recipe's model's, with other sizes."""
    p = layout.parallel
    small = {name: value for name, value in hf.items() if name not in _DROPPED}
    small |= {name: value for name, value in _SIZES.items() if hf.get(name) is not None}
    small["initializer_range"] = 0.1  # of 0.02 logits are nearly equal
    heads, groups = hf["num_attention_heads"], hf.get("num_key_value_heads") or hf["num_attention_heads"]
    shards = p.tensor_model_parallel_size
    fewest = min(4, shards) if groups % shards == 0 else 1
    small["num_key_value_heads"] = 4 if groups == heads else max(fewest, 4 * groups // heads, 1)
    apart = p.num_layers_in_first_pipeline_stage, p.num_layers_in_last_pipeline_stage
    small["num_hidden_layers"] = layers = sum(apart) if None not in apart else 4
    for name in _EXPERTS:
        if hf.get(name) is not None:
            small[name] = 8
    if hf.get("num_experts_per_tok"):
        small["num_experts_per_tok"] = 2
    if hf.get("first_k_dense_replace") is not None:
        small["first_k_dense_replace"] = min(1, hf["first_k_dense_replace"])
    if hf.get("mlp_only_layers"):
        small["mlp_only_layers"] = [1]
    if hf.get("layer_types"):
        kinds = hf["layer_types"]
        small["layer_types"] = [
            kinds[i % len(kinds)] for i in range(layers)
        ]  # a model may have fewer than the small one
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(hf.get(name), Mapping) and "original_max_position_embeddings" in hf[name]:
            small[name] = {**hf[name], "original_max_position_embeddings": 64}
    return small


def write_small_model(
    hf: Mapping[str, Any], layout: SmallLayout, folder: Path, seed: int, changes: Mapping[str, Any] | None = None
) -> None:
    """A random model of `small_config` with ``changes``, in fp32, as a Hugging Face directory."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    small = small_config(hf, layout) | dict(changes or {})
    architectures, kind = small.pop("architectures"), small.pop("model_type")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**small)).float()
    with torch.no_grad():
        # Norms of 1 and biases of 0 would hide a mistake.
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                tensor.uniform_(-0.3, 0.3)
            elif (tensor.dim() == 1 and not name.endswith("inv_freq")) or name.endswith("_bias"):
                tensor.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": architectures}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def write_models(hf: Mapping[str, Any], layout: SmallLayout, folder: Path, seed: int) -> None:
    """`write_small_model` as ``folder / MODEL``, and the same with a scalar head as ``folder / SCORED``."""
    import torch
    from safetensors.torch import load_file, save_file

    model, scored = folder / MODEL, folder / SCORED
    write_small_model(hf, layout, model, seed)
    scored.mkdir()
    shutil.copy(model / "config.json", scored)
    generator = torch.Generator().manual_seed(seed)
    head = 0.1 * torch.randn(1, small_config(hf, layout)["hidden_size"], generator=generator)
    save_file(load_file(model / "model.safetensors") | {"score.weight": head}, scored / "model.safetensors")
