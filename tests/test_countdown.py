"""Countdown: problems that can be solved, and a reward that computes without running anything."""

import itertools
import json
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from megarl.data.countdown import TARGETS, main, problems
from megarl.rewards.countdown import NotArithmeticError, countdown_reward, evaluate


def reachable(nums: list[Fraction]) -> set[Fraction]:
    """Every value of an expression that uses all of `nums`, by trying all of them."""
    if len(nums) == 1:
        return {nums[0]}
    values = set()
    for i, j in itertools.permutations(range(len(nums)), 2):
        others = [n for k, n in enumerate(nums) if k not in (i, j)]
        a, b = nums[i], nums[j]
        for made in [a + b, a - b, a * b] + ([a / b] if b else []):
            values |= reachable([*others, made])
    return values


def test_every_problem_can_be_solved_and_none_comes_twice() -> None:
    rows = list(problems(seed=3, count=12))
    assert len({(*sorted(row["nums"]), row["target"]) for row in rows}) == 12
    for row in rows:
        assert len(row["nums"]) in (3, 4) and all(1 <= number <= 99 for number in row["nums"])
        assert row["target"] in TARGETS
        assert Fraction(row["target"]) in reachable([Fraction(number) for number in row["nums"]])


def test_problems_depend_on_the_seed_alone() -> None:
    first = list(problems(seed=0, count=3))
    assert first == list(problems(seed=0, count=5))[:3]
    assert first != list(problems(seed=1, count=3))
    assert {len(row["nums"]) for row in problems(seed=0, count=5, numbers=(2,))} == {2}


def test_the_order_is_fixed_for_all_time() -> None:
    """A file made again on another machine must be the same file."""
    assert list(problems(seed=0, count=2)) == [
        {"nums": [69, 29, 56], "target": 42},
        {"nums": [20, 52, 96, 78], "target": 54},
    ]


def test_a_problem_needs_two_numbers() -> None:
    with pytest.raises(ValueError, match="at least two numbers"):
        next(problems(seed=0, count=1, numbers=(1, 3)))


def test_the_command_writes_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train.jsonl"
    monkeypatch.setattr(sys, "argv", ["countdown", str(path), "--count", "4", "--seed", "2", "--numbers", "3"])
    main()
    assert [json.loads(line) for line in path.read_text().splitlines()] == list(problems(2, 4, numbers=(3,)))


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<answer>(3 + 5) * 4 - 8</answer>", 1.0),
        ("I try <answer>3+5</answer>, no: <answer>8*(5-4)*3</answer>", 1.0),
        ("<answer>3 × 8 ÷ (5 − 4) = 24</answer>", 1.0),
        ("<answer>\n8 * 3 / (5 - 4)\n</answer> done", 1.0),
        ("<answer>8 * 3</answer>", 0.1),  # not every number
        ("<answer>8 * 3 * (5 - 4) * 1</answer>", 0.1),  # a number too many
        ("<answer>8 * 3 + 5 - 4</answer>", 0.1),  # 25
        ("<answer>8 * 3 * (5 - 4) = 25</answer>", 0.1),
        ("<answer>24</answer>", 0.1),
        ("<answer>8 * 3 * (5 - 4", 0.0),
        ("8 * 3 * (5 - 4)", 0.0),
        ("<answer></answer>", 0.0),
        ("<answer>8 * 3 / (5 - 5)</answer>", 0.0),
        ("<answer>8 ** 3</answer>", 0.0),
        ("<answer>__import__('os').getcwd()</answer>", 0.0),
        ("<answer>-8 * -3</answer>", 0.0),
        ("<answer>2.4e1</answer>", 0.0),
        ("<answer>" + "(" * 5000 + ")" * 5000 + "</answer>", 0.0),
        ("<answer>" * 1000, 0.0),
    ],
)
def test_reward(completion: str, expected: float) -> None:
    reward = countdown_reward([completion], nums=[[3, 4, 5, 8]], target=[24], format_score=0.1)
    assert reward == [expected]


def test_fractions_are_exact() -> None:
    """8 / (3 - 8/3) = 24, of which no step but the last is whole."""
    assert evaluate("8/(3-8/3)") == (Fraction(24), [8, 3, 8, 3])
    assert countdown_reward(["<answer>8/(3-8/3)</answer>"], nums=[[3, 3, 8, 8]], target=[24]) == [1.0]


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "1 +",
        "(1",
        "1)",
        "1 2",
        "+1",
        "1 + * 2",
        "a",
        "1 / 0",
        "1/(2-2)",
        "()",
        "1" * 500,
        "(" * 399,
        "(" * 101 + "1" + ")" * 101,
    ],
)
def test_what_is_not_arithmetic(expression: str) -> None:
    with pytest.raises(NotArithmeticError):
        evaluate(expression)
