"""SFT examples: prompt, response and EOS end to end."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from megarl.config import DataConfig
from megarl.data.reading import DataError
from megarl.data.sft import load_examples
from tests.byte_tokenizer import CHATML, byte_tokenizer

WORDS = ["<bos>", "<eos>", "<unk>", "<user>", "<assistant>", "one", "two", "####", "3"]
TEMPLATE = "<bos> {% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}<assistant>"


def make_tokenizer(chat_template: str | None = None, **special: str) -> PreTrainedTokenizerFast:
    model = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    model.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    special = special or {"eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<bos>", chat_template=chat_template, **special)


def data(path: Path, *records: dict[str, Any], **fields: Any) -> DataConfig:
    file = path / "sft.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return DataConfig(path=str(file), **({"apply_chat_template": False} | fields))


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


@pytest.mark.parametrize(
    ("template", "prompt"), [(None, "<bos> one two"), (TEMPLATE, "<bos> <user> one two <assistant>")]
)
def test_prompt_response_and_eos(tmp_path: Path, template: str | None, prompt: str) -> None:
    config = data(tmp_path, {"prompt": "one two", "response": "3"}, apply_chat_template=template is not None)
    (example,) = load_examples(config, make_tokenizer(template), max_tokens=64)
    assert example.id == "sft.jsonl:1"
    assert example.tokens == [*ids(prompt), *ids("3 <eos>")]
    assert example.prompt_length == len(ids(prompt))


def test_gsm8k_learns_the_whole_solution(tmp_path: Path) -> None:
    config = data(tmp_path, {"question": "one two", "answer": "two one\n#### 3"}, adapter="gsm8k")
    (example,) = load_examples(config, make_tokenizer(), max_tokens=64)
    assert example.tokens == ids("<bos> one two two one #### 3 <eos>")


def test_bad_and_overlong_records_are_named_or_counted(tmp_path: Path) -> None:
    good = {"prompt": "one", "response": "3"}
    bad = [good | {"response": " "}, good | {"response": 3}, {"prompt": "one"}, good | {"response": "\ud800"}]
    config = data(tmp_path, good, *bad)
    with pytest.raises(DataError) as caught:
        load_examples(config, make_tokenizer(), max_tokens=64)
    message = str(caught.value)
    assert "sft.jsonl:2: response: is empty" in message
    assert "sft.jsonl:3: response: must be a string, found a number" in message
    assert "sft.jsonl:4: response: is missing; the record has 'prompt' (data.response_key names it; " in message
    assert "data.messages_key='messages' would hold a conversation)" in message
    assert "sft.jsonl:5: response: holds a lone surrogate" in message
    long = good | {"prompt": "one two one two"}
    config = data(tmp_path, good, *bad, long, bad_records="drop", max_prompt_length=3)
    examples = load_examples(config, make_tokenizer(), max_tokens=64)
    assert len(examples) == 1 and examples.dropped == {"bad_record": 4, "overlong": 1}


def test_an_example_that_fits_no_microbatch_is_named(tmp_path: Path) -> None:
    """<bos> one 3 <eos> has 4 tokens."""
    record = {"prompt": "one", "response": "3"}
    assert len(load_examples(data(tmp_path, record), make_tokenizer(), max_tokens=4)) == 1
    with pytest.raises(DataError, match=r"sft.jsonl:1: response: prompt and response have 4 tokens; .* allow 3"):
        load_examples(data(tmp_path, record, overlong_prompts="refuse"), make_tokenizer(), max_tokens=3)


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no EOS token"):
        load_examples(
            data(tmp_path, {"prompt": "one", "response": "3"}), make_tokenizer(unk_token="<unk>"), max_tokens=64
        )


def conversation(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def test_a_conversation_has_holes_where_others_speak(tmp_path: Path) -> None:
    """The template here writes no EOS behind a turn: only that of the last is learned."""
    template = TEMPLATE.replace("<assistant>", "{% if add_generation_prompt %}<assistant>{% endif %}")
    messages = conversation(("user", "one"), ("assistant", "two"), ("user", "two one"), ("assistant", "3"))
    turns = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in messages]
    for record in ({"messages": messages}, {"conversations": turns}, {"prompt": "one", "messages": messages}):
        config = data(tmp_path, record, apply_chat_template=True)
        (example,) = load_examples(config, make_tokenizer(template), max_tokens=64)
        assert example.tokens == ids("<bos> <user> one <assistant> two <user> two one <assistant> 3 <eos>")
        assert example.prompt_length == 4
        assert example.loss_mask.tolist() == [True, False, False, False, False, True, True]
        config = data(tmp_path, record, apply_chat_template=True, train_on_turns="last")
        (last,) = load_examples(config, make_tokenizer(template), max_tokens=64)
        assert (last.tokens, last.prompt_length, last.loss_mask) == (example.tokens, 9, None)


def test_one_exchange_is_prompt_and_response(tmp_path: Path) -> None:
    messages = {"chat": conversation(("user", "one"), ("assistant", "two"))}
    config = data(tmp_path, messages, apply_chat_template=True, messages_key="chat")
    template = TEMPLATE.replace("<assistant>", "{% if add_generation_prompt %}<assistant>{% endif %}")
    (example,) = load_examples(config, make_tokenizer(template), max_tokens=64)
    pair = {"prompt": "one", "response": "two"}
    (same,) = load_examples(data(tmp_path, pair, apply_chat_template=True), make_tokenizer(template), max_tokens=64)
    assert (example.tokens, example.prompt_length, example.loss_mask) == (same.tokens, same.prompt_length, None)


def test_conversations_that_cannot_be_learned_are_named(tmp_path: Path) -> None:
    messages = conversation(("user", "one"), ("assistant", "two"))
    with pytest.raises(DataError, match=r"sft.jsonl:1: messages: is a conversation, which needs data.apply_chat"):
        load_examples(data(tmp_path, {"messages": messages}), make_tokenizer(), max_tokens=64)
    config = data(tmp_path, {"messages": messages[:1]}, {"messages": 3}, apply_chat_template=True)
    with pytest.raises(DataError) as caught:
        load_examples(config, make_tokenizer(TEMPLATE), max_tokens=64)
    assert "sft.jsonl:1: messages: has no turn of the assistant's to learn" in str(caught.value)
    assert "sft.jsonl:2: messages: must be a list of messages, found a number" in str(caught.value)


def test_reasoning_goes_between_think_tags(tmp_path: Path) -> None:
    record = {"prompt": "one", "thoughts": "two one", "completion": "3"}
    config = data(tmp_path, record, reasoning_key="thoughts")
    tokenizer = byte_tokenizer(None)
    (example,) = load_examples(config, tokenizer, max_tokens=64)
    assert tokenizer.decode(example.tokens) == "one<think>\ntwo one\n</think>\n\n3<|im_end|>"
    config = data(tmp_path, {"prompt": "one", "response": "3"}, reasoning_key="thoughts")
    with pytest.raises(DataError, match=r"sft.jsonl:1: thoughts: is missing"):
        load_examples(config, tokenizer, max_tokens=64)


@pytest.mark.parametrize("opening", ["<think>\n", "<think>", "<think>\n\n"])
def test_a_prompt_that_opens_the_think_tag_is_not_followed_by_another(tmp_path: Path, opening: str) -> None:
    tokenizer = byte_tokenizer(CHATML.replace("assistant\n", f"assistant\n{opening}"))
    record = {"prompt": "one", "response": f"{opening}two\n</think>\n\n3"}
    (example,) = load_examples(data(tmp_path, record, apply_chat_template=True), tokenizer, max_tokens=128)
    assert tokenizer.decode(example.tokens).endswith(f"assistant\n{opening}two\n</think>\n\n3<|im_end|>")
    assert tokenizer.decode(example.tokens).count("<think>") == 1
