"""The quickstart's problems, tokenizer and model."""

import importlib.util
import sys
from pathlib import Path

import pytest

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"


def load(name):
    spec = importlib.util.spec_from_file_location(f"quickstart_{name}", QUICKSTART / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def problems():
    return load("problems")


@pytest.fixture(scope="module")
def rows(problems):
    return problems.make(seed=7)


def test_a_worked_answer_by_hand(problems):
    # 4+8 = 12, 6+8+1 = 15, 6+8+1 = 15: 1552.
    assert problems.worked(664, 888) == "u4+8+0=12t6+8+1=15h6+8+1=15#1552"
    assert problems.worked(102, 205) == "u2+5+0=07t0+0+0=00h1+2+0=03#307"


def test_answers_are_right_and_both_styles_are_there(problems, rows):
    for row in rows["sft"]:
        a, b = row["prompt"].rstrip("=").split("+")
        assert row["response"].rpartition("#")[2] == str(int(a) + int(b))
    share = sum(row["response"].startswith("u") for row in rows["sft"]) / len(rows["sft"])
    assert abs(share - problems.WORKED_SHARE) < 0.02
    for row in rows["train"] + rows["held_out"]:
        assert str(sum(map(int, row["prompt"].rstrip("=").split("+")))) == row["answer"]


def test_held_out_problems_are_nowhere_else(rows):
    held_out = {row["prompt"] for row in rows["held_out"]}
    assert len(held_out) == len(rows["held_out"]) == 256
    assert not held_out & {row["prompt"] for row in rows["sft"] + rows["train"]}


def test_the_same_seed_makes_the_same_problems(problems, rows):
    assert problems.make(seed=7) == rows
    assert problems.make(seed=8) != rows


def test_the_tokenizer_knows_every_character_and_gives_text_back(rows):
    tokenizer = load("make_model").make_tokenizer()
    longest = 0
    for row in rows["sft"][:500]:
        text = row["prompt"] + row["response"]
        tokens = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in tokens
        assert tokenizer.decode(tokens) == text
        longest = max(longest, len(tokenizer(row["response"])["input_ids"]) + 1)
    assert longest == 33  # what grpo.yaml says of a worked answer


def test_the_model_loads_with_its_tokenizer(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_model = load("make_model")
    monkeypatch.setattr(sys, "argv", ["make_model.py", str(tmp_path)])
    make_model.main()
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    attention = 128 * (128 + 64 + 64) + (128 + 64 + 64) + 128 * 128  # q, k and v with their biases, then the output
    layer = attention + 3 * 128 * 256 + 2 * 128
    assert sum(p.numel() for p in model.parameters()) == 2 * layer + 128 + 2 * 19 * 128
    assert model.config.eos_token_id == AutoTokenizer.from_pretrained(tmp_path).eos_token_id
