"""Prompts as the model reads them: plain text, or chat messages through the tokenizer's own template.

Contract: `prompt_text` is the whole text of a prompt and `encode` its token ids; `render` is one after the other.
`spans` is the text of a whole conversation, divided into what the model reads and what it is to say.
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

from megarl.data.reading import DataError, RecordError, check_encodable, json_type

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
            raise RecordError("is a list of messages, which needs data.apply_chat_template=true")
        return prompt
    return _rendered(tokenizer, _with_system(messages, system_prompt), add_generation_prompt=True)


def _with_system(messages: list[Message], system_prompt: str | None) -> list[Message]:
    if system_prompt is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[Message], *, add_generation_prompt: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    except jinja2.TemplateError as error:  # templates refuse what they cannot spell, such as two user turns in a row
        raise RecordError(f"the chat template refuses the messages: {error}") from error


def spans(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], system_prompt: str | None, turns: str
) -> list[tuple[str, bool]]:
    """The conversation up to the assistant's last turn as (text, whether it is learned), in turn; False comes first.

    With `turns` "all" every turn of the assistant is learned, but for one whose "weight" is 0 and for greetings before
    the user has spoken; with "last" only the last. A turn is learned as a rollout would have written it: what follows
    the prompt up to there, to the EOS token behind it. Where the template ends a turn otherwise, only the end of the
    last is learned, which is always EOS and left to the caller. A message with "tool_calls" is learned as the template
    spells it, up to EOS.

    A template may write a turn differently once others follow: Qwen3's leaves out earlier reasoning. Such a
    conversation is refused, since what would be learned is not what a rollout reads.
    """
    first_user = next((at for at, message in enumerate(messages) if message["role"] == "user"), len(messages))
    spoken = [at for at, message in enumerate(messages) if message["role"] == "assistant" and at > first_user]
    learned = [at for at in spoken if messages[at].get("weight", 1) != 0]
    if not learned:
        raise RecordError("has no turn of the assistant's to learn after the user's first")
    messages = messages[: learned[-1] + 1]
    whole = prompt_text(tokenizer, messages[:-1], system_prompt, True)
    parts, read = [], 0
    for at in learned[:-1] if turns == "all" else []:
        start = len(_shared(tokenizer, messages[:at], system_prompt, whole, at))
        end = start + _turn_length(tokenizer, messages[at], whole[start:], at)
        parts += [(whole[read:start], False), (whole[start:end], True)]
        read = end
    return [*parts, (whole[read:], False), (_last_turn(tokenizer, messages, system_prompt, whole), True)]


REWRITTEN = "; data.train_on_turns=last learns the last turn only"


def _shared(
    tokenizer: PreTrainedTokenizerBase, before: list[Message], system_prompt: str | None, whole: str, at: int
) -> str:
    """The prompt of message `at`, with which the whole conversation's text must begin."""
    prompt = prompt_text(tokenizer, before, system_prompt, True)
    if not whole.startswith(prompt):
        raise RecordError(f"the chat template writes message {at} differently once others follow{REWRITTEN}")
    return prompt


def _turn_length(tokenizer: PreTrainedTokenizerBase, message: Message, rest: str, at: int) -> int:
    """How much of `rest` is the assistant's message, the EOS token behind it included."""
    content, eos = (message["content"] or "").strip(), tokenizer.eos_token
    if not content and not message.get("tool_calls"):
        raise RecordError(f"message {at}, the assistant's, is empty")
    end = len(rest) - len(rest.lstrip()) + len(content)
    if not rest[:end].endswith(content):
        raise RecordError(f"the chat template rewrites message {at}{REWRITTEN}")
    if message.get("tool_calls"):
        if (found := rest.find(eos, end)) < 0:
            raise RecordError(f"the chat template does not end the tool calls of message {at} with {eos}{REWRITTEN}")
        return found + len(eos)
    tail = rest[end:]
    return end + len(tail) - len(tail.lstrip()) + len(eos) if tail.lstrip().startswith(eos) else end


def _last_turn(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], system_prompt: str | None, prompt: str
) -> str:
    """What the last message adds to the prompt, without EOS."""
    at, last = len(messages) - 1, messages[-1]
    if not last.get("tool_calls"):
        if not last["content"].strip():
            raise RecordError(f"message {at}, the assistant's, is empty")
        return last["content"]
    text = _rendered(tokenizer, _with_system(messages, system_prompt), add_generation_prompt=False)
    if not text.startswith(prompt):
        raise RecordError(f"the chat template does not write message {at} behind its prompt")
    rest = text[len(prompt) :]
    return rest[: _turn_length(tokenizer, last, rest, at) - len(tokenizer.eos_token)]


def encode(tokenizer: PreTrainedTokenizerBase, text: str, apply_chat_template: bool) -> list[int]:
    """Token ids of a prompt's text."""
    tokens = tokenizer(text, add_special_tokens=not apply_chat_template)["input_ids"]
    if apply_chat_template or tokens[-1:] != [tokenizer.eos_token_id] or text.endswith(tokenizer.eos_token):
        return tokens
    return tokens[:-1]  # an EOS that the tokenizer added would end the answer before it begins


def check_messages(messages: Any) -> None:
    """A prompt is a non-empty string, or messages with a role and some text that end before the assistant's turn."""
    if not isinstance(messages, list):
        raise RecordError(f"must be a string or a list of messages, found {json_type(messages)}")
    if not messages:
        raise RecordError("is an empty list of messages")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise RecordError(f"message {number} must be an object with 'role' and 'content', found {message!r:.80}")
        only_calls = message["content"] is None and message.get("tool_calls")
        for key in ("role",) if only_calls else ("role", "content"):
            if not isinstance(message[key], str):
                raise RecordError(f"{key!r} of message {number} must be a string, found {json_type(message[key])}")
        check_encodable(message["content"] or "")
    if messages[-1]["role"] == "assistant":
        raise RecordError("the last message is the assistant's; a prompt ends where the assistant is to speak")
    if not messages[-1]["content"].strip():
        raise RecordError("is empty")
