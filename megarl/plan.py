"""`megarl plan`: what a recipe takes of each GPU's memory, by formulas over the model's sizes; nothing is built or run.

The formulas (Megatron's `theoretical_memory_usage.py` and 2205.05198, spelled out per term) count what grows with the
model and the batch. What does not, CUDA's contexts and NCCL's buffers, is `RESIDUE`. Experts are taken to be evenly
loaded. P parameters are those of a rank, d the ranks that share its optimizer's state, T a rank's tokens of a
microbatch, h the hidden size.

=============  =================================================================================
weights        2 P (bf16)
gradients      4 P
optimizer      12 P / d: fp32 weights and Adam's two moments; 8 P / d where the moments are bf16
activations    of each layer that is kept, and token: `layer_activations`; or 2 h and one layer
head           one chunk of logits, three copies in fp32, and the fp32 gradient of its weights
=============  =================================================================================

This module needs neither torch nor megatron.
"""

from __future__ import annotations

from dataclasses import dataclass

from megarl.config import Config
from megarl.config.algorithm import ON_POLICY
from megarl.config.model import VOCABULARY_BLOCK
from megarl.config.sizes import expert_tensor_parallel, first_stage, job_size, last_stage
from megarl.model.family import ModelSpec
from megarl.model.flops import attention_parameters

GB = 1e9
RESIDUE = 4 * GB  # contexts, NCCL, and what vLLM keeps asleep (CUDA graphs); 3 to 5 GB are reported


@dataclass(frozen=True)
class Plan:
    """Bytes on the fullest rank."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    rollout_weights: float  # of vLLM on a rank, within its share of the memory
    away: float  # of weights, gradients and optimizer while vLLM generates

    @property
    def training(self) -> float:
        """At the peak of an update; vLLM sleeps."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.head + RESIDUE

    @property
    def beside_rollout(self) -> float:
        """What the trainer holds while vLLM generates."""
        return self.weights + self.gradients + self.optimizer - self.away + RESIDUE


