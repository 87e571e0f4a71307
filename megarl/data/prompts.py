"""Prompts for rollouts, and the stream that hands them out epoch after epoch.

Contract: `load_prompts` reads a whole data set on every rank and gives every rank the same list. A `Prompt` knows its
tokens, the reference answer and its record, and its id leads back to the line it came from. What a `PromptStream`
draws depends on its arguments alone, so that every rank draws the same, and an epoch and a position restore it.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from transformers import PreTrainedTokenizerBase

from megarl.config import DataConfig
from megarl.data import chat, curriculum
from megarl.data.adapters import check_adapter, read_fields
from megarl.data.reading import (
    DataError,
    Loaded,
    OverlongError,
    RecordError,
    check_encodable,
    collect,
    in_field,
    json_type,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    """One prompt: `tokens` are the ids of `text`, all that the model reads; an adapter may give no `answer`."""

    id: str
    tokens: list[int]
    text: str
    answer: str | None
    fields: dict[str, Any]


def load_prompts(data: DataConfig, tokenizer: PreTrainedTokenizerBase, *, validation: bool = False) -> Loaded[Prompt]:
    """The usable prompts of data.path, selected and ordered as the config says, or all those of data.val_path."""
    check_adapter(data.adapter, wanted=("prompt",))
    tokenize = prompt_tokenizer(data, tokenizer)

    def build(record_id: str, record: dict[str, Any]) -> Prompt:
        fields = read_fields(record, data, wanted=("prompt", "answer"))
        text, tokens = tokenize(fields["prompt"])
        with in_field(data.answer_key):
            answer = answer_text(fields["answer"]) if "answer" in fields else None
        if data.pass_rate_key is not None:
            curriculum.checked_rate(record.get(data.pass_rate_key), data.pass_rate_key)
        return Prompt(record_id, tokens, text, answer, record)

    if not validation:
        return by_difficulty(collect(data, data.path, data.split, build, limit=data.max_records), data)
    if data.val_path is None:
        raise DataError("data.val_path is not set, so there are no validation prompts; name a file or a data set")
    source = dataclasses.replace(data, subset=data.val_subset or data.subset, pass_rate_key=None)
    return collect(source, data.val_path, data.val_split, build, limit=None)


def by_difficulty(prompts: Loaded[Prompt], data: DataConfig) -> Loaded[Prompt]:
    """The prompts whose pass rate is in the config's range, in its order."""
    if (data.min_pass_rate, data.max_pass_rate, data.order) == (0, 1, "file"):
        return prompts
    if data.pass_rates is not None:
        measured = curriculum.read_pass_rates(data.pass_rates)
        rates = [measured.get(prompt.id) for prompt in prompts]
    else:
        rates = [prompt.fields.get(data.pass_rate_key) for prompt in prompts]
    kept = curriculum.within(prompts, rates, data.min_pass_rate, data.max_pass_rate)
    return Loaded(curriculum.in_order(kept, data.order), kept.dropped)


def prompt_tokenizer(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Callable[..., tuple[str, list[int]]]:
    """A function from a prompt, and the field it is from (data.prompt_key), to its text and tokens; what no prompt
    could satisfy is refused before any is read."""
    check_adapter(data.adapter)
    chat.check_template(tokenizer, data.system_prompt, data.apply_chat_template)
    encode = prompt_encoder(data, tokenizer)

    def tokenize(prompt: Any, key: str | None = None) -> tuple[str, list[int]]:
        with in_field(key or data.prompt_key):
            text = chat.prompt_text(tokenizer, prompt, data.system_prompt, data.apply_chat_template)
            return text, encode(text)

    return tokenize


def prompt_encoder(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    """A function from a prompt's text to its tokens, of which there must be some, and not too many."""
    special_ids = set(tokenizer.all_special_ids)

    def encode(text: str) -> list[int]:
        tokens = chat.encode(tokenizer, text, data.apply_chat_template)
        if special_ids.issuperset(tokens):
            raise RecordError(f"has no tokens but special ones: {text!r:.80}")
        if len(tokens) > data.max_prompt_length:
            raise OverlongError(f"has {len(tokens)} tokens, data.max_prompt_length={data.max_prompt_length}")
        return tokens

    return encode


def answer_text(answer: Any) -> str:
    """The reference answer as text; numbers are written as JSON writes them."""
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise RecordError(f"must be a string or a number, found {json_type(answer)}")
    text = str(answer)
    check_encodable(text)
    return text


class PromptStream(Generic[T]):
    """Draws from `items` without end: each of them once an epoch, reshuffled for each epoch by (seed, epoch).

    The order comes from `random.random`, whose sequence for a seed Python guarantees across versions and machines. It
    does not guarantee that of `shuffle`, nor NumPy that of a permutation.
    """

    def __init__(self, items: Sequence[T], seed: int, shuffle: bool) -> None:
        if not items:
            raise DataError("a stream needs at least one item")
        self.items = items
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0  # epochs completed
        self.position = 0  # items of this epoch already drawn
        self.order = self.epoch_order()

    def epoch_order(self) -> list[int]:
        """Indices of the items in the order of this epoch."""
        if not self.shuffle:
            return list(range(len(self.items)))
        generator = random.Random(f"{self.seed}/{self.epoch}")
        keys = [generator.random() for _ in self.items]
        return sorted(range(len(keys)), key=keys.__getitem__)

    def next(self, count: int) -> list[T]:
        """The next `count` items, going over into the next epoch (or epochs) where this one ends."""
        drawn: list[T] = []
        while len(drawn) < count:
            part = self.order[self.position : self.position + count - len(drawn)]
            drawn += [self.items[index] for index in part]
            self.position += len(part)
            if self.position == len(self.items):
                self.epoch, self.position = self.epoch + 1, 0
                self.order = self.epoch_order()
        return drawn

    def state_dict(self) -> dict[str, int]:
        """Where the stream is, and what it must be restored onto."""
        here = {"epoch": self.epoch, "position": self.position}
        return here | {"seed": self.seed, "shuffle": self.shuffle, "length": len(self.items)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state` was taken; another seed, order or data set would be another run."""
        here = self.state_dict()
        for key in ("seed", "shuffle", "length"):
            if state[key] != here[key]:
                raise DataError(
                    f"the checkpoint's prompt stream has {key} {state[key]}, this run's has {here[key]}; "
                    "resume with the same data and seed"
                )
        self.epoch, self.position = state["epoch"], state["position"]
        self.order = self.epoch_order()
