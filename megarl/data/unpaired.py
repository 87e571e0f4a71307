"""Unpaired preferences: single responses with a label, desirable or not, for KTO and BCO.

Contract: `load_unpaired` reads data.path into `Labelled`s, whose sequences are as `megarl.data.sequences` describes
them. A record is one of these, whichever keys the config names:

- prompt, response (or completion) and label; the prompt a string or messages, the response a string or a message;
- a conversation (chat messages or ShareGPT's turns) that ends in the assistant's turn, and label: the last turn is
  what the label is about, the others are the prompt;
- a pair or ranked responses, as `megarl.data.preferences` reads them: the chosen or best response is desirable, the
  rejected or worst one is not.

A label is true or false, or 1 or 0.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from megarl.config import DataConfig
from megarl.data.adapters import Fields, present_fields
from megarl.data.conversations import messages_of
from megarl.data.preferences import FIELDS, check_pairs_adapter, pair, pair_texts
from megarl.data.reading import Loaded, RecordError, collect
from megarl.data.sequences import Sequence, Sequences


@dataclass(frozen=True)
class Labelled:
    """Prompt, response and EOS, of which the first `prompt_length` tokens are the prompt."""

    id: str
    tokens: list[int]
    prompt_length: int
    desirable: bool


def load_unpaired(data: DataConfig, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Loaded[Labelled]:
    """The usable examples of data.path, in file order; `max_tokens` is what the model and a microbatch can hold."""
    check_pairs_adapter(data.adapter)
    data = dataclasses.replace(data, ranked_pairs="best_worst")  # else one response could be both
    sequences = Sequences(data, tokenizer, max_tokens)

    def build(record_id: str, record: dict[str, Any]) -> list[Labelled]:
        fields = present_fields(record, data, (*FIELDS, "response", "label"))
        if "label" not in fields and fields.keys() & {"chosen", "rejected", "responses"}:
            return both_sides(record_id, fields, data, sequences)
        made = labelled_sequence(fields, data, sequences)
        return [Labelled(record_id, made.tokens, made.prompt_length, desirable(fields, data))]

    loaded = collect(data, data.path, data.split, build, limit=data.max_records)
    return Loaded([example for examples in loaded.items for example in examples], loaded.dropped)


def both_sides(record_id: str, fields: Fields, data: DataConfig, sequences: Sequences) -> list[Labelled]:
    """The responses of pairs, the chosen one first."""
    pairs = [pair(record_id + texts.suffix, texts, sequences) for texts in pair_texts(fields, data)]
    return [
        Labelled(f"{made.id}{side}", tokens, made.prompt_length, side == "+")
        for made in pairs
        for side, tokens in (("+", made.chosen), ("-", made.rejected))
    ]


def labelled_sequence(fields: Fields, data: DataConfig, sequences: Sequences) -> Sequence:
    """Prompt and response of a record with a label."""
    if "response" in fields:
        prompt = fields.get("prompt", fields.get("messages"))
        if prompt is None:
            raise RecordError(f"{data.prompt_key}: is missing (data.prompt_key names it)")
        prompt_key = data.prompt_key if "prompt" in fields else data.messages_key
        return sequences.single(prompt, fields["response"], prompt_key=prompt_key)
    if "messages" not in fields:
        raise RecordError(
            f"{data.response_key}: is missing (data.response_key names it), and so is a conversation "
            f"(data.messages_key={data.messages_key!r})"
        )
    *before, last = messages_of(fields["messages"], data.messages_key)
    if last["role"] != "assistant":
        who = f"{data.messages_key}: the last message is the {last['role']}'s"
        raise RecordError(f"{who}; the label is about the assistant's last turn")
    return sequences.single(before, last, data.messages_key, prompt_key=data.messages_key)


def desirable(fields: Fields, data: DataConfig) -> bool:
    """The label."""
    label = fields.get("label")
    if not isinstance(label, bool | int) or label not in (0, 1):
        raise RecordError(f"{data.label_key}: must be true or false, or 1 or 0, found {label!r:.40}")
    return bool(label)
