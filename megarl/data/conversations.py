"""The spellings that people give conversations, and the one that chat templates take: role and content.

Contract: `messages_of` takes chat messages ({"role", "content"}) and ShareGPT turns ({"from", "value"}), `transcript`
Anthropic's "\\n\\nHuman: ... \\n\\nAssistant: ..." text. Both return chat messages, and raise `RecordError` with the
number of the turn, from 0, and what is wrong with it. Whether the turns make a sensible prompt is for `chat` to say.

- A message's other keys stay: templates read "tool_calls" and "name", `chat.spans` reads "weight".
- "reasoning_content", in which DeepSeek's and Qwen's interfaces return what a model thought, goes before the content
  between think tags.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from megarl.data.answers import trace
from megarl.data.reading import RecordError, check_encodable, in_field, json_type

if TYPE_CHECKING:
    from megarl.data.chat import Message

# ShareGPT's names, and those of its descendants for tools.
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def messages_of(turns: Any, key: str) -> list[Message]:
    """The turns under a record's `key` as chat messages."""
    if not isinstance(turns, list) or not turns:
        what = "an empty list" if turns == [] else json_type(turns)
        raise RecordError(f"{key}: must be a list of messages, found {what}")
    return [_message(turn, f"{key}: turn {number}") for number, turn in enumerate(turns)]


def _message(turn: Any, where: str) -> Message:
    if isinstance(turn, dict) and {"from", "value"} <= turn.keys():
        if turn["from"] not in ROLES:
            raise RecordError(f"{where}: is from {turn['from']!r}; known: {', '.join(ROLES)}")
        message = {"role": ROLES[turn["from"]], "content": turn["value"]}
    elif isinstance(turn, dict) and "role" in turn and {"content", "tool_calls"} & turn.keys():
        kept = {key: value for key, value in turn.items() if value is not None}  # Parquet fills missing keys with null
        message = {"content": None} | kept
    else:
        raise RecordError(f"{where}: must be an object with 'role' and 'content', or 'from' and 'value': {turn!r:.80}")
    only_calls = message["content"] is None and message.get("tool_calls")  # null, not "": templates tell them apart
    for key in ("role",) if only_calls else ("role", "content"):
        if not isinstance(message[key], str):
            raise RecordError(f"{where}: its {key} must be a string, found {json_type(message[key])}")
    if (reasoning := message.pop("reasoning_content", None)) and not only_calls:
        message["content"] = trace(reasoning, message["content"])
    with in_field(where):
        check_encodable(message["content"] or "")
    return message


def is_transcript(text: Any) -> bool:
    """Whether the text is a dialogue of Anthropic's helpful-harmless data, or its beginning."""
    return isinstance(text, str) and text.lstrip("\n").startswith("Human:")


def transcript(text: str, key: str) -> list[Message]:
    """The turns of "\\n\\nHuman: ... \\n\\nAssistant: ..."; the last one is empty where the assistant is to speak."""
    parts = SPEAKER.split(text.lstrip("\n"))
    if parts[0] or len(parts) < 3:
        raise RecordError(f"{key}: must begin with 'Human:', found {text!r:.40}")
    names, contents = parts[1::2], parts[2::2]
    return [{"role": SPEAKERS[n], "content": c.strip()} for n, c in zip(names, contents, strict=True)]


def response_text(response: Any, key: str = "response") -> str:
    """A response: a string, an assistant's turn, or a list of just that."""
    if isinstance(response, dict):
        response = [response]
    if isinstance(response, list):
        messages = messages_of(response, key)
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            roles = ", ".join(message["role"] for message in messages)
            raise RecordError(f"{key}: must be one message of the assistant's, found {roles}")
        response = messages[0]["content"]
    if not isinstance(response, str):
        raise RecordError(f"{key}: must be a string, found {json_type(response)}")
    if not response.strip():
        raise RecordError(f"{key}: is empty")
    with in_field(key):
        check_encodable(response)
    return response
