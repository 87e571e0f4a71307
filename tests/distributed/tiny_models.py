"""Tiny Hugging Face models with random weights, and the log-probs that transformers gives tokens.

Heads have 32 dimensions, the smallest that vLLM's CPU attention has a kernel for.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

VOCAB = 131  # odd: vLLM pads it
EOS = 1


def qwen2(path: Path, seed: int, tied: bool = False, heads: int = 2, width: int = 1) -> Path:
    torch.manual_seed(seed)
    config = Qwen2Config(
        hidden_size=64 * width,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=1,
        intermediate_size=96 * width,
        vocab_size=VOCAB,
        max_position_embeddings=256,
        eos_token_id=EOS,
        bos_token_id=None,
        tie_word_embeddings=tied,
        initializer_range=0.2 / width**0.5,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    return path


def mixtral(path: Path, seed: int, width: int = 1) -> Path:
    torch.manual_seed(seed)
    config = MixtralConfig(
        hidden_size=64 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64 * width,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=VOCAB,
        max_position_embeddings=256,
        eos_token_id=EOS,
        bos_token_id=None,
        initializer_range=0.2 / width**0.5,
    )
    MixtralForCausalLM(config).save_pretrained(path)
    return path


@torch.no_grad()
def reference_logps(
    model: PreTrainedModel, prompt: Sequence[int], tokens: Sequence[int], temperature: float = 1.0
) -> torch.Tensor:
    """log-softmax(logits / temperature) at `tokens` after `prompt`. [T]"""
    logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].float()  # [T, vocab]
    return (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