def plan(cfg: Config, spec: ModelSpec) -> Plan:
    """The memory of the policy's ranks."""
    stages = _stages(cfg, spec)
    dense, experts = max((_parameters(cfg, spec, layers) for layers in stages), key=sum)
    width = 2 if cfg.model.dtype == "bf16" else 4
    p, o = cfg.parallel, cfg.optimizer
    over = job_size(cfg) // (p.tensor_model_parallel_size * p.pipeline_model_parallel_size)
    apart = p.expert_model_parallel_size * expert_tensor_parallel(cfg) * p.pipeline_model_parallel_size
    sharded = o.use_distributed_optimizer
    updated = dense / (over if sharded else 1) + experts / (job_size(cfg) // apart if sharded else 1)
    moments = 4 if o.use_precision_aware_optimizer else 8
    moments *= 1 - o.optimizer_offload_fraction * o.optimizer_cpu_offload
    weights, gradients = width * (dense + experts), 4.0 * (dense + experts)
    optimizer = (moments + (4 if width == 2 else 0)) * updated
    leaves = cfg.offload
    on_policy = cfg.algorithm in ON_POLICY
    return Plan(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=max(_activations(cfg, spec, at, layers) for at, layers in enumerate(stages)),
        head=_head(cfg, spec),
        rollout_weights=_rollout_weights(cfg, spec) if on_policy else 0.0,
        away=weights * leaves.params + gradients * leaves.grads + optimizer * leaves.optimizer,
    )


def _rollout_weights(cfg: Config, spec: ModelSpec) -> float:
    """vLLM's of a rank; quantised are the layers', not embedding and head."""
    width = 2 if (cfg.rollout.dtype or cfg.model.dtype) == "bf16" else 4
    ends = spec.hidden_size * spec.vocab_size * (1 if spec.tied else 2)
    layers = total_parameters(spec) - ends
    return (width * ends + (1 if cfg.rollout.quantization else width) * layers) / cfg.rollout.tensor_parallel_size


def total_parameters(spec: ModelSpec) -> int:
    """All of the model's, but for norms and biases."""
    embeddings = spec.hidden_size * spec.vocab_size * (1 if spec.tied else 2)
    return embeddings + sum(sum(layer_parameters(spec, i)) for i in range(spec.num_layers))


def layer_parameters(spec: ModelSpec, i: int) -> tuple[int, int]:
    """(of attention and an MLP, of experts) of a layer."""
    attention, h = attention_parameters(spec), spec.hidden_size
    if not spec.is_moe(i):
        return attention + 3 * h * spec.ffn_hidden_size, 0
    moe = spec.moe
    assert moe is not None, "a layer with experts"
    beside = h * moe.num_experts + 3 * h * moe.shared_ffn_hidden_size
    return attention + beside, 3 * h * moe.ffn_hidden_size * moe.num_experts


def layer_activations(spec: ModelSpec, i: int) -> float:
    """Bytes that a layer keeps of each token for its backward pass, in bf16: inputs of both norms and of what follows
    them, queries, keys, values and attention's output, and of the MLP two halves and their product; of a mixture,
    those of the experts that a token goes to, and its copies on the way there and back."""
    h, heads = spec.hidden_size, spec.num_attention_heads
    if spec.mla is None:
        attention = 4 * heads * spec.kv_channels + 4 * spec.num_query_groups * spec.kv_channels
    else:
        mla = spec.mla
        key = mla.qk_head_dim + mla.qk_pos_emb_head_dim
        latent = (mla.q_lora_rank or 0) + mla.kv_lora_rank + mla.qk_pos_emb_head_dim
        attention = 4 * heads * key + 4 * heads * mla.v_head_dim + 4 * latent
    if not spec.is_moe(i):
        return 8 * h + attention + 6 * spec.ffn_hidden_size
    moe = spec.moe
    assert moe is not None, "a layer with experts"
    return 8 * h + attention + moe.topk * (4 * h + 6 * moe.ffn_hidden_size) + 6 * moe.shared_ffn_hidden_size


def _stages(cfg: Config, spec: ModelSpec) -> list[range]:
    """Layers of each pipeline stage; an interleaved one has the same number, from elsewhere."""
    stages = cfg.parallel.pipeline_model_parallel_size
    first, last = first_stage(cfg), last_stage(cfg)
    if stages == 1:
        return [range(spec.num_layers)]
    middle = spec.num_layers - (first or 0) - (last or 0)
    each = middle // max(1, stages - (first is not None) - (last is not None))
    counts = [each] * stages
    counts[0], counts[-1] = first or each, last or each
    ends = [sum(counts[: k + 1]) for k in range(stages)]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def _parameters(cfg: Config, spec: ModelSpec, layers: range) -> tuple[float, float]:
    """(dense, of experts) on a rank of the stage with these layers."""
    p = cfg.parallel
    dense = experts = 0.0
    for i in layers:
        one, other = layer_parameters(spec, i)
        dense, experts = dense + one, experts + other
    ends = (layers.start == 0) + (layers.stop == spec.num_layers)  # the embedding, the head
    dense += (min(ends, 1) if spec.tied else ends) * spec.hidden_size * spec.vocab_size
    tp = p.tensor_model_parallel_size
    return dense / tp, experts / (p.expert_model_parallel_size * expert_tensor_parallel(cfg))


def _activations(cfg: Config, spec: ModelSpec, stage: int, layers: range) -> float:
    """Of the microbatches that a stage has begun and not ended."""
    p, m = cfg.parallel, cfg.model
    pp, chunks = p.pipeline_model_parallel_size, p.virtual_pipeline_model_parallel_size or 1
    flying = pp - stage if chunks == 1 else pp * (1 + (pp - 1) / (pp * chunks))
    shards = p.tensor_model_parallel_size if p.sequence_parallel else 1
    tokens = cfg.train.train_mb_tokens / shards
    each = [layer_activations(spec, i) for i in layers]
    if m.recompute_granularity == "full":
        kept = len(layers) if m.recompute_method == "uniform" else min(m.recompute_num_layers or 0, len(layers))
        unit = (m.recompute_num_layers or 1) if m.recompute_method == "uniform" else 1
        inputs = 2 * spec.hidden_size * kept / unit + sum(each[kept:])
        return tokens * (flying * inputs + unit * max(each))
    return tokens * flying * sum(each)


def _head(cfg: Config, spec: ModelSpec) -> float:
    rows = spec.vocab_size / cfg.parallel.tensor_model_parallel_size
    return 4 * (3 * cfg.model.logprob_chunk_size * min(rows, VOCABULARY_BLOCK) + rows * spec.hidden_size)


def rows_of(found: Plan, cfg: Config, gpu_gb: float) -> list[tuple[str, str]]:
    """The table: what, and how many GB of it."""
    terms = ("weights", "gradients", "optimizer", "activations", "head")
    rows = [(name, f"{vars(found)[name] / GB:.1f}") for name in terms]
    rows += [("contexts and buffers", f"{RESIDUE / GB:.1f}"), ("training, at its peak", f"{found.training / GB:.1f}")]
    if cfg.algorithm in ON_POLICY:
        share = cfg.rollout.gpu_memory_utilization * gpu_gb
        remote = cfg.rollout.mode == "remote"
        rows.append(("a server's share of a GPU" if remote else "vLLM's share while it generates", f"{share:.1f}"))
        rows.append(("of it weights", f"{found.rollout_weights / GB:.1f}"))
        if not remote:
            rows.append(("the trainer beside it", f"{found.beside_rollout / GB:.1f}"))
            rows.append(("rollout, in all", f"{share + found.beside_rollout / GB:.1f}"))
    return rows


def too_much(found: Plan, cfg: Config, gpu_gb: float) -> list[str]:
    """Reasons why a recipe does not fit GPUs of that size."""
    out = []
    if found.training > gpu_gb * GB:
        out.append(f"training takes {found.training / GB:.1f} GB of {gpu_gb:.0f}")
    if cfg.algorithm in ON_POLICY:
        share = cfg.rollout.gpu_memory_utilization * gpu_gb
        if cfg.rollout.mode == "colocated" and share + found.beside_rollout / GB > gpu_gb:
            out.append(f"vLLM's {share:.1f} GB and the trainer's {found.beside_rollout / GB:.1f} are over {gpu_gb:.0f}")
        if found.rollout_weights > 0.8 * share * GB:
            out.append(f"vLLM's weights, {found.rollout_weights / GB:.1f} GB, leave no room in its {share:.1f} GB")
    return out
