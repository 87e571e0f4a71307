"""The work that both benchmarks do: a model, prompts, and megarl's recipe for them.

A random Qwen2-type model of about a million parameters answers sums, 32 prompts x 8 samples a step. Every prompt has
`PROMPT_TOKENS` tokens and every response `NEW_TOKENS`, so that nobody pads and both sides do the same number of tokens:
the end-of-sequence token is one past the model's vocabulary, so that no sampler can ever draw it.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

PROMPTS = 32  # a step
SAMPLES = 8  # of each prompt
PROMPT_TOKENS = 12
NEW_TOKENS = 48
MAX_BATCHED_TOKENS = 8192  # of vLLM
MICROBATCHES = 4  # of a step: fastest on a CPU, by a few percent, for megarl and plain torch alike
LEARNING_RATE = 1e-4
CHARACTERS = "0123456789+-*/=.,:;!?()[]{}<>@#$%&_~^|abcdefghijklmnopqrstuvwxy"  # with <pad>: 64 tokens


def make(folder: Path, steps: int) -> None:
    """Write ``folder/model``, ``folder/train.jsonl`` with prompts for that many steps, and ``folder/grpo.yaml``."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", *CHARACTERS])}
    eos = len(vocabulary)
    words = Tokenizer(models.WordLevel(vocabulary | {"<eos>": eos}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>").save_pretrained(
        folder / "model"
    )
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,  # of 32 dimensions, the smallest that vLLM's CPU attention has a kernel for
        num_key_value_heads=2,
        vocab_size=len(vocabulary),
        max_position_embeddings=PROMPT_TOKENS + NEW_TOKENS,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=None,  # transformers would leave out this token's gradient
        tie_word_embeddings=False,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in sums(steps * PROMPTS)))
    (folder / "grpo.yaml").write_text(json.dumps(recipe(folder, steps), indent=2))  # JSON is YAML


def sums(count: int) -> list[dict[str, str]]:
    """Prompts of `PROMPT_TOKENS` characters with an answer of one digit, which random text hits now and then."""
    numbers = random.Random(0)
    pairs = [(numbers.randrange(10**5), numbers.randrange(10**5)) for _ in range(count)]
    return [{"prompt": f"{a:05}+{b:05}=", "answer": str((a + b) % 10)} for a, b in pairs]


def recipe(folder: Path, steps: int) -> dict[str, object]:
    """GRPO with one update a step; no validation, no export."""
    batch = PROMPTS * SAMPLES
    tokens = batch * (PROMPT_TOKENS + NEW_TOKENS) // MICROBATCHES
    return {
        "algorithm": "grpo",
        "run": {"root": str(folder), "name": "megarl", "seed": 0, "max_num_steps": steps},
        "cluster": {"device": "cpu"},
        "model": {"path": str(folder / "model"), "dtype": "fp32"},
        "optimizer": {"lr": LEARNING_RATE, "clip_grad": 1.0},
        "train": {"train_global_batch_size": batch, "train_mb_tokens": tokens, "logprob_mb_tokens": tokens},
        "data": {
            "path": str(folder / "train.jsonl"),
            "apply_chat_template": False,
            "max_prompt_length": PROMPT_TOKENS,
            "shuffle": False,
        },
        "rollout": {
            "num_prompts_per_step": PROMPTS,
            "num_generations_per_prompt": SAMPLES,
            "max_response_length": NEW_TOKENS,
            "max_num_seqs": batch,
            "max_num_batched_tokens": MAX_BATCHED_TOKENS,
            "kv_cache_gb": 0.25,
        },
        "reward": {"functions": [{"name": "exact"}], "workers": 1},
        "checkpoint": {"save_at_end": False},
    }
