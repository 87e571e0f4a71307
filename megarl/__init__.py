"""megarl: LLM post-training with Megatron-core policies and vLLM rollouts in one SPMD program."""

__version__ = "0.1.0"
