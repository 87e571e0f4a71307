"""The tiny model of examples/: its tokenizer spells any text, and stays within the model's vocabulary."""

import json
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parents[1] / "examples" / "tiny_model.py"


def test_any_text_comes_back_and_every_token_is_the_models(tmp_path: Path) -> None:
    rows = [
        {"question": f"{n} apples and {n} pears?", "answer": f"{n}+{n}=<<{n}+{n}={2 * n}>>\n#### {2 * n}"}
        for n in range(99)
    ]
    jsonl, plain = tmp_path / "rows.jsonl", tmp_path / "plain.txt"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain.write_text("A line of text.\nAnother zebra.\n")
    command = [sys.executable, str(SCRIPT), str(tmp_path / "tiny"), "--text", str(jsonl), str(plain)]
    subprocess.run(command, check=True, timeout=120)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    assert len(tokenizer) == model.config.vocab_size <= 2_000
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    for text in (rows[7]["question"], rows[7]["answer"], "naïve – 你好 \t x"):
        tokens = tokenizer(text)["input_ids"]
        assert tokenizer.decode(tokens) == text
        assert not {tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id} & set(tokens)
    assert len(tokenizer(" apples")["input_ids"]) == 1  # learned from the records, keys left out
