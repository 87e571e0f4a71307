"""Selection by difficulty and by impact, and stages of longer responses: numbers by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from megarl.config import DataConfig
from megarl.data.curriculum import (
    Stage,
    check_stages,
    impact_scores,
    max_response_length_at,
    read_pass_rates,
    trajectories,
)
from megarl.data.prompts import load_prompts
from megarl.data.reading import DataError
from tests.byte_tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
RATES = [0.5, 0.0, 1.0, None, 0.25, 0.5]


def data(folder: Path, **fields: Any) -> DataConfig:
    file = folder / "train.jsonl"
    rows = [{"prompt": f"p{number}", "answer": "1", "rate": rate} for number, rate in enumerate(RATES)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(path=str(file), **fields)


def kept(config: DataConfig) -> list[int]:
    return [int(prompt.id.rpartition(":")[2]) for prompt in load_prompts(config, TOKENIZER)]


def test_prompts_are_left_out_by_their_pass_rate(tmp_path: Path) -> None:
    config = data(tmp_path, pass_rate_key="rate", min_pass_rate=0.01, max_pass_rate=0.99)
    prompts = load_prompts(config, TOKENIZER)
    assert [prompt.id for prompt in prompts] == ["train.jsonl:1", "train.jsonl:5", "train.jsonl:6"]
    assert prompts.dropped == {"bad_record": 0, "overlong": 0, "pass_rate": 2, "no_pass_rate": 1}
    assert kept(data(tmp_path, pass_rate_key="rate")) == [1, 2, 3, 4, 5, 6]  # a rate alone leaves out nothing


def test_the_ends_of_the_range_belong_to_it(tmp_path: Path) -> None:
    assert kept(data(tmp_path, pass_rate_key="rate", min_pass_rate=0.25, max_pass_rate=0.5)) == [1, 5, 6]


@pytest.mark.parametrize(
    ("order", "expected"), [("easiest_first", [3, 1, 6, 5, 2]), ("hardest_first", [2, 5, 1, 6, 3])]
)
def test_prompts_in_order_of_difficulty(tmp_path: Path, order: Any, expected: list[int]) -> None:
    assert kept(data(tmp_path, pass_rate_key="rate", order=order, shuffle=False)) == expected


def test_measured_pass_rates_are_found_by_id(tmp_path: Path) -> None:
    measured = tmp_path / "rates.jsonl"
    rows = [{"id": "train.jsonl:2", "pass_rate": 0.75}, {"id": "train.jsonl:4", "pass_rate": 0}]
    measured.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_pass_rates(str(measured)) == {"train.jsonl:2": 0.75, "train.jsonl:4": 0.0}
    assert kept(data(tmp_path, pass_rates=str(measured), min_pass_rate=0.5)) == [2]
    assert load_prompts(data(tmp_path, pass_rates=str(measured), min_pass_rate=0.5), TOKENIZER).dropped == {
        "bad_record": 0,
        "overlong": 0,
        "pass_rate": 1,
        "no_pass_rate": 4,
    }


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"id": "a", "pass_rate": 1.5}', r"pass_rate: must be a share in \[0, 1\], found 1.5"),
        ('{"id": "a", "pass_rate": "1"}', "pass_rate: must be a number, found a string"),
        ('{"pass_rate": 1}', "id: must be a string, found null"),
        ('{"id": "b", "pass_rate": 1}', "id: 'b' is there twice"),
        ("[]", "expected an object"),
    ],
)
def test_a_bad_measurement_is_named(tmp_path: Path, row: str, reason: str) -> None:
    file = tmp_path / "rates.jsonl"
    file.write_text(f'{{"id": "b", "pass_rate": 0.5}}\n{row}\n')
    with pytest.raises(DataError, match=rf"rates.jsonl:2: {reason}"):
        read_pass_rates(str(file))


def test_a_bad_rate_in_a_record_and_an_empty_selection(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no prompt is left: of 6, 1 have no pass rate and 5 one outside"):
        load_prompts(data(tmp_path, pass_rate_key="rate", min_pass_rate=0.6, max_pass_rate=0.7), TOKENIZER)
    file = tmp_path / "percent.jsonl"
    file.write_text('{"prompt": "p", "answer": "1", "rate": 50}\n')
    with pytest.raises(DataError, match=r"percent.jsonl:1: rate: must be a share in \[0, 1\], found 50"):
        load_prompts(DataConfig(path=str(file), pass_rate_key="rate"), TOKENIZER)


def test_stages_of_longer_responses() -> None:
    stages = [Stage(1, 8192), Stage(1001, 16384), Stage(1501, 24576)]
    check_stages(stages)
    assert [max_response_length_at(stages, step) for step in (1, 1000, 1001, 1500, 1501, 9999)] == [
        8192,
        8192,
        16384,
        16384,
        24576,
        24576,
    ]
    for wrong in ([], [Stage(2, 8)], [Stage(1, 8), Stage(1, 16)], [Stage(1, 8), Stage(5, 8)]):
        with pytest.raises(ValueError, match=r"the first stage must|must begin after"):
            check_stages(wrong)


def test_trajectories_are_means_over_an_epochs_samples() -> None:
    rewards = [(0, "a", 1.0), (0, "a", 0.0), (1, "a", 1.0), (1, "b", 0.25)]
    assert trajectories(rewards, epochs=2) == {"a": [0.5, 1.0], "b": [None, 0.25]}


def test_impact_by_hand() -> None:
    """Means are 0.5, 0.75, and (1 - 0.5)^2 + (1 - 0.75)^2 = 0.3125."""
    scores = impact_scores({"mean": [0.5, 0.75], "easy": [1.0, 1.0], "late": [0.0, 0.5]})
    assert scores["mean"] == 1.0
    assert scores["easy"] == pytest.approx(0.0)
    assert scores["late"] == pytest.approx(1 - (0.25 + 0.0625) / 0.3125)


def test_gaps_take_the_next_epoch_and_an_open_end_has_no_score() -> None:
    whole = impact_scores({"a": [0.25, 0.25, 0.5], "b": [0.5, 0.75, 1.0]})
    assert impact_scores({"a": [None, 0.25, 0.5], "b": [0.5, 0.75, 1.0], "c": [0.0, 0.0, None]}) == whole


def test_impact_where_all_is_solved_or_wrong() -> None:
    assert impact_scores({"a": [1.0, 1.0], "b": [1.0, 1.0]}) == {"a": 1.0, "b": 1.0}
    assert impact_scores({}) == {}
    with pytest.raises(ValueError, match="same number of epochs"):
        impact_scores({"a": [1.0], "b": [1.0, 0.0]})
    with pytest.raises(ValueError, match=r"rewards must be in \[0, 1\]; those of a are \[-1.0\]"):
        impact_scores({"a": [-1.0]})
