"""Prompts as the model reads them: plain text, or chat messages through the tokenizer's own template.

Contract: `prompt_text` is the whole text of a prompt and `encode` its token ids; `render` is one after the other.
- With `apply_chat_template` a string becomes one user message, and the template is rendered up to where the
  assistant's turn begins. `system_prompt` goes first, unless the messages bring a system message of their own. The
  template writes BOS and the like itself, so the text is encoded without adding special tokens.
- Without it the prompt must be a string. It is encoded as the tokenizer encodes text: with BOS if it adds one, and
  never with EOS.
A template that is asked for and missing is a `DataError`, never a silent fallback; a malformed prompt is a
`RecordError`.
"""

from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from megarl.data.adapters import check_encodable
from megarl.data.reading import DataError, RecordError, json_type

Message = dict[str, Any]


def check_template(tokenizer: PreTrainedTokenizerBase, system_prompt: str | None, apply_chat_template: bool) -> None:
    """Refuse a combination of config and tokenizer that no prompt could satisfy."""
    if apply_chat_template and tokenizer.chat_template is None:
        raise DataError(
            f"the tokenizer of {tokenizer.name_or_path or 'the model'} has no chat template; set "
            "data.apply_chat_template=false to use plain text, or give the model directory a chat_template.jinja"
        )
    if system_prompt is not None and not apply_chat_template:
        raise DataError("data.system_prompt needs a chat template to go into; set data.apply_chat_template=true")


def render(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[Message],
    system_prompt: str | None,
    apply_chat_template: bool,
) -> list[int]:
    """Token ids of the prompt, generation prompt included."""
    check_template(tokenizer, system_prompt, apply_chat_template)
    return encode(tokenizer, prompt_text(tokenizer, prompt, system_prompt, apply_chat_template), apply_chat_template)


def prompt_text(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[Message],
    system_prompt: str | None,
    apply_chat_template: bool,
) -> str:
    """The prompt as one string, generation prompt included."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    check_messages(messages)
    if not apply_chat_template:
        if not isinstance(prompt, str):
            raise RecordError("the prompt is a list of messages, which needs data.apply_chat_template=true")
        return prompt
    if system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except jinja2.TemplateError as error:  # templates refuse what they cannot spell, such as two user turns in a row
        raise RecordError(f"the chat template refuses the messages: {error}") from error


def encode(tokenizer: PreTrainedTokenizerBase, text: str, apply_chat_template: bool) -> list[int]:
    """Token ids of a prompt's text."""
    tokens = tokenizer(text, add_special_tokens=not apply_chat_template)["input_ids"]
    if apply_chat_template or tokens[-1:] != [tokenizer.eos_token_id] or text.endswith(tokenizer.eos_token):
        return tokens
    return tokens[:-1]  # an EOS that the tokenizer added would end the answer before it begins


def check_messages(messages: Any) -> None:
    """A prompt is a non-empty string, or messages with a role and some text that end before the assistant's turn."""
    if not isinstance(messages, list):
        raise RecordError(f"the prompt must be a string or a list of messages, found {json_type(messages)}")
    if not messages:
        raise RecordError("the prompt is an empty list of messages")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise RecordError(f"message {number} must be an object with 'role' and 'content', found {message!r:.80}")
        for key in ("role", "content"):
            if not isinstance(message[key], str):
                raise RecordError(f"{key!r} of message {number} must be a string, found {json_type(message[key])}")
        check_encodable(message["content"], "prompt")
    if messages[-1]["role"] == "assistant":
        raise RecordError("the last message is the assistant's; a prompt ends where the assistant is to speak")
    if not messages[-1]["content"].strip():
        raise RecordError("the prompt is empty")
