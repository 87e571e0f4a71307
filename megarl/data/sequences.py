"""Sequences of offline training: prompt, response and EOS, laid end to end.

Contract: `Sequences` makes them from what a record holds. The prompt is rendered as for rollouts, so that a model
trained on it sees the same prompts in RL; the response is encoded without special tokens; and the end is always the
tokenizer's EOS token, because what templates write after an answer differs and EOS is where rollouts stop. A sequence
is over-long if its prompt has more than data.max_prompt_length tokens, or all of it more than `max_tokens`.

Some templates (DeepSeek-R1's, QwQ's) open the think tag at the end of the prompt. A response that opens it again is
encoded from behind the tag, or the model would learn to say it twice.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megarl.config import DataConfig
from megarl.data import chat
from megarl.data.answers import THINK
from megarl.data.conversations import is_transcript, messages_of, response_text, transcript
from megarl.data.prompts import prompt_encoder, prompt_tokenizer
from megarl.data.reading import DataError, OverlongError, RecordError, in_field


@dataclass(frozen=True)
class Sequence:
    """`tokens[prompt_length:]` is the response, of which `loss_mask` leaves out what others said; None: nothing."""

    tokens: list[int]
    prompt_length: int
    loss_mask: Tensor | None = None  # [response] bool


class Sequences:
    """Makes sequences; what no record could satisfy is refused when it is made."""

    def __init__(self, data: DataConfig, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        self.data, self.tokenizer, self.max_tokens = data, tokenizer, max_tokens
        self.tokenize_prompt = prompt_tokenizer(data, tokenizer)
        self.encode_prompt = prompt_encoder(data, tokenizer)
        if tokenizer.eos_token_id is None:
            name = tokenizer.name_or_path or "the model"
            raise DataError(f"the tokenizer of {name} has no EOS token to end responses")

    def prompt(self, prompt: Any, key: str | None = None) -> tuple[str, list[int]]:
        """Text and tokens of a prompt: text, messages in either spelling, or a transcript of Anthropic's data. `key` is
        the record's field that it is from, data.prompt_key if it is not given."""
        key = key or self.data.prompt_key
        if isinstance(prompt, list):
            prompt = messages_of(prompt, key)
        elif is_transcript(prompt) and self.data.apply_chat_template:
            turns = transcript(prompt, key)
            empty_end = turns[-1]["role"] == "assistant" and not turns[-1]["content"]
            prompt = turns[:-1] if empty_end else turns
        return self.tokenize_prompt(prompt, key)

    def single(self, prompt: Any, response: Any, key: str | None = None, prompt_key: str | None = None) -> Sequence:
        """One prompt and one response; the keys are the fields that they are from, data.response_key and
        data.prompt_key if they are not given."""
        key = key or self.data.response_key
        text, tokens = self.prompt(prompt, prompt_key)
        return self.checked(Sequence([*tokens, *self.response(text, response_text(response, key))], len(tokens)), key)

    def conversation(self, messages: list[chat.Message]) -> Sequence:
        """A conversation of which the assistant's turns are learned, as data.train_on_turns says."""
        key = self.data.messages_key
        if not self.data.apply_chat_template:
            raise RecordError(f"{key}: is a conversation, which needs data.apply_chat_template=true")
        with in_field(key):
            spans = chat.spans(self.tokenizer, messages, self.data.system_prompt, self.data.train_on_turns)
            prompt, read = self.encode_prompt(spans[0][0]), ""
        tokens, mask = list(prompt), []
        for number, (text, learned) in enumerate(spans):
            if number == len(spans) - 1:
                ids = self.response(read, text)
            else:
                ids = self.tokenizer(text, add_special_tokens=False)["input_ids"] if number else []
            tokens += ids
            mask += [learned] * len(ids)
            read += text
        loss_mask = None if all(mask) else torch.tensor(mask)
        return self.checked(Sequence(tokens, len(prompt), loss_mask), key)

    def response(self, prompt: str, response: str) -> list[int]:
        """Token ids of the response and EOS, behind a prompt of that text."""
        opened = prompt.rstrip()
        if opened.endswith(THINK) and response.startswith(THINK):
            response = response.removeprefix(THINK)
            response = response.removeprefix(prompt[len(opened) :])
        return [*self.tokenizer(response, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]

    def checked(self, sequence: Sequence, key: str) -> Sequence:
        """The sequence, if the model and a microbatch can hold it."""
        if len(sequence.tokens) > self.max_tokens:
            raise OverlongError(
                f"{key}: prompt and response have {len(sequence.tokens)} tokens; the model's positions and "
                f"train.train_mb_tokens allow {self.max_tokens}"
            )
        return sequence
