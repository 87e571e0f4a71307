r"""Named adapters for data sets whose records do not have the fields that the loaders read.

Contract: `ADAPTERS` says for each data set which fields it has, and for each field how it is read off a record. A
function raises `RecordError` with `key: reason` when the record is not what it should be. Only the fields that a loader
wants are read, so that a record without a solution can still be a prompt.

==============  ========================================================================================================
prompts         prompt, answer
SFT             prompt, response (`<think>` ... `</think>` around the reasoning of traces)
preferences     prompt and chosen, rejected, perhaps with chosen_score, rejected_score; or prompt and responses, scores
==============  ========================================================================================================

Without an adapter the fields are the record's values under the keys that the config names.
"""

from collections.abc import Callable, Mapping
from typing import Any

from megarl.config import DataConfig
from megarl.data.answers import NUMBER, after_marker, between, last_boxed, trace
from megarl.data.conversations import transcript
from megarl.data.countdown import prompt_text as countdown_prompt
from megarl.data.reading import DataError, RecordError, check_encodable, in_field, json_type

Fields = dict[str, Any]
Record = Mapping[str, Any]
Field = Callable[[Record], Any]
ALSO = {"response": "completion", "messages": "conversations"}  # common names, where the configured one is not there


def required(record: Record, key: str, hint: str = "") -> Any:
    """The value under `key`; a missing one is named together with the keys that are there."""
    if key not in record:
        raise RecordError(f"{key}: is missing; the record has {', '.join(map(repr, record)) or 'no keys'}{hint}")
    return record[key]


def required_text(record: Record, key: str) -> str:
    """The string under `key`, which must have something in it and be encodable."""
    value = required(record, key)
    if not isinstance(value, str):
        raise RecordError(f"{key}: must be a string, found {json_type(value)}")
    if not value.strip():
        raise RecordError(f"{key}: is empty")
    with in_field(key):
        check_encodable(value)
    return value


def required_list(record: Record, key: str) -> list[Any]:
    """The list under `key`, which must have something in it."""
    value = required(record, key)
    if not isinstance(value, list) or not value:
        raise RecordError(f"{key}: must be a list, found {'an empty one' if value == [] else json_type(value)}")
    return value


def text(key: str) -> Field:
    """The string under `key`."""
    return lambda record: required_text(record, key)


def value(key: str) -> Field:
    """Whatever is under `key`; the loader says what it must be."""
    return lambda record: required(record, key)


def boxed(key: str) -> Field:
    r"""The last ``\boxed{}`` of the solution under `key`."""

    def read(record: Record) -> str:
        if answer := last_boxed(required_text(record, key)):
            return answer
        raise RecordError(rf"{key}: has no \boxed{{}} with a final answer")

    return read


def thought(reasoning: str, answer: str) -> Field:
    """A trace of which the reasoning and the answer are under two keys."""
    return lambda record: trace(required_text(record, reasoning), required_text(record, answer))


def gsm8k_answer(record: Record) -> str:
    """A solution ending in `#### 1,234` has the answer `1234`."""
    final = after_marker(required_text(record, "answer"))
    if final is None:
        raise RecordError("answer: has no '####' before its final answer")
    answer = final.replace(",", "")
    if not NUMBER.fullmatch(answer):
        raise RecordError(f"answer: ends in {final!r} after '####', which is not a number")
    return answer


def openr1_generation(record: Record) -> str:
    """The first generation that is complete and that math-verify, or else the Llama judge, accepted."""
    generations = required_list(record, "generations")
    complete = required_list(record, "is_reasoning_complete")
    for judge in ("correctness_math_verify", "correctness_llama"):
        verdicts = record.get(judge) or []  # null for the rows that the judge did not see
        for number, verdict in enumerate(verdicts[: len(generations)]):
            if verdict and complete[number : number + 1] == [True]:
                return generations[number]
    raise RecordError("generations: none is both complete and verified as correct")


def s1k_answer(record: Record) -> str:
    """The boxed answer of the solution, or the whole of a solution that is one line, as those of AIME problems are."""
    solution = required_text(record, "solution").strip()
    answer = last_boxed(solution) or (solution if "\n" not in solution else None)
    if answer is None:
        raise RecordError(r"solution: has no \boxed{} with a final answer, and is longer than a line")
    return answer


def openthoughts_turn(number: int, speaker: str) -> Field:
    """One side of the only exchange of a conversation."""

    def read(record: Record) -> str:
        turns = required_list(record, "conversations")
        who = [turn.get("from") if isinstance(turn, dict) else None for turn in turns]
        if who != ["user", "assistant"]:
            raise RecordError(f"conversations: must be one turn of the user's and one of the assistant's, found {who}")
        return required_text(turns[number], "value")

    return read


def openthoughts_response(record: Record) -> str:
    """Thought and solution, from the data set's own marks into think tags.

    Its system message describes those marks, and is left out with them.
    """
    response = openthoughts_turn(1, "assistant")(record)
    thinking = between(response, "<|begin_of_thought|>", "<|end_of_thought|>")
    solution = between(response, "<|begin_of_solution|>", "<|end_of_solution|>")
    if thinking is None or solution is None:
        raise RecordError("conversations: the assistant's turn lacks the marks of its thought or of its solution")
    return trace(thinking, solution)


def natural_reasoning_response(record: Record) -> str:
    """The first of the responses."""
    first = required_list(record, "responses")[0]
    if not isinstance(first, dict):
        raise RecordError(f"responses: the first must be an object, found {json_type(first)}")
    return required_text(first, "response")


def hh_prompt(record: Record) -> list[Fields]:
    """The dialogue up to the last answer, for loops that sample answers of their own."""
    turns = transcript(required_text(record, "chosen"), "chosen")
    if turns[-1]["role"] != "assistant":
        raise RecordError("chosen: must end in the assistant's turn")
    return turns[:-1]


