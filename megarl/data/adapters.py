"""Named adapters for data sets whose records do not have a prompt, an answer and a response of their own.

Contract: an adapter is a function from a record to the fields "prompt", "answer" and "response", as far as the data
set has them. It raises `RecordError` with the reason when a record is not what it should be. Without an adapter the
fields are the record's values under the keys that the config names.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from megarl.config import DataConfig
from megarl.data.reading import DataError, RecordError, json_type

Fields = dict[str, Any]
NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")


def required(record: Mapping[str, Any], key: str, hint: str = "") -> Any:
    """The value under `key`; a missing one is named together with the keys that are there."""
    if key not in record:
        raise RecordError(f"has no key {key!r}; its keys are {', '.join(map(repr, record)) or 'none'}{hint}")
    return record[key]


def required_text(record: Mapping[str, Any], key: str, hint: str = "") -> str:
    """The string under `key`, which must have something in it and be encodable."""
    text = required(record, key, hint)
    if not isinstance(text, str):
        raise RecordError(f"{key!r} must be a string, found {json_type(text)}")
    if not text.strip():
        raise RecordError(f"{key!r} is empty")
    check_encodable(text, key)
    return text


def check_encodable(text: str, key: str) -> None:
    """JSON can spell half of a surrogate pair (\\ud800); no tokenizer takes it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError(f"{key!r} holds a lone surrogate {text[error.start]!r} at character {error.start}") from error


def gsm8k(record: Mapping[str, Any]) -> Fields:
    """GSM8K (https://github.com/openai/grade-school-math): a solution ending in `#### 1,234` has the answer `1234`."""
    question, solution = required_text(record, "question"), required_text(record, "answer")
    _, marker, final = solution.rpartition("####")
    if not marker:
        raise RecordError("'answer' has no '####' before its final answer")
    answer = final.strip().replace(",", "")
    if not NUMBER.fullmatch(answer):
        raise RecordError(f"'answer' ends in {final.strip()!r} after '####', which is not a number")
    return {"prompt": question, "answer": answer, "response": solution}


ADAPTERS: dict[str, Callable[[Mapping[str, Any]], Fields]] = {"gsm8k": gsm8k}


def check_adapter(name: str | None) -> None:
    """Refuse a name that ADAPTERS does not have."""
    if name is not None and name not in ADAPTERS:
        raise DataError(f"data.adapter={name!r} is not known; adapters: {', '.join(ADAPTERS)}")


def read_fields(record: Mapping[str, Any], data: DataConfig, wanted: tuple[str, ...]) -> Fields:
    """What the adapter finds, or the `wanted` fields under data.prompt_key, data.answer_key and data.response_key."""
    if data.adapter is not None:
        return ADAPTERS[data.adapter](record)
    keys = {"prompt": data.prompt_key, "answer": data.answer_key, "response": data.response_key}
    return {field: required(record, keys[field], hint=f" (data.{field}_key names it)") for field in wanted}
