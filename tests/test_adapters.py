"""Named data sets: a record in the layout of each, and what the loaders make of it. The contents are made up."""

import json
from pathlib import Path
from typing import Any

import pytest

from megarl.config import DataConfig
from megarl.data.adapters import ADAPTERS, read_fields
from megarl.data.answers import after_marker, between, last_boxed
from megarl.data.preferences import load_pairs
from megarl.data.prompts import load_prompts
from megarl.data.reading import DataError, RecordError
from megarl.data.sft import load_examples
from tests.byte_tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()

RECORDS: dict[str, dict[str, Any]] = {
    "gsm8k": {"question": "Two plus two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
    "math": {
        "problem": "Compute $\\frac{1}{2}+\\frac{1}{4}$.",
        "level": "Level 1",
        "type": "Prealgebra",
        "solution": "It is $\\boxed{\\frac{3}{4}}$.",
    },
    "numinamath_cot": {
        "source": "synthetic_math",
        "problem": "Which $x$ has $2x=8$?",
        "solution": "Halve both sides: $\\boxed{4}$.",
        "messages": [
            {"content": "Which $x$ has $2x=8$?", "role": "user"},
            {"content": "Halve both sides: $\\boxed{4}$.", "role": "assistant"},
        ],
    },
    "deepscaler": {"problem": "What is $3!$?", "answer": "6", "solution": "Multiply: $\\boxed{6}$."},
    "big_math": {
        "problem": "What is $10-7$?",
        "answer": "3",
        "source": "gsm8k",
        "domain": ["Mathematics -> Algebra -> Prealgebra -> Integers"],
        "llama8b_solve_rate": 0.984375,
    },
    "limo": {"question": "How many primes are below 10?", "solution": "2, 3, 5, 7: \\boxed{4}", "answer": "4"},
    "openr1_math": {
        "problem": "What is $9-4$?",
        "solution": "Count back: $5$.",
        "answer": "5",
        "problem_type": "Algebra",
        "question_type": "math-word-problem",
        "source": "olympiads",
        "uuid": "00000000-0000-0000-0000-000000000000",
        "is_reasoning_complete": [False, True, True],
        "generations": ["<think>\nNine", "<think>\nno\n</think>\n\n6", "<think>\nback four\n</think>\n\n\\boxed{5}"],
        "correctness_math_verify": [True, False, True],
        "correctness_llama": None,
        "finish_reasons": None,
        "correctness_count": 1,
        "messages": [
            {"content": "What is $9-4$?", "role": "user"},
            {"content": "<think>\nback four\n</think>\n\n\\boxed{5}", "role": "assistant"},
        ],
    },
    "s1k": {
        "solution": "128",
        "question": "What is $2^7$?",
        "cot_type": "math",
        "source_type": "qq8933/AIME_1983_2024",
        "metadata": "{'Year': 1984}",
        "gemini_thinking_trajectory": "Square a few times.",
        "gemini_attempt": "It is 128.",
        "deepseek_thinking_trajectory": "Double seven times.",
        "deepseek_attempt": "\\boxed{128}",
        "gemini_grade": "Yes",
        "gemini_grade_reason": "",
        "deepseek_grade": "Yes",
        "deepseek_grade_reason": "",
    },
    "openthoughts": {
        "system": "Answer in two parts, thought and solution, between their marks.",
        "conversations": [
            {"from": "user", "value": "What is $6\\cdot7$?"},
            {
                "from": "assistant",
                "value": "<|begin_of_thought|>\n\nSix sevens.\n\n<|end_of_thought|>\n\n"
                "<|begin_of_solution|>\n\n\\boxed{42}\n\n<|end_of_solution|>",
            },
        ],
    },
    "openthoughts_metadata": {
        "problem": "What is $6\\cdot7$?",
        "deepseek_reasoning": "Six sevens.",
        "deepseek_solution": "\\boxed{42}",
        "ground_truth_solution": "$6\\cdot7=\\boxed{42}$",
        "domain": "math",
        "source": "numina_math",
        "test_cases": None,
        "starter_code": None,
    },
    "natural_reasoning": {
        "question": "Why is ice lighter than water?",
        "reference_answer": "Its lattice is open.",
        "responses": [{"response_model": "Llama3.3-70B-Instruct", "response": "Hydrogen bonds keep it open."}],
    },
    "countdown": {"target": 65, "nums": [19, 36, 10]},
    "hh_rlhf": {
        "chosen": "\n\nHuman: Hello?\n\nAssistant: Hi.\n\nHuman: 2+2?\n\nAssistant: Four.",
        "rejected": "\n\nHuman: Hello?\n\nAssistant: Hi.\n\nHuman: 2+2?\n\nAssistant: Who knows.",
    },
    "ultrafeedback": {
        "source": "sharegpt",
        "instruction": "Name a prime.",
        "models": ["a", "b"],
        "completions": [
            {
                "annotations": {"helpfulness": {"Rating": "2", "Rationale": "", "Type": ["1"]}},
                "custom_system_prompt": "",
                "model": name,
                "principle": "helpfulness",
                "response": response,
                "critique": "",
                "fine-grained_score": score,
                "overall_score": 7.5,
            }
            for name, response, score in (("a", "Nine.", 1.75), ("b", "Seven.", 4.5))
        ],
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
    },
    "ultrafeedback_binarized": {
        "prompt": "Name a prime.",
        "prompt_id": "0",
        "chosen": [{"content": "Name a prime.", "role": "user"}, {"content": "Seven.", "role": "assistant"}],
        "rejected": [{"content": "Name a prime.", "role": "user"}, {"content": "Nine.", "role": "assistant"}],
        "messages": [{"content": "Name a prime.", "role": "user"}, {"content": "Seven.", "role": "assistant"}],
        "score_chosen": 8.5,
        "score_rejected": 3.0,
    },
}
ANSWERS = {
    "gsm8k": "4",
    "math": "\\frac{3}{4}",
    "numinamath_cot": "4",
    "deepscaler": "6",
    "big_math": "3",
    "limo": "4",
    "openr1_math": "5",
    "s1k": "128",
    "openthoughts": None,
    "openthoughts_metadata": "42",
    "natural_reasoning": "Its lattice is open.",
    "countdown": "65",
}
RESPONSES = {
    "gsm8k": "2 + 2 = <<2+2=4>>4\n#### 4",
    "math": "It is $\\boxed{\\frac{3}{4}}$.",
    "numinamath_cot": "Halve both sides: $\\boxed{4}$.",
    "deepscaler": "Multiply: $\\boxed{6}$.",
    "limo": "2, 3, 5, 7: \\boxed{4}",
    "openr1_math": "<think>\nback four\n</think>\n\n\\boxed{5}",
    "s1k": "<think>\nDouble seven times.\n</think>\n\n\\boxed{128}",
    "openthoughts": "<think>\nSix sevens.\n</think>\n\n\\boxed{42}",
    "openthoughts_metadata": "<think>\nSix sevens.\n</think>\n\n\\boxed{42}",
    "natural_reasoning": "Hydrogen bonds keep it open.",
}
PAIRS = {
    "hh_rlhf": ("2+2?", "Four.", "Who knows.", None),
    "ultrafeedback": ("Name a prime.", "Seven.", "Nine.", 2.75),
    "ultrafeedback_binarized": ("Name a prime.", "Seven.", "Nine.", 5.5),
}


def data(folder: Path, adapter: str, *records: dict[str, Any], **fields: Any) -> DataConfig:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return DataConfig(path=str(file), adapter=adapter, **fields)


def test_every_adapter_has_a_record_here() -> None:
    assert set(RECORDS) == set(ADAPTERS) == set(ANSWERS) | set(PAIRS)
    assert {name for name, fields in ADAPTERS.items() if "response" in fields} == set(RESPONSES)


@pytest.mark.parametrize("name", ANSWERS)
def test_prompts_and_answers(tmp_path: Path, name: str) -> None:
    (prompt,) = load_prompts(data(tmp_path, name, RECORDS[name]), TOKENIZER)
    question = RECORDS[name].get("problem") or RECORDS[name].get("question")
    assert prompt.answer == ANSWERS[name]
    assert question is None or prompt.text == f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.fields == RECORDS[name]


@pytest.mark.parametrize("name", RESPONSES)
def test_responses(tmp_path: Path, name: str) -> None:
    (example,) = load_examples(data(tmp_path, name, RECORDS[name]), TOKENIZER, max_tokens=512)
    assert TOKENIZER.decode(example.tokens[example.prompt_length :]) == RESPONSES[name] + "<|im_end|>"
    assert example.loss_mask is None


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(tmp_path: Path, name: str) -> None:
    (pair,) = load_pairs(data(tmp_path, name, RECORDS[name]), TOKENIZER, max_tokens=512)
    prompt, chosen, rejected, gap = PAIRS[name]
    assert TOKENIZER.decode(pair.chosen[: pair.prompt_length]).endswith(
        f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert TOKENIZER.decode(pair.chosen[pair.prompt_length :]) == f"{chosen}<|im_end|>"
    assert TOKENIZER.decode(pair.rejected[pair.prompt_length :]) == f"{rejected}<|im_end|>"
    scores = pair.chosen_score, pair.rejected_score
    assert (None if None in scores else scores[0] - scores[1]) == gap


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_are_prompts_too(tmp_path: Path, name: str) -> None:
    (pair,) = load_pairs(data(tmp_path, name, RECORDS[name]), TOKENIZER, max_tokens=512)
    (prompt,) = load_prompts(data(tmp_path, name, RECORDS[name]), TOKENIZER)
    assert (prompt.tokens, prompt.answer) == (pair.chosen[: pair.prompt_length], None)


def test_the_dialogue_before_the_last_answer_is_the_prompt(tmp_path: Path) -> None:
    (pair,) = load_pairs(data(tmp_path, "hh_rlhf", RECORDS["hh_rlhf"]), TOKENIZER, max_tokens=512)
    said = ["user\nHello?", "assistant\nHi.", "user\n2+2?"]
    turns = "".join(f"<|im_start|>{turn}<|im_end|>\n" for turn in said)
    assert TOKENIZER.decode(pair.chosen[: pair.prompt_length]) == turns + "<|im_start|>assistant\n"


OPENR1, S1K = RECORDS["openr1_math"], RECORDS["s1k"]


@pytest.mark.parametrize(
    ("name", "field", "changes", "reason"),
    [
        ("math", "answer", {"solution": "It is 3."}, r"solution: has no \boxed{} with a final answer"),
        ("math", "prompt", {"problem": None}, "problem: must be a string, found null"),
        ("limo", "response", {"solution": " "}, "solution: is empty"),
        ("s1k", "answer", {"solution": "First,\nthen."}, r"solution: has no \boxed{} with a final answer, and"),
        ("s1k", "response", {"deepseek_attempt": None}, "deepseek_attempt: must be a string, found null"),
        ("openr1_math", "response", {"is_reasoning_complete": [False] * 3}, "generations: none is both complete and"),
        ("openr1_math", "response", {"generations": []}, "generations: must be a list, found an empty one"),
        ("openthoughts", "prompt", {"conversations": []}, "conversations: must be a list, found an empty one"),
        (
            "openthoughts",
            "response",
            {"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]},
            "conversations: the assistant's turn lacks the marks",
        ),
        ("natural_reasoning", "answer", {"reference_answer": ""}, "reference_answer: is empty"),
        ("countdown", "prompt", {"nums": [1, "2"]}, "nums: must be a list of whole numbers, found a list [1, '2']"),
        ("countdown", "prompt", {"target": 4.0}, "target: must be a whole number, found a number"),
        ("hh_rlhf", "prompt", {"chosen": "\n\nHuman: hi"}, "chosen: must end in the assistant's turn"),
        ("ultrafeedback", "scores", {"completions": [{"response": "a"}]}, "completions: number 0 has no 'fine"),
    ],
)
def test_a_record_that_does_not_fit_is_named_with_its_field(
    tmp_path: Path, name: str, field: str, changes: dict[str, Any], reason: str
) -> None:
    config = data(tmp_path, name, RECORDS[name] | changes)
    with pytest.raises(RecordError) as caught:
        read_fields(RECORDS[name] | changes, config, (field,))
    assert str(caught.value).startswith(reason)
    loaders = {
        "prompt": lambda: load_prompts(config, TOKENIZER),
        "answer": lambda: load_prompts(config, TOKENIZER),
        "response": lambda: load_examples(config, TOKENIZER, max_tokens=512),
        "scores": lambda: load_pairs(config, TOKENIZER, max_tokens=512),
    }
    with pytest.raises(DataError) as refused:
        loaders[field]()
    assert f"{tmp_path}/rows.jsonl:1: {reason}" in str(refused.value)


def test_a_record_without_a_solution_is_still_a_prompt(tmp_path: Path) -> None:
    prompts = load_prompts(data(tmp_path, "openr1_math", OPENR1 | {"generations": []}), TOKENIZER)
    assert prompts[0].answer == "5"


def test_the_judge_is_asked_where_math_verify_accepts_none(tmp_path: Path) -> None:
    record = OPENR1 | {"correctness_math_verify": [False] * 3, "correctness_llama": [True, True, True]}
    (example,) = load_examples(data(tmp_path, "openr1_math", record), TOKENIZER, max_tokens=512)
    assert TOKENIZER.decode(example.tokens[example.prompt_length :]) == "<think>\nno\n</think>\n\n6<|im_end|>"


def test_an_adapter_without_responses_is_refused_for_sft(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.adapter='big_math' has no response: it gives prompt, answer"):
        load_examples(data(tmp_path, "big_math", RECORDS["big_math"]), TOKENIZER, max_tokens=512)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so $\boxed{7}$", "7"),
        (r"\boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\left\{ 1, 2 \right\}}", r"\left\{ 1, 2 \right\}"),
        (r"\boxed{ x }", "x"),
        (r"\boxed {3}", "3"),
        (r"\fbox{B}", "B"),
        (r"It is $\boxed 7$.", "7"),
        (r"\boxed{5} and then \boxed{\frac{1", "5"),
        (r"\boxed{", None),
        ("the answer is 7", None),
        (r"\boxed{a}{b}", "a"),
    ],
)
def test_boxed_answers(text: str, answer: str | None) -> None:
    assert last_boxed(text) == answer


def test_marks() -> None:
    assert after_marker("a #### 1 #### 2 ") == "2" and after_marker("none") is None
    assert between("x <a> y </a> z </a> w", "<a>", "</a>") == "y </a> z"
    assert between("</a> <a>", "<a>", "</a>") is None
