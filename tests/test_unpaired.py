"""Responses with a label: every layout gives the same tokens."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megarl.config import DataConfig
from megarl.data.reading import DataError
from megarl.data.unpaired import load_unpaired
from tests.byte_tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
USER, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "four"}
PROMPT = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"


def data(folder: Path, *records: Any, **fields: Any) -> DataConfig:
    file = folder / "kto.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return DataConfig(path=str(file), **fields)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "2+2?", "response": "four"},
        {"prompt": "2+2?", "completion": "four"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"messages": [USER, ANSWER]},
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "four"}]},
        {"messages": [USER], "response": {"from": "gpt", "value": "four"}},
    ],
)
@pytest.mark.parametrize(("label", "desirable"), [(True, True), (False, False), (1, True), (0, False)])
def test_every_layout_gives_the_same_tokens(
    tmp_path: Path, record: dict[str, Any], label: bool | int, desirable: bool
) -> None:
    (example,) = load_unpaired(data(tmp_path, record | {"label": label}), TOKENIZER, max_tokens=256)
    assert example.id == "kto.jsonl:1"
    assert TOKENIZER.decode(example.tokens[: example.prompt_length]) == PROMPT
    assert TOKENIZER.decode(example.tokens[example.prompt_length :]) == "four<|im_end|>"
    assert example.desirable is desirable


def test_only_the_last_turn_is_judged(tmp_path: Path) -> None:
    messages = [USER, ANSWER, {"role": "user", "content": "sure?"}, {"role": "assistant", "content": "yes"}]
    (example,) = load_unpaired(data(tmp_path, {"messages": messages, "label": 1}), TOKENIZER, max_tokens=256)
    assert TOKENIZER.decode(example.tokens[example.prompt_length :]) == "yes<|im_end|>"


def test_pairs_and_rankings_become_one_of_each_label(tmp_path: Path) -> None:
    pair = {"prompt": "2+2?", "chosen": "four", "rejected": "five"}
    ranking = {"prompt": "2+2?", "responses": ["three", "four", "five"], "scores": [1, 9, 2]}
    examples = load_unpaired(data(tmp_path, pair, ranking, ranked_pairs="all"), TOKENIZER, max_tokens=256)
    assert [(e.id, TOKENIZER.decode(e.tokens[e.prompt_length :]), e.desirable) for e in examples] == [
        ("kto.jsonl:1+", "four<|im_end|>", True),
        ("kto.jsonl:1-", "five<|im_end|>", False),
        ("kto.jsonl:2#1>0+", "four<|im_end|>", True),
        ("kto.jsonl:2#1>0-", "three<|im_end|>", False),
    ]


GOOD = {"prompt": "2+2?", "response": "four", "label": True}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (GOOD | {"label": "yes"}, "label: must be true or false, or 1 or 0, found 'yes'"),
        (GOOD | {"label": 2}, "label: must be true or false, or 1 or 0, found 2"),
        (GOOD | {"label": None}, "label: must be true or false, or 1 or 0, found None"),
        (GOOD | {"response": " "}, "response: is empty"),
        ({"response": "four", "label": True}, r"prompt: is missing \(data.prompt_key names it\)"),
        (
            {"prompt": "2+2?", "label": True},
            r"response: is missing \(data.response_key names it\), and so is a conversation",
        ),
        (
            {"messages": [USER], "label": True},
            "messages: the last message is the user's; the label is about the assistant's",
        ),
        ({"messages": [ANSWER], "label": True}, "messages: must be a list of messages, found an empty list"),
        ({"messages": [], "label": True}, "messages: must be a list of messages, found an empty list"),
    ],
)
def test_a_bad_record_is_named_or_counted(tmp_path: Path, bad: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError) as caught:
        load_unpaired(data(tmp_path, GOOD, bad), TOKENIZER, max_tokens=256)
    assert re.search(rf"kto.jsonl:2: {reason}", str(caught.value)), str(caught.value)
    examples = load_unpaired(data(tmp_path, GOOD, bad, bad_records="drop"), TOKENIZER, max_tokens=256)
    assert len(examples) == 1 and examples.dropped == {"bad_record": 1, "overlong": 0}


def test_overlong_examples_are_counted(tmp_path: Path) -> None:
    config = data(tmp_path, GOOD, GOOD | {"response": "four" * 100})
    assert load_unpaired(config, TOKENIZER, max_tokens=64).dropped == {"bad_record": 0, "overlong": 1}
