"""Preference pairs: every layout gives the same tokens, and what is wrong with a pair is named."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megarl.config import DataConfig
from megarl.data.preferences import Pair, load_pairs, need_scores
from megarl.data.reading import DataError
from tests.byte_tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
USER = {"role": "user", "content": "2+2?"}
GOOD, BAD = {"role": "assistant", "content": "four"}, {"role": "assistant", "content": "five"}
PROMPT = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
SHAREGPT = {"conversations": [{"from": "human", "value": "2+2?"}]}


def data(folder: Path, *records: Any, **fields: Any) -> DataConfig:
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return DataConfig(path=str(file), **fields)


def texts(pair: Pair) -> tuple[str, str, str]:
    """Prompt, chosen and rejected response, as text."""
    assert pair.chosen[: pair.prompt_length] == pair.rejected[: pair.prompt_length]
    decode = TOKENIZER.decode
    prompt = decode(pair.chosen[: pair.prompt_length])
    return prompt, decode(pair.chosen[pair.prompt_length :]), decode(pair.rejected[pair.prompt_length :])


LAYOUTS: dict[str, dict[str, Any]] = {
    "strings": {"prompt": "2+2?", "chosen": "four", "rejected": "five"},
    "prompt_messages": {"prompt": [USER], "chosen": "four", "rejected": "five"},
    "prompt_turns": {**SHAREGPT, "chosen": "four", "rejected": "five"},
    "conversations": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "conversations_and_prompt": {"prompt": "2+2?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "last_turns": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "messages": {"messages": [USER], "chosen": GOOD, "rejected": BAD},
    "sharegpt": {
        **SHAREGPT,
        "chosen": {"from": "gpt", "value": "four"},
        "rejected": {"from": "gpt", "value": "five"},
    },
    "transcripts": {
        "chosen": "\n\nHuman: 2+2?\n\nAssistant: four",
        "rejected": "\n\nHuman: 2+2?\n\nAssistant: five",
    },
    "transcript_prompt": {"prompt": "\n\nHuman: 2+2?\n\nAssistant:", "chosen": "four", "rejected": "five"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_tokens(tmp_path: Path, layout: str) -> None:
    (pair,) = load_pairs(data(tmp_path, LAYOUTS[layout]), TOKENIZER, max_tokens=256)
    assert pair.id == "pairs.jsonl:1"
    assert texts(pair) == (PROMPT, "four<|im_end|>", "five<|im_end|>")
    assert pair.chosen_score is pair.rejected_score is None


def test_keys_can_be_named(tmp_path: Path) -> None:
    record = {"q": "2+2?", "win": "four", "lose": "five", "s1": 8, "s2": 2.5}
    keys = {"prompt_key": "q", "chosen_key": "win", "rejected_key": "lose"}
    config = data(tmp_path, record, **keys, chosen_score_key="s1", rejected_score_key="s2")
    (pair,) = load_pairs(config, TOKENIZER, max_tokens=256)
    assert texts(pair) == (PROMPT, "four<|im_end|>", "five<|im_end|>")
    assert (pair.chosen_score, pair.rejected_score) == (8.0, 2.5)


def test_several_turns_and_a_system_message_are_the_prompt(tmp_path: Path) -> None:
    before = [{"role": "system", "content": "be brief"}, USER, BAD, {"role": "user", "content": "sure?"}]
    config = data(tmp_path, {"chosen": [*before, GOOD], "rejected": [*before, BAD]}, system_prompt="unused")
    (pair,) = load_pairs(config, TOKENIZER, max_tokens=256)
    assert texts(pair)[0] == TOKENIZER.apply_chat_template(before, tokenize=False, add_generation_prompt=True)


def test_transcripts_stay_text_without_a_chat_template(tmp_path: Path) -> None:
    first = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: 2+2?\n\nAssistant:"
    config = data(tmp_path, {"chosen": f"{first} four", "rejected": f"{first} five"}, apply_chat_template=False)
    (pair,) = load_pairs(config, TOKENIZER, max_tokens=256)
    assert texts(pair) == (first, " four<|im_end|>", " five<|im_end|>")


RANKED = {"prompt": "2+2?", "responses": ["three", "four", "five", "4"], "scores": [1, 9, 2, 9]}


def test_the_best_of_ranked_responses_meets_the_worst(tmp_path: Path) -> None:
    (pair,) = load_pairs(data(tmp_path, RANKED), TOKENIZER, max_tokens=256)
    assert pair.id == "pairs.jsonl:1#1>0"
    assert texts(pair) == (PROMPT, "four<|im_end|>", "three<|im_end|>")
    assert (pair.chosen_score, pair.rejected_score) == (9, 1)


def test_all_pairs_of_ranked_responses_but_those_of_equal_score(tmp_path: Path) -> None:
    pairs = load_pairs(data(tmp_path, RANKED, ranked_pairs="all"), TOKENIZER, max_tokens=256)
    # Of the 6 pairs 1 and 3 are equal.
    assert [pair.id.split("#")[1] for pair in pairs] == ["1>0", "2>0", "3>0", "1>2", "3>2"]
    assert [pair.chosen_score - pair.rejected_score for pair in pairs] == [8, 1, 8, 7, 7]


def test_ranked_responses_may_bring_their_scores(tmp_path: Path) -> None:
    responses = [{"text": text, "score": score} for text, score in zip(["five", "four"], [0.1, 0.9], strict=True)]
    (pair,) = load_pairs(data(tmp_path, {"prompt": "2+2?", "responses": responses}), TOKENIZER, max_tokens=256)
    assert texts(pair) == (PROMPT, "four<|im_end|>", "five<|im_end|>")


STRINGS = LAYOUTS["strings"]
BAD_RECORDS: list[tuple[dict[str, Any], str]] = [
    (STRINGS | {"rejected": "four"}, "rejected: is the same response as chosen"),
    (STRINGS | {"chosen": " "}, "chosen: is empty"),
    (STRINGS | {"rejected": 5}, "rejected: is a number, but chosen is a string"),
    ({"prompt": "2+2?", "chosen": "four"}, r"rejected: missing \(data.rejected_key\), and so is 'responses' to rank"),
    ({"prompt": "2+2?"}, r"chosen and rejected: missing \(data.chosen_key and data.rejected_key\), and so is"),
    ({"chosen": "four", "rejected": "five"}, r"prompt: is missing \(data.prompt_key names it\), and so is"),
    ({"chosen": [GOOD], "rejected": [BAD]}, "prompt: is missing"),
    ({"chosen": [USER, GOOD, USER], "rejected": [USER, BAD]}, "chosen: the last message is the user's"),
    (
        {"chosen": [USER, GOOD, USER, BAD], "rejected": [USER, BAD, USER, GOOD]},
        "rejected: may differ from chosen only in the last turn; they differ in turn 1",
    ),
    (
        {"chosen": [USER, GOOD, USER, BAD], "rejected": [USER, GOOD]},
        "rejected: may differ from chosen only in the last turn; they have 4 and 2 turns",
    ),
    ({"chosen": [USER, {"role": "assistant"}], "rejected": [USER, BAD]}, "chosen: turn 1: must be an object with"),
    (
        SHAREGPT | {"chosen": {"from": "me", "value": "a"}, "rejected": "b"},
        "rejected: is a string, but chosen is an object",
    ),
    (
        SHAREGPT | {"chosen": {"from": "me", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
        "chosen: turn 0: is from 'me'",
    ),
    (STRINGS | {"chosen_score": 3}, "rejected_score: is missing, though the other response has a score"),
    (STRINGS | {"chosen_score": "9", "rejected_score": 1}, "chosen_score: must be a finite number, found '9'"),
    (RANKED | {"scores": [1, 1, 1, 1]}, "scores: none tells the 4 responses apart"),
    (RANKED | {"scores": [1, 2]}, "scores: must be a list of 4, as many as there are responses, found 2"),
    (RANKED | {"scores": [1, 2, True, 3]}, r"scores\[2\]: must be a finite number, found True"),
    (RANKED | {"responses": ["one"]}, "responses: must be a list of at least two, found 1"),
    ({"prompt": "2+2?", "responses": ["a", "b"]}, r"responses\[0\]: must be an object with one of score"),
    ({"responses": ["a", "b"], "scores": [1, 2]}, "prompt: is missing"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_RECORDS)
def test_a_bad_pair_is_named_or_counted(tmp_path: Path, bad: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError) as caught:
        load_pairs(data(tmp_path, STRINGS, bad), TOKENIZER, max_tokens=256)
    assert re.search(rf"pairs.jsonl:2: {reason}", str(caught.value)), str(caught.value)
    pairs = load_pairs(data(tmp_path, STRINGS, bad, bad_records="drop"), TOKENIZER, max_tokens=256)
    assert len(pairs) == 1 and pairs.dropped == {"bad_record": 1, "overlong": 0}


def test_both_sides_of_an_overlong_pair_go_together(tmp_path: Path) -> None:
    """Every special token and every other character is one token: 23 of the prompt, 4 of "four", and EOS."""
    length = 1 + len("user\n2+2?") + 1 + 1 + 1 + len("assistant\n")
    long = [STRINGS | {"chosen": "fourty"}, STRINGS | {"rejected": "fourty"}, STRINGS | {"prompt": "2+2+2?"}]
    pairs = load_pairs(data(tmp_path, STRINGS, *long), TOKENIZER, max_tokens=length + 5)
    assert len(pairs) == 1 and pairs.dropped == {"bad_record": 0, "overlong": 3}
    pairs = load_pairs(data(tmp_path, STRINGS, *long, max_prompt_length=length), TOKENIZER, max_tokens=256)
    assert len(pairs) == 3 and pairs.dropped == {"bad_record": 0, "overlong": 1}
    with pytest.raises(DataError, match=r"pairs.jsonl:2: chosen: prompt and response have 30 tokens; .* allow 28"):
        load_pairs(data(tmp_path, STRINGS, *long, overlong_prompts="refuse"), TOKENIZER, max_tokens=length + 5)


def test_the_reference_may_read_another_prompt(tmp_path: Path) -> None:
    config = data(tmp_path, STRINGS | {"short": "2?"}, reference_prompt_key="short")
    (pair,) = load_pairs(config, TOKENIZER, max_tokens=256)
    assert TOKENIZER.decode(pair.reference_prompt) == PROMPT.replace("2+2?", "2?")
    assert texts(pair)[0] == PROMPT


def test_an_adapter_without_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.adapter='gsm8k' has no responses and no scores: it gives prompt"):
        load_pairs(data(tmp_path, STRINGS, adapter="gsm8k"), TOKENIZER, max_tokens=256)


def test_a_pair_without_scores_is_named_before_the_first_step(tmp_path: Path) -> None:
    """Of three, the second and third have none; rpo and margins need them."""
    plain = {"prompt": "2+2?", "chosen": "four", "rejected": "five"}
    config = data(tmp_path, {**plain, "chosen_score": 8, "rejected_score": 1}, plain, plain)
    pairs = load_pairs(config, TOKENIZER, max_tokens=256)
    need_scores(pairs[:1], config, "preference.loss = rpo_sq")
    with pytest.raises(DataError) as caught:
        need_scores(pairs, config, "preference.loss = rpo_sq")
    expected = (
        "pairs.jsonl:2: has no scores (data.chosen_score_key='chosen_score' and "
        "data.rejected_score_key='rejected_score'), which preference.loss = rpo_sq needs, nor have 1 other pairs"
    )
    assert str(caught.value) == expected
