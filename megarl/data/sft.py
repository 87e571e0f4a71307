"""Examples for supervised fine-tuning.

Contract: an example is prompt + response + EOS, laid end to end. The prompt is rendered as for rollouts, so that a
model fine-tuned on it sees the same prompts in RL; the response is encoded without special tokens; and the end is
always the tokenizer's EOS token, because what templates write after an answer differs and EOS is where rollouts stop.
An example is over-long if its prompt has more than data.max_prompt_length tokens, or all of it more than `max_tokens`.
"""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from megarl.config import DataConfig
from megarl.data.adapters import check_encodable, read_fields
from megarl.data.prompts import prompt_tokenizer
from megarl.data.reading import DataError, Loaded, OverlongError, RecordError, collect, json_type


@dataclass(frozen=True)
class Example:
    """`tokens[prompt_length:]` is what the model learns to say."""

    id: str
    tokens: list[int]
    prompt_length: int


def load_examples(data: DataConfig, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Loaded[Example]:
    """The usable examples of data.path, in file order; `max_tokens` is what the model and a microbatch can hold."""
    tokenize = prompt_tokenizer(data, tokenizer)
    if tokenizer.eos_token_id is None:
        raise DataError(f"the tokenizer of {tokenizer.name_or_path or 'the model'} has no EOS token to end responses")

    def build(record_id: str, record: dict[str, Any]) -> Example:
        fields = read_fields(record, data, wanted=("prompt", "response"))
        _, prompt = tokenize(fields["prompt"])
        response = tokenizer(response_text(fields.get("response")), add_special_tokens=False)["input_ids"]
        tokens = [*prompt, *response, tokenizer.eos_token_id]
        if len(tokens) > max_tokens:
            raise OverlongError(
                f"prompt and response have {len(tokens)} tokens; the model's positions and train.train_mb_tokens "
                f"allow {max_tokens}"
            )
        return Example(record_id, tokens, len(prompt))

    return collect(data, data.path, data.split, build, limit=data.max_records)


def response_text(response: Any) -> str:
    """The response, which must be a string with something in it."""
    if not isinstance(response, str):
        raise RecordError(f"the response must be a string, found {json_type(response)}")
    if not response.strip():
        raise RecordError("the response is empty")
    check_encodable(response, "response")
    return response
