"""Examples for supervised fine-tuning.

Contract: an example is a sequence as `megarl.data.sequences` describes it, from one of these layouts:

- a prompt (text or messages) and a response, which SFT learns; with data.reasoning_key the reasoning goes before the
  response between think tags, as in DeepSeek-R1's traces;
- a conversation under data.messages_key (chat messages, or ShareGPT's turns), of which SFT learns the assistant's
  turns: all of them, or the last. What the user and tools said between them is in the sequence and not in the loss.

A record with both counts as prompt and response.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megarl.config import DataConfig
from megarl.data.adapters import check_adapter, present_fields, required
from megarl.data.answers import trace
from megarl.data.conversations import messages_of, response_text
from megarl.data.reading import Loaded, RecordError, collect
from megarl.data.sequences import Sequence, Sequences


@dataclass(frozen=True)
class Example:
    """`tokens[prompt_length:]` is what the model learns to say, but for what `loss_mask` leaves out."""

    id: str
    tokens: list[int]
    prompt_length: int
    loss_mask: Tensor | None = None  # [response] bool, as in `megarl.data.records.Sample`; None: all of it


def load_examples(data: DataConfig, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Loaded[Example]:
    """The usable examples of data.path, in file order; `max_tokens` is what the model and a microbatch can hold."""
    check_adapter(data.adapter, wanted=("prompt", "response"))
    sequences = Sequences(data, tokenizer, max_tokens)

    def build(record_id: str, record: dict[str, Any]) -> Example:
        made = example(record, data, sequences)
        return Example(record_id, made.tokens, made.prompt_length, made.loss_mask)

    return collect(data, data.path, data.split, build, limit=data.max_records)


def example(record: dict[str, Any], data: DataConfig, sequences: Sequences) -> Sequence:
    """The sequence of one record."""
    fields = present_fields(record, data, ("prompt", "response", "messages"))
    if data.adapter is None and "messages" in fields and not {"prompt", "response"} <= fields.keys():
        return sequences.conversation(messages_of(fields["messages"], data.messages_key))
    if data.adapter is None:
        hint = f"; data.messages_key={data.messages_key!r} would hold a conversation"
        required(record, data.prompt_key, f" (data.prompt_key names it{hint})")
        if "response" not in fields:
            required(record, data.response_key, f" (data.response_key names it{hint})")
            raise RecordError(f"{data.response_key}: must be a string, found null")
    response = fields["response"]
    if data.reasoning_key is not None:
        reasoning = response_text(required(record, data.reasoning_key), data.reasoning_key)
        response = trace(reasoning, response_text(response, data.response_key))
    return sequences.single(fields.get("prompt"), response)
