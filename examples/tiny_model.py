"""A tiny random Qwen2-type model with a byte-level tokenizer trained on your text, as a Hugging Face directory.

    python examples/tiny_model.py FOLDER --text FILE [FILE ...] [--seed N]

Of a .jsonl file the tokenizer learns every text of every record; of any other, its lines. A model this small learns no
grade-school maths, but it takes a run through real rows on a laptop: see cpu_gsm8k.yaml.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

VOCABULARY = 2_000
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ':\n' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
# Bytes spell everything; but without an <unk>, transformers would give a Qwen2 model's tokenizer one of its own, beyond
# the model's vocabulary.
SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}


def read_texts(files: Iterable[Path]) -> Iterator[str]:
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            if file.suffix == ".jsonl":
                yield from (value for value in json.loads(line).values() if isinstance(value, str))
            else:
                yield line


def make_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be spelt, and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    own = {"clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **own, **SPECIAL)


def make_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2Config:
    """0.8 M parameters with the whole vocabulary; heads of 32, the smallest that vLLM computes on a CPU."""
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a tiny random Qwen2-type model with a tokenizer of your text.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE", help=".jsonl, or plain text")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    tokenizer = make_tokenizer(read_texts(args.text))
    torch.manual_seed(args.seed)
    Qwen2ForCausalLM(make_config(tokenizer)).save_pretrained(args.folder)
    tokenizer.save_pretrained(args.folder)


if __name__ == "__main__":
    main()
