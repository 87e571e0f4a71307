"""The policy: the model, how it is divided over ranks, and its optimizer."""

from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING


@dataclass(frozen=True)
class ModelConfig:
    path: str = MISSING
    """Hugging Face directory of the policy: config.json, safetensors and tokenizer."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Number format of weights and activations; the optimizer's own copy is always fp32."""
    logprob_chunk_size: int = 256
    """Tokens whose logits exist at the same time; smaller needs less memory."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """What the backward pass computes again instead of keeping: whole layers, or only `recompute_modules`."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With full recompute: all layers in units of `recompute_num_layers`, or only that many layers of a stage."""
    recompute_num_layers: int | None = None
    """With full recompute: layers in a unit (uniform), or recomputed layers in a stage (block)."""
    recompute_modules: list[str] = field(default_factory=list)
    """With selective recompute: which parts of a layer, of core_attn and mlp."""
    model_overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of megatron's TransformerConfig to set by name, over what its family says, but for layout and numbers."""


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
    sequence_parallel: bool = False
    """Divide activations outside the matrices over the tensor-parallel ranks too."""
    expert_model_parallel_size: int = 1
    """Ranks that share the experts of each layer, each holding some of them whole."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that share each expert's matrices; null means `tensor_model_parallel_size`."""
    num_layers_in_first_pipeline_stage: int | None = None
    """Layers of the first stage, which also holds the embedding; null divides evenly."""
    num_layers_in_last_pipeline_stage: int | None = None
    """Layers of the last stage, which also computes the log-probs; null divides evenly."""


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
