"""The spellings of conversations, and which of their text is learned."""

from typing import Any

import pytest

from megarl.data.chat import spans
from megarl.data.conversations import is_transcript, messages_of, response_text, transcript
from megarl.data.reading import RecordError
from tests.byte_tokenizer import CHATML, byte_tokenizer

TOKENIZER = byte_tokenizer()
# Llama's way: contents are trimmed, and a turn begins behind its header.
TRIMMED = CHATML.replace("{{ m.content }}", "{{ m.content | trim }}")
# Qwen3's way: earlier answers lose their reasoning. The last answer is not part of a prompt, so all of them do here.
FORGETFUL = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1].lstrip('\\n') }}")
# Turns end in something that is not EOS, as with the base models whose EOS is another token than their template's.
OTHER_END = CHATML.replace("<|im_end|>", "<end>")
TOOLS = CHATML.replace(
    "{{ m.content }}",
    "{{ m.content or '' }}{% if m.tool_calls %}<call>{{ m.tool_calls[0].function.name }}</call>{% endif %}",
)


def chat(*turns: str, **last: Any) -> list[dict[str, Any]]:
    """Messages of "u: hi"; `last` are further keys of the last."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    messages = [{"role": roles[turn[0]], "content": turn[3:]} for turn in turns]
    return [*messages[:-1], messages[-1] | last]


def learned(messages: list[dict[str, Any]], template: str = CHATML, turns: str = "all") -> list[str]:
    return [text for text, learn in spans(byte_tokenizer(template), messages, None, turns) if learn]


def test_sharegpt_turns_become_messages() -> None:
    turns = [("system", "be brief"), ("human", "hi"), ("gpt", "hello"), ("observation", "3"), ("function_call", "f()")]
    assert messages_of([{"from": who, "value": what} for who, what in turns], "conversations") == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "f()"},
    ]


def test_messages_keep_what_templates_read_and_reasoning_goes_first() -> None:
    messages = [
        {"role": "user", "content": "hi", "name": "Ann", "tool_calls": None},
        {"role": "assistant", "content": "hello", "reasoning_content": "greet"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
    ]
    assert messages_of(messages, "messages") == [
        {"role": "user", "content": "hi", "name": "Ann"},
        {"role": "assistant", "content": "<think>\ngreet\n</think>\n\nhello"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
    ]


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ("hi", "messages: must be a list of messages, found a string"),
        ([], "messages: must be a list of messages, found an empty list"),
        ([{"from": "narrator", "value": "a"}], "messages: turn 0: is from 'narrator'; known: system, human"),
        ([{"role": "user", "content": "a"}, "b"], "messages: turn 1: must be an object with 'role' and 'content'"),
        ([{"role": "user", "content": ["a"]}], "messages: turn 0: its content must be a string, found a list"),
        ([{"role": "user", "content": None}], "messages: turn 0: its content must be a string, found null"),
        ([{"role": "user", "content": "\ud800"}], "messages: turn 0: holds a lone surrogate"),
    ],
)
def test_what_is_no_conversation_is_named_by_turn(turns: Any, reason: str) -> None:
    with pytest.raises(RecordError) as caught:
        messages_of(turns, "messages")
    assert str(caught.value).startswith(reason)


def test_transcripts() -> None:
    text = "\n\nHuman: Say:\n\nA list.\n\nAssistant: Human: is a word.\n\nHuman: so\n\nAssistant:"
    assert is_transcript(text) and not is_transcript("the Human: said") and not is_transcript(None)
    assert transcript(text, "chosen") == chat("u: Say:\n\nA list.", "a: Human: is a word.", "u: so", "a: ")
    with pytest.raises(RecordError, match="chosen: must begin with 'Human:', found 'hello'"):
        transcript("hello", "chosen")


@pytest.mark.parametrize(
    "response",
    ["four", {"from": "gpt", "value": "four"}, [{"role": "assistant", "content": "four"}]],
)
def test_a_response_is_text_or_one_message(response: Any) -> None:
    assert response_text(response) == "four"


def test_a_response_of_others_or_of_several_messages_is_refused() -> None:
    with pytest.raises(RecordError, match="must be one message of the assistant's, found user"):
        response_text([{"role": "user", "content": "four"}])
    with pytest.raises(RecordError, match="found assistant, assistant"):
        response_text([{"role": "assistant", "content": "four"}] * 2)


def test_spans_by_hand() -> None:
    messages = chat("s: be brief", "u: 1?", "a: one", "t: (two)", "a: two", "u: 3?", "a: three")
    assert spans(TOKENIZER, messages, None, "all") == [
        (
            "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\n",
            False,
        ),
        ("one<|im_end|>", True),
        ("\n<|im_start|>tool\n(two)<|im_end|>\n<|im_start|>assistant\n", False),
        ("two<|im_end|>", True),
        ("\n<|im_start|>user\n3?<|im_end|>\n<|im_start|>assistant\n", False),
        ("three", True),
    ]
    assert learned(messages, turns="last") == ["three"]


@pytest.mark.parametrize("template", [CHATML, TRIMMED])
def test_spans_are_the_templates_own_text(template: str) -> None:
    messages = chat("u: 1?", "a: one", "u: 2?", "a: two")
    text = "".join(text for text, _ in spans(byte_tokenizer(template), messages, "be brief", "all"))
    messages = [{"role": "system", "content": "be brief"}, *messages]
    assert text + "<|im_end|>\n" == byte_tokenizer(template).apply_chat_template(messages, tokenize=False)


def test_a_template_that_trims_is_followed() -> None:
    assert learned(chat("u: 1?", "a:  one \n", "u: 2?", "a: two"), TRIMMED) == ["one<|im_end|>", "two"]
    assert learned(chat("u: 1?", "a:  one \n", "u: 2?", "a: two")) == [" one \n<|im_end|>", "two"]


def test_a_turn_that_does_not_end_in_eos_is_learned_without_its_end() -> None:
    assert learned(chat("u: 1?", "a: one", "u: 2?", "a: two"), OTHER_END) == ["one", "two"]


def test_turns_of_weight_0_and_greetings_are_read_only() -> None:
    messages = chat("a: welcome", "u: 1?", "a: one", "u: 2?", "a: two", "u: 3?")
    assert learned(messages) == ["one<|im_end|>", "two"]  # nothing follows the user's last turn
    messages[2]["weight"] = 0
    assert learned(messages) == ["two"]
    messages[4]["weight"] = 0
    with pytest.raises(RecordError, match="has no turn of the assistant's to learn"):
        learned(messages)
    with pytest.raises(RecordError, match="has no turn of the assistant's to learn"):
        learned(chat("a: welcome", "u: 1?"))


@pytest.mark.parametrize("content", [None, ""])
def test_tool_calls_are_learned_as_the_template_spells_them(content: str | None) -> None:
    call = [{"function": {"name": "clock"}}]
    messages = [*chat("u: time?", "a: ", tool_calls=call, content=content), *chat("t: 9:00", "a: nine")]
    assert learned(messages, TOOLS) == ["<call>clock</call><|im_end|>", "nine"]
    assert learned(messages[:2], TOOLS) == ["<call>clock</call>"]
    with pytest.raises(RecordError, match=r"does not end the tool calls of message 1 with <\|im_end\|>"):
        learned(messages, TOOLS.replace("<|im_end|>", "<end>"))


def test_a_template_that_forgets_reasoning_can_be_learned_from_the_last_turn_only() -> None:
    messages = chat("u: 1?", "a: <think>\nhm\n</think>\n\none", "u: 2?", "a: <think>\nha\n</think>\n\ntwo")
    with pytest.raises(RecordError, match=r"rewrites message 1; data\.train_on_turns=last learns the last turn only"):
        learned(messages, FORGETFUL)
    parts = spans(byte_tokenizer(FORGETFUL), messages, None, "last")
    assert parts[-1] == ("<think>\nha\n</think>\n\ntwo", True)
    assert "<|im_start|>assistant\none<|im_end|>" in parts[0][0]


def test_a_template_that_counts_what_follows_is_refused() -> None:
    counting = "{{ messages | length }}" + CHATML
    with pytest.raises(RecordError, match="writes message 1 differently once others follow"):
        learned(chat("u: 1?", "a: one", "u: 2?", "a: two"), counting)
    with pytest.raises(RecordError, match="message 1, the assistant's, is empty"):
        learned(chat("u: 1?", "a:  ", "u: 2?", "a: two"))
    with pytest.raises(RecordError, match="message 1, the assistant's, is empty"):
        learned(chat("u: 1?", "a:  "))