def completions(key: str) -> Field:
    """A value of each of UltraFeedback's completions."""

    def read(record: Record) -> list[Any]:
        rows = required_list(record, "completions")
        for number, row in enumerate(rows):
            if not isinstance(row, dict) or row.get(key) is None:
                raise RecordError(f"completions: number {number} has no {key!r}")
        return [row[key] for row in rows]

    return read


ADAPTERS: dict[str, dict[str, Field]] = {
    # openai/gsm8k, https://github.com/openai/grade-school-math
    "gsm8k": {"prompt": text("question"), "answer": gsm8k_answer, "response": text("answer")},
    # hendrycks/competition_math and its copies, HuggingFaceH4/MATH-500 among them
    "math": {"prompt": text("problem"), "answer": boxed("solution"), "response": text("solution")},
    # AI-MO/NuminaMath-CoT
    "numinamath_cot": {"prompt": text("problem"), "answer": boxed("solution"), "response": text("solution")},
    # agentica-org/DeepScaleR-Preview-Dataset; some of its solutions are empty
    "deepscaler": {"prompt": text("problem"), "answer": value("answer"), "response": text("solution")},
    # SynthLabsAI/Big-Math-RL-Verified; data.pass_rate_key=llama8b_solve_rate is its measure of difficulty
    "big_math": {"prompt": text("problem"), "answer": value("answer")},
    # GAIR/LIMO
    "limo": {"prompt": text("question"), "answer": value("answer"), "response": text("solution")},
    # open-r1/OpenR1-Math-220k; its generations have think tags already
    "openr1_math": {"prompt": text("problem"), "answer": value("answer"), "response": openr1_generation},
    # simplescaling/s1K-1.1, with DeepSeek-R1's traces rather than Gemini's
    "s1k": {
        "prompt": text("question"),
        "answer": s1k_answer,
        "response": thought("deepseek_thinking_trajectory", "deepseek_attempt"),
    },
    # open-thoughts/OpenThoughts-114k, subset default: no answers
    "openthoughts": {"prompt": openthoughts_turn(0, "user"), "response": openthoughts_response},
    # open-thoughts/OpenThoughts-114k, subset metadata; the answers of its mathematics
    "openthoughts_metadata": {
        "prompt": text("problem"),
        "answer": boxed("ground_truth_solution"),
        "response": thought("deepseek_reasoning", "deepseek_solution"),
    },
    # facebook/natural_reasoning; some of its reference answers are empty
    "natural_reasoning": {
        "prompt": text("question"),
        "answer": text("reference_answer"),
        "response": natural_reasoning_response,
    },
    # megarl.data.countdown, and Jiayi-Pan/Countdown-Tasks-3to4
    "countdown": {"prompt": countdown_prompt, "answer": value("target")},
    # Anthropic/hh-rlhf; of a pair the prompt is what both transcripts share
    "hh_rlhf": {"prompt": hh_prompt, "chosen": text("chosen"), "rejected": text("rejected")},
    # openbmb/UltraFeedback; the score is the mean of the four aspects' ratings
    "ultrafeedback": {
        "prompt": text("instruction"),
        "responses": completions("response"),
        "scores": completions("fine-grained_score"),
    },
    # HuggingFaceH4/ultrafeedback_binarized
    "ultrafeedback_binarized": {
        "prompt": text("prompt"),
        "chosen": value("chosen"),
        "rejected": value("rejected"),
        "chosen_score": value("score_chosen"),
        "rejected_score": value("score_rejected"),
    },
}


def check_adapter(name: str | None, wanted: tuple[str, ...] = ()) -> None:
    """Refuse a name that ADAPTERS does not have, or that lacks a wanted field."""
    if name is None:
        return
    if name not in ADAPTERS:
        raise DataError(f"data.adapter={name!r} is not known; adapters: {', '.join(ADAPTERS)}")
    if missing := [field for field in wanted if field not in ADAPTERS[name]]:
        raise DataError(
            f"data.adapter={name!r} has no {' and no '.join(missing)}: it gives {', '.join(ADAPTERS[name])}"
        )


def read_fields(record: Record, data: DataConfig, wanted: tuple[str, ...]) -> Fields:
    """The `wanted` fields: those of them that the adapter has, or all, under the keys that the config names."""
    if data.adapter is not None:
        adapter = ADAPTERS[data.adapter]
        return {field: adapter[field](record) for field in wanted if field in adapter}
    return {field: required(record, keys(data)[field], hint=f" (data.{field}_key names it)") for field in wanted}


def present_fields(record: Record, data: DataConfig, known: tuple[str, ...]) -> Fields:
    """Those of the `known` fields that the adapter has, or that the record has under the keys that the config names.

    A value of null is none: it is what Parquet has for a missing one.
    """
    if data.adapter is not None:
        return read_fields(record, data, known)
    named = {field: record.get(keys(data)[field], record.get(ALSO.get(field))) for field in known}
    return {field: found for field, found in named.items() if found is not None}


def keys(data: DataConfig) -> dict[str, str | None]:
    """Where the config says that each field is; None for one that it does not have."""
    return {
        "prompt": data.prompt_key,
        "answer": data.answer_key,
        "response": data.response_key,
        "reasoning": data.reasoning_key,
        "messages": data.messages_key,
        "chosen": data.chosen_key,
        "rejected": data.rejected_key,
        "chosen_score": data.chosen_score_key,
        "rejected_score": data.rejected_score_key,
        "responses": data.responses_key,
        "scores": data.scores_key,
        "label": data.label_key,
        "reference_prompt": data.reference_prompt_key,
    }
