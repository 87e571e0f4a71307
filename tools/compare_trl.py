"""Every method that TRL has too: loss and gradient norm of the first updates, megarl beside TRL.

    .venv/bin/python tools/compare_trl.py [METHOD ...] [--trl-python PYTHON] [--keep FOLDER]

The same tiny Llama in Hugging Face format, the same batches, AdamW without decay, fp32, no dropout; parity/methods.py
says what is equal and how. Numbers agree within 2e-4 + 2e-4 x TRL's, or the table says by how much they do not and the
exit code is 1. TRL lives in a virtual environment of its own, which bench/trl_setup.sh makes in $MEGARL_BENCH_HOME
(default /tmp/megarl-bench) when it is missing. Takes about two minutes on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "parity"))

from methods import CHARACTERS, METHODS, SPECIAL, STEPS, make  # noqa: E402

ABSOLUTE, RELATIVE = 2e-4, 2e-4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of: {', '.join(METHODS)}; all without any")
    parser.add_argument("--trl-python", type=Path, help="Python of an environment that has TRL")
    parser.add_argument("--keep", type=Path, help="folder for models, data, logs and curves (default: a temporary one)")
    args = parser.parse_args()
    if unknown := [name for name in args.methods if name not in METHODS]:
        parser.error(f"no such methods: {', '.join(unknown)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        return compare(folder, args.methods or list(METHODS), args.trl_python or trl_environment())


def trl_environment() -> Path:
    subprocess.run(["bash", str(HERE / "bench/trl_setup.sh")], check=True)
    return Path(os.environ.get("MEGARL_BENCH_HOME", "/tmp/megarl-bench")) / "trl-venv/bin/python"


def compare(folder: Path, names: list[str], trl_python: Path) -> int:
    make(folder)
    make_models(folder)
    # Without the tokenizer's file the classifier could not be trained by itself.
    sides = {"megarl": Path(sys.executable), "trl": trl_python}
    for side, python in sides.items():
        run(side, python, folder, names)
    ours, theirs = (json.loads((folder / f"{side}.json").read_text()) for side in sides)
    print(f"{'method':24} {'loss 1':>10} {'loss ' + str(STEPS):>10} {'|d loss|':>10} {'|d norm|':>10}")
    bad = [name for name in names if not print_row(name, ours[name], theirs[name])]
    print(f"{len(names) - len(bad)} of {len(names)} agree within {ABSOLUTE:g} + {RELATIVE:g} x TRL's")
    return int(bool(bad))


def make_models(folder: Path) -> None:
    """A language model and, with the same body, a model of one score; a token is a character."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    vocabulary = {token: i for i, token in enumerate([*SPECIAL.values(), *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=vocabulary[SPECIAL["eos_token"]],
        pad_token_id=vocabulary[SPECIAL["pad_token"]],
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    config.num_labels = 1
    classifier = LlamaForSequenceClassification(config)
    classifier.model.load_state_dict(model.model.state_dict())
    classifier.save_pretrained(folder / "classifier")
    for name in ("model", "classifier"):
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(folder / name)


def run(side: str, python: Path, folder: Path, names: list[str]) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"PYTHONPATH": str(HERE.parent), "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / f"{side}.log").open("w") as log:
        command = [str(python), str(HERE / "parity" / f"{side}_side.py"), str(folder), *names]
        code = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        sys.exit(f"{side} ended with code {code}:\n{(folder / f'{side}.log').read_text()[-3000:]}")


def print_row(name: str, ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether both curves agree."""
    if "error" in theirs:
        print(f"{name:24} TRL did not run it: {theirs['error'].strip().splitlines()[-1]}")
        return False
    worst, agree = {}, True
    for key in ("loss", "grad_norm"):
        a, b = ours[key], theirs[key]
        differences = [abs(x - y) for x, y in zip(a, b, strict=False)]
        worst[key] = max(differences, default=float("nan"))
        within = all(d <= ABSOLUTE + RELATIVE * abs(y) for d, y in zip(differences, b, strict=True))
        agree &= len(a) == len(b) == STEPS and within
    first, last = theirs["loss"][0], theirs["loss"][-1]
    said = "; ".join(text for text in ("" if agree else "differs", METHODS[name].note) if text)
    print(f"{name:24} {first:10.5f} {last:10.5f} {worst['loss']:10.1e} {worst['grad_norm']:10.1e}  {said}".rstrip())
    return agree


if __name__ == "__main__":
    sys.exit(main())
