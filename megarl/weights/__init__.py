"""Weights between Hugging Face files, megatron-core parameters and vLLM: one list of rules, used in both directions."""
