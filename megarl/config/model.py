"""The policy: the model, how it is divided over ranks, and its optimizer."""

from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

VOCABULARY_BLOCK = (
    1 << 14
)  # rows of the head whose logits exist at once, beside `ModelConfig.logprob_chunk_size` tokens


@dataclass(frozen=True)
class ModelConfig:
    path: str = MISSING
    """Hugging Face directory of the policy: config.json, safetensors and tokenizer."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Number format of weights and activations; the optimizer's own copy is always fp32."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model or tokenizer; false refuses directories that need it."""
    logprob_chunk_size: int = 256
    """Tokens whose logits exist at the same time, for 16,384 ids of the vocabulary; smaller needs less memory."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """What the backward pass computes again instead of keeping: whole layers, or only `recompute_modules`."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With full recompute: all layers in units of `recompute_num_layers`, or only that many layers of a stage."""
    recompute_num_layers: int | None = None
    """With full recompute: layers in a unit (uniform), or recomputed layers in a stage (block)."""
    recompute_modules: list[str] = field(default_factory=list)
    """With selective recompute: which parts of a layer, of those that `config/memory.py` lists."""
    freeze_router: bool = False
    """Leave the routers of experts as they are; everything else is trained."""
    moe_aux_loss_coeff: float = 0.0
    """Weight of the loss that balances the experts' load within a microbatch (Switch, 2101.03961); 0 leaves it out."""
    model_overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of megatron's TransformerConfig to set by name, over what its family says, but for layout and numbers."""


@dataclass(frozen=True)
class FP8Config:
    enabled: bool = False
    """Multiply the layers' matrices in FP8, by Transformer Engine; attention, norms, router and the head stay bf16."""
    fp8: Literal["e4m3", "hybrid"] = "e4m3"
    """Number format: e4m3 throughout, or (hybrid) e5m2 for gradients."""
    fp8_recipe: Literal["tensorwise", "blockwise", "delayed", "mxfp8"] = "blockwise"
    """What shares a scale: a tensor, 128 x 128 of a weight and 128 of a token, a tensor by its history, or 32."""
    fp8_param: bool = False
    """Keep the layers' weights in FP8 too, and gather them so; the optimizer has them in fp32."""
    first_last_layers_bf16: bool = False
    """Leave the first and last layers in bf16."""
    num_layers_at_start_in_bf16: int = 1
    """With `first_last_layers_bf16`: how many first ones."""
    num_layers_at_end_in_bf16: int = 1
    """With `first_last_layers_bf16`: how many last ones."""
    metrics: bool = False
    """Log for each layer its inputs' largest value, and how much of them FP8 rounds to 0."""


@dataclass(frozen=True)
class ParallelConfig:
    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's matrices."""
    pipeline_model_parallel_size: int = 1
    """Stages that the layers are divided into."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Chunks of layers that each stage holds and works on in turn, so that it waits less; null does not interleave."""
    context_parallel_size: int = 1
    """Ranks that share the tokens of each sequence: for long ones."""
    dynamic_context_parallel: bool = False
    """Let 1, 2, 4, ... of those ranks share a sequence, as many as its length asks for; short ones stay on one each."""
    sequence_parallel: bool = False
    """Divide activations outside the matrices over the tensor-parallel ranks too."""
    expert_model_parallel_size: int = 1
    """Ranks that share the experts of each layer, each holding some of them whole."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that share each expert's matrices; null means `tensor_model_parallel_size`."""
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens get to their experts: to these ranks alone, or to all, which costs less where ranks are few."""
    num_layers_in_first_pipeline_stage: int | None = None
    """Layers of the first stage, which also holds the embedding; null divides evenly."""
    num_layers_in_last_pipeline_stage: int | None = None
    """Layers of the last stage, which also computes the log-probs; null divides evenly."""


@dataclass(frozen=True)
class OffloadConfig:
    params: bool = False
    """Keep the weights in host memory while nothing is computed with them, such as while vLLM generates."""
    grads: bool = False
    """Free the gradients' memory between updates; each begins with zeros."""
    optimizer: bool = False
    """Keep Adam's moments and the fp32 weights in host memory between updates."""


@dataclass(frozen=True)
class OptimizerConfig:
    lr: float = 1e-6
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after the warm-up."""
    lr_warmup_iters: int = 0
    """Optimizer updates over which the learning rate rises from 0."""
    lr_decay_iters: int | None = None
    """Optimizer updates until `min_lr` is reached, warm-up included; null means the run's last update."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    adam_beta1: float = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: float = 0.999
    """Decay of Adam's second moment."""
    adam_eps: float = 1e-8
    """Added to the root of Adam's second moment."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    use_distributed_optimizer: bool = True
    """Divide the optimizer's state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    optimizer_cpu_offload: bool = False
    """Keep Adam's moments in host memory for good, and compute their part of the update there."""
    optimizer_offload_fraction: float = 1.0
    """With `optimizer_cpu_offload`: share of the moments that this holds for."""
    use_precision_aware_optimizer: bool = False
    """Keep Adam's moments in bf16 and the fp32 weights inside Transformer Engine's Adam, which alone can."""
