"""Preference pairs: two responses to one prompt, of which one is better.

Contract: `load_pairs` reads data.path into `Pair`s, whose sequences are as `megarl.data.sequences` describes them and
begin with the same prompt. A record is one of these, whichever keys the config or the adapter names:

- prompt, chosen, rejected, all strings; the prompt may be messages instead, under the prompt's or messages' key;
- chosen and rejected as lists of chat messages or ShareGPT turns: whole conversations that differ in the last turn, the
  assistant's, so that the rest is the prompt; or only that turn, with the prompt apart;
- chosen and rejected as single messages ({"from", "value"} or {"role", "content"}), with the prompt apart;
- chosen and rejected as Anthropic's transcripts ("\\n\\nHuman: ... \\n\\nAssistant: ..."), alike up to the last answer;
- responses with scores: strings and a list of scores, or objects with a score each. data.ranked_pairs says which pairs
  they make: the best with the worst (of equals the first), or every two with different scores.

Scores of a pair, where there are any, stay with it for the losses that use them; they may contradict the labels. Two
equal responses, or responses that no score tells apart, are a bad record. If either sequence is over-long the whole
record is dropped, with all of its pairs.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from transformers import PreTrainedTokenizerBase

from megarl.config import DataConfig
from megarl.data.adapters import Fields, check_adapter, present_fields
from megarl.data.chat import Message
from megarl.data.conversations import is_transcript, messages_of, response_text, transcript
from megarl.data.reading import DataError, Loaded, RecordError, collect, json_type
from megarl.data.sequences import Sequences

FIELDS = (
    "prompt",
    "messages",
    "chosen",
    "rejected",
    "chosen_score",
    "rejected_score",
    "responses",
    "scores",
    "reference_prompt",
)
TEXT_KEYS = ("response", "text", "content", "value", "completion", "answer")
SCORE_KEYS = ("score", "overall_score", "rating", "reward")


@dataclass(frozen=True)
class Pair:
    """`chosen` and `rejected` are prompt, response and EOS; the first `prompt_length` tokens of both are the prompt."""

    id: str
    chosen: list[int]
    rejected: list[int]
    prompt_length: int
    chosen_score: float | None = None
    rejected_score: float | None = None
    reference_prompt: list[int] | None = None  # what the reference model reads in place of the prompt (LongPO)


@dataclass(frozen=True)
class Texts:
    """A pair as read, before it is tokens; `suffix` tells apart the pairs of one record."""

    prompt: Any
    chosen: Any
    rejected: Any
    keys: tuple[str, str]  # the fields that chosen and rejected are from
    chosen_score: float | None = None
    rejected_score: float | None = None
    suffix: str = ""


def load_pairs(data: DataConfig, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Loaded[Pair]:
    """The usable pairs of data.path, in file order; `max_tokens` is what the model and a microbatch can hold."""
    check_pairs_adapter(data.adapter)
    sequences = Sequences(data, tokenizer, max_tokens)

    def build(record_id: str, record: dict[str, Any]) -> list[Pair]:
        fields = present_fields(record, data, FIELDS)
        pairs = [pair(record_id + texts.suffix, texts, sequences) for texts in pair_texts(fields, data)]
        if "reference_prompt" not in fields:
            return pairs
        _, prompt = sequences.prompt(fields["reference_prompt"], data.reference_prompt_key)
        return [Pair(**vars(made) | {"reference_prompt": prompt}) for made in pairs]

    loaded = collect(data, data.path, data.split, build, limit=data.max_records)
    return Loaded([made for pairs in loaded.items for made in pairs], loaded.dropped)


def need_scores(pairs: Iterable[Pair], data: DataConfig, who: str) -> None:
    """Raise DataError if a pair has no scores, and say who needs them."""
    without = [pair.id for pair in pairs if pair.chosen_score is None]
    if without:
        keys = " and ".join(f"data.{key}={vars(data)[key]!r}" for key in ("chosen_score_key", "rejected_score_key"))
        others = f", nor have {len(without) - 1} other pairs" if without[1:] else ""
        raise DataError(f"{without[0]}: has no scores ({keys}), which {who} needs{others}")


def check_pairs_adapter(name: str | None) -> None:
    """Refuse an adapter without pairs or ranked responses."""
    check_adapter(name)
    try:
        check_adapter(name, wanted=("chosen", "rejected"))
    except DataError:
        check_adapter(name, wanted=("responses", "scores"))


def pair(pair_id: str, texts: Texts, sequences: Sequences) -> Pair:
    """The tokens of a pair."""
    chosen_key, rejected_key = texts.keys
    chosen = sequences.single(texts.prompt, texts.chosen, chosen_key)
    rejected = sequences.single(texts.prompt, texts.rejected, rejected_key)
    if chosen.tokens == rejected.tokens:
        raise RecordError(f"{rejected_key}: is the same response as {chosen_key}")
    scores = (texts.chosen_score, texts.rejected_score)
    return Pair(pair_id, chosen.tokens, rejected.tokens, chosen.prompt_length, *scores)


def pair_texts(fields: Fields, data: DataConfig) -> list[Texts]:
    """The pairs of a record."""
    if "chosen" not in fields and "rejected" not in fields and "responses" in fields:
        return ranked(fields, data)
    if missing := [key for key in ("chosen", "rejected") if key not in fields]:
        keys = [vars(data)[f"{key}_key"] for key in missing]
        named = " and ".join(f"data.{key}_key" for key in missing)
        raise RecordError(
            f"{' and '.join(keys)}: missing ({named}), and so is {data.responses_key!r} to rank (data.responses_key)"
        )
    prompt, chosen, rejected = sides(fields, data)
    named = {"chosen_score": data.chosen_score_key, "rejected_score": data.rejected_score_key}
    scores = [finite(fields[field], key) if field in fields else None for field, key in named.items()]
    if (scores[0] is None) != (scores[1] is None):
        lacks = data.chosen_score_key if scores[0] is None else data.rejected_score_key
        raise RecordError(f"{lacks}: is missing, though the other response has a score")
    return [Texts(prompt, chosen, rejected, (data.chosen_key, data.rejected_key), *scores)]


def sides(fields: Fields, data: DataConfig) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected response of the layouts with two responses."""
    chosen, rejected = fields["chosen"], fields["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list):
        turns = messages_of(chosen, data.chosen_key), messages_of(rejected, data.rejected_key)
        return split(*turns, data, fallback=lambda: prompt_of(fields, data))
    if is_transcript(chosen) and is_transcript(rejected):
        if data.apply_chat_template:
            turns = transcript(chosen, data.chosen_key), transcript(rejected, data.rejected_key)
            return split(*turns, data, fallback=lambda: prompt_of(fields, data))
        return split_text(chosen, rejected, data)
    if type(chosen) is not type(rejected):
        raise RecordError(
            f"{data.rejected_key}: is {json_type(rejected)}, but {data.chosen_key} is {json_type(chosen)}"
        )
    return prompt_of(fields, data), chosen, rejected


def prompt_of(fields: Fields, data: DataConfig) -> Any:
    """The prompt that stands apart from the responses."""
    if "prompt" in fields:
        return fields["prompt"]
    if "messages" in fields:
        return messages_of(fields["messages"], data.messages_key)
    raise RecordError(
        f"{data.prompt_key}: is missing (data.prompt_key names it), and so is {data.messages_key!r} "
        "(data.messages_key); the responses do not bring a prompt"
    )


def split(
    chosen: list[Message], rejected: list[Message], data: DataConfig, fallback: Callable[[], Any]
) -> tuple[Any, str, str]:
    """Two conversations as the prompt they share and their last turns; `fallback` has the prompt if they share none."""
    for key, messages in ((data.chosen_key, chosen), (data.rejected_key, rejected)):
        if messages[-1]["role"] != "assistant":
            raise RecordError(f"{key}: the last message is the {messages[-1]['role']}'s, not the assistant's")
    before, other = (
        [(message["role"], message["content"]) for message in messages[:-1]] for messages in (chosen, rejected)
    )
    if before != other:
        shared = next((at for at, (a, b) in enumerate(zip(before, other, strict=False)) if a != b), None)
        where = f"differ in turn {shared}" if shared is not None else f"have {len(chosen)} and {len(rejected)} turns"
        raise RecordError(f"{data.rejected_key}: may differ from {data.chosen_key} only in the last turn; they {where}")
    prompt = chosen[:-1] or fallback()
    return prompt, response_text(chosen[-1], data.chosen_key), response_text(rejected[-1], data.rejected_key)


def split_text(chosen: str, rejected: str, data: DataConfig) -> tuple[str, str, str]:
    """Two transcripts as plain text: all up to the last "Assistant:" is the prompt."""
    marker = "\n\nAssistant:"
    (prompt, found, last), (other, _, other_last) = chosen.rpartition(marker), rejected.rpartition(marker)
    if not found or prompt != other:
        raise RecordError(
            f"{data.rejected_key}: may differ from {data.chosen_key} only in the last turn, the assistant's"
        )
    return prompt + marker, last.rstrip(), other_last.rstrip()


def ranked(fields: Fields, data: DataConfig) -> list[Texts]:
    """Pairs of ranked responses, as data.ranked_pairs says."""
    responses, scores = scored(fields["responses"], fields.get("scores"), data)
    if data.ranked_pairs == "best_worst":
        order = range(len(scores))
        indices = [(max(order, key=scores.__getitem__), min(order, key=scores.__getitem__))]
    else:
        indices = [(i, j) if scores[i] > scores[j] else (j, i) for i, j in combinations(range(len(scores)), 2)]
    told_apart = [(best, worst) for best, worst in indices if scores[best] > scores[worst]]
    if not told_apart:
        raise RecordError(f"{data.scores_key}: none tells the {len(responses)} responses apart: {scores}"[:200])
    if "prompt" not in fields:
        raise RecordError(f"{data.prompt_key}: is missing (data.prompt_key names it)")
    key = data.responses_key
    return [
        Texts(
            fields["prompt"],
            responses[i],
            responses[j],
            (f"{key}[{i}]", f"{key}[{j}]"),
            scores[i],
            scores[j],
            f"#{i}>{j}",
        )
        for i, j in told_apart
    ]


def scored(responses: Any, scores: Any, data: DataConfig) -> tuple[list[Any], list[float]]:
    """Responses and their scores, from two lists or from a list of objects that have both."""
    if not isinstance(responses, list) or len(responses) < 2:
        what = f"{len(responses)} of them" if isinstance(responses, list) else json_type(responses)
        raise RecordError(f"{data.responses_key}: must be a list of at least two, found {what}")
    if scores is None:
        places = [f"{data.responses_key}[{number}]" for number in range(len(responses))]
        scores = [first_of(response, SCORE_KEYS, at) for at, response in zip(places, responses, strict=True)]
        responses = [first_of(response, TEXT_KEYS, at) for at, response in zip(places, responses, strict=True)]
    if not isinstance(scores, list) or len(scores) != len(responses):
        what = f"{len(scores)} of them" if isinstance(scores, list) else json_type(scores)
        raise RecordError(
            f"{data.scores_key}: must be a list of {len(responses)}, as many as there are responses, found {what}"
        )
    return responses, [finite(score, f"{data.scores_key}[{number}]") for number, score in enumerate(scores)]


def first_of(response: Any, names: tuple[str, ...], place: str) -> Any:
    """The value of a scored response under the first of `names` that it has."""
    if isinstance(response, dict):
        for name in names:
            if name in response:
                return response[name]
    raise RecordError(f"{place}: must be an object with one of {', '.join(names)}: {response!r:.60}")


def finite(value: Any, key: str) -> float:
    """A score as a number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RecordError(f"{key}: must be a finite number, found {value!r:.40}")
    return float(value)
