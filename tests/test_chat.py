"""Prompts become tokens with and without a chat template."""

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from megarl.data.chat import render
from megarl.data.reading import DataError, RecordError

WORDS = ["<bos>", "<eos>", "<unk>", "<user>", "<system>", "<assistant>", "what", "is", "two", "be", "brief", "four"]
TEMPLATE = (
    "<bos> {% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m.role }}> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(chat_template: str | None, single: str = "<bos> $A") -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[("<bos>", 0), ("<eos>", 1)])
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **special)


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def test_a_string_becomes_a_user_message() -> None:
    tokens = render(make_tokenizer(TEMPLATE), "what is two", None, True)
    assert tokens == ids("<bos> <user> what is two <assistant>")
    assert all(type(token) is int for token in tokens)


def test_the_system_prompt_goes_first_unless_the_messages_have_one() -> None:
    tokenizer = make_tokenizer(TEMPLATE)
    assert render(tokenizer, "two", "be brief", True) == ids("<bos> <system> be brief <user> two <assistant>")
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "two"}]
    assert render(tokenizer, messages, "be brief", True) == ids("<bos> <system> be <user> two <assistant>")


def test_messages_keep_their_turns() -> None:
    turns = [("user", "two"), ("assistant", "four"), ("user", "is two four")]
    tokens = render(make_tokenizer(TEMPLATE), [{"role": r, "content": c} for r, c in turns], None, True)
    assert tokens == ids("<bos> <user> two <assistant> four <user> is two four <assistant>")


@pytest.mark.parametrize(
    ("single", "expected"),
    [
        ("<bos> $A", "<bos> what is"),
        ("<bos> $A <eos>", "<bos> what is"),
        ("$A", "what is"),
    ],
)
def test_plain_text_gets_the_tokenizers_bos_and_never_an_eos(single: str, expected: str) -> None:
    assert render(make_tokenizer(None, single), "what is", None, False) == ids(expected)


def test_an_eos_that_the_text_spells_out_stays() -> None:
    assert render(make_tokenizer(None), "what <eos>", None, False) == ids("<bos> what <eos>")


def test_a_template_is_not_used_when_the_config_says_so() -> None:
    assert render(make_tokenizer(TEMPLATE), "two", None, False) == ids("<bos> two")


def test_what_needs_a_template_is_refused_without_one() -> None:
    tokenizer = make_tokenizer(None)
    with pytest.raises(DataError, match=r"no chat template; set data.apply_chat_template=false"):
        render(tokenizer, "two", None, True)
    with pytest.raises(DataError, match=r"data.system_prompt needs a chat template"):
        render(tokenizer, "two", "be brief", False)
    with pytest.raises(RecordError, match=r"list of messages, which needs data.apply_chat_template=true"):
        render(tokenizer, [{"role": "user", "content": "two"}], None, False)


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("  \n", "^is empty"),
        ([], "empty list of messages"),
        ({"role": "user"}, "must be a string or a list of messages, found an object"),
        (None, "must be a string or a list of messages, found null"),
        (["two"], "message 0 must be an object with 'role' and 'content', found 'two'"),
        ([{"role": "user", "text": "two"}], "message 0 must be an object with 'role' and 'content'"),
        ([{"role": "user", "content": ["two"]}], "'content' of message 0 must be a string, found a list"),
        ([{"role": "user", "content": " "}], "^is empty"),
        ([{"role": "assistant", "content": "four"}], "the last message is the assistant's"),
        ([{"role": "tool", "content": "four"}], "the chat template refuses the messages: no tools here"),
        ("two \ud800", "lone surrogate .* at character 4"),
    ],
)
def test_a_malformed_prompt_is_a_record_error(prompt: object, reason: str) -> None:
    with pytest.raises(RecordError, match=reason):
        render(make_tokenizer(TEMPLATE), prompt, None, True)  # type: ignore[arg-type]
