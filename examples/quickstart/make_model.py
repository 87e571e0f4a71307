"""A small Qwen2-type model with random weights and a tokenizer of its own, as a Hugging Face directory.

python make_model.py FOLDER [--seed N]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

CHARACTERS = "0123456789+=uth#"
SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL.values(), *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def make_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2Config:
    """0.3 M parameters; heads of 32, the smallest that vLLM computes on a CPU."""
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        # Texts have 45 tokens: a small base turns the angles fast enough to tell neighbouring digits apart, and larger
        # initial weights find the way to them in fewer steps.
        rope_parameters={"rope_type": "default", "rope_theta": 10.0},
        initializer_range=0.08,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a small random Qwen2-type model with its tokenizer.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    disable_progress_bar()
    tokenizer = make_tokenizer()
    torch.manual_seed(args.seed)
    Qwen2ForCausalLM(make_config(tokenizer)).save_pretrained(args.folder)
    tokenizer.save_pretrained(args.folder)


if __name__ == "__main__":
    main()
