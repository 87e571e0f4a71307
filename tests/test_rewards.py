"""The rewards that come with megarl, and how rewards are found."""

import subprocess
import sys
from pathlib import Path

import pytest

from megarl.rewards import REWARDS, RewardError, check_arguments, resolve
from megarl.rewards.exact import exact_reward
from megarl.rewards.format import format_reward
from megarl.rewards.math import math_reward


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("so the answer is 72", "72", 1.0),
        ("so it is \\boxed{72}, after 3 steps", "72", 1.0),
        ("#### 1,234", "1234", 1.0),
        ("#### 72", "73", 0.0),
        ("$\\frac{1}{2}$", "0.5", 1.0),
        ("The final answer is $x^2 + 2x + 1$.", "(x+1)^2", 1.0),
        ("$2\\sqrt{3}$", "\\sqrt{12}", 1.0),
        ("no idea", "72", 0.0),
        ("", "72", 0.0),
    ],
)
def test_math_compares_as_mathematics(completion: str, answer: str, expected: float) -> None:
    assert math_reward([completion], [answer]) == [expected]


def test_math_can_be_told_where_the_answer_is() -> None:
    completions = ["She answered 5 of 9.\n#### 4", "#### 3, no: #### $\\frac{8}{2}$", "4", "4 ####"]
    assert math_reward(completions, ["4"] * 4) == [0.0, 1.0, 1.0, 1.0]
    assert math_reward(completions, ["4"] * 4, marker="####") == [1.0, 1.0, 0.0, 0.0]


def test_math_refuses_a_reference_that_it_cannot_read() -> None:
    with pytest.raises(ValueError, match="cannot read the reference answer ''"):
        math_reward(["72"], [""])


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("48 and 24 make 72", "72", 1.0),
        ("it costs $72.00.", "72", 1.0),
        ("= 1,000", "1000", 1.0),
        ("= 1000.0", "1,000", 1.0),
        ("3-4", "4", 1.0),
        ("minus: -4", "-4", 1.0),
        ("72 of 73", "72", 0.0),
        ("1,2,3", "3", 1.0),
        ("0.1", "0.10", 1.0),
        ("0.1000000000000000055", "0.1", 0.0),
        ("答案72", "72", 1.0),
        ("x72", "72", 0.0),
        ("nothing", "72", 0.0),
        ("  Paris\n", "Paris", 1.0),
        ("paris", "Paris", 0.0),
        ("It is Paris", "Paris", 0.0),
    ],
)
def test_exact_without_a_marker(completion: str, answer: str, expected: float) -> None:
    assert exact_reward([completion], [answer]) == [expected]


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("1 + 1\n#### 2", "2", 1.0),
        ("#### 3 no: #### 2", "2", 1.0),
        ("1 + 1 = 2", "2", 0.0),
        ("2 ####", "2", 0.0),
        ("I say #### Paris", "Paris", 1.0),
    ],
)
def test_exact_looks_behind_the_last_marker(completion: str, answer: str, expected: float) -> None:
    assert exact_reward([completion], [answer], marker="####") == [expected]


def test_exact_refuses_an_empty_reference() -> None:
    with pytest.raises(ValueError, match="empty"):
        exact_reward([""], [" "])


def test_format_asks_for_a_final_answer_unless_told_otherwise() -> None:
    completions = ["1 + 1\n#### 2\n", "#### 2", "####", "#### \n2", "#### 2\nand more", "2"]
    assert format_reward(completions) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    pattern = "<think>.*</think>[0-9]+"
    assert format_reward(["<think>\n</think>5", "<think></think>5 "], pattern=pattern) == [1.0, 0.0]


def test_every_name_resolves_to_a_reward() -> None:
    for name in REWARDS:
        check_arguments(name, resolve(name), {})
    assert resolve("megarl.rewards.exact:exact_reward") is exact_reward


def test_what_cannot_be_resolved_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "fixtures"))
    with pytest.raises(RewardError, match=r"unknown reward 'exct' \(did you mean 'exact'\?\); rewards: math, exact"):
        resolve("exct")
    with pytest.raises(RewardError, match=r"has no function 'lenght' \(did you mean 'length'\?\)"):
        resolve("misbehaving:lenght")
    with pytest.raises(RewardError, match="ModuleNotFoundError: No module named 'nowhere'"):
        resolve("nowhere:reward")
    with pytest.raises(RewardError, match="RuntimeError: no licence for this library"):
        resolve("broken_reward:reward")


def test_options_are_checked_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "fixtures"))
    check_arguments("exact", resolve("exact"), {"marker": "####"})
    with pytest.raises(
        RewardError, match=r"'exact' has no option 'markr' \(did you mean 'marker'\?\); options: marker"
    ):
        check_arguments("exact", resolve("exact"), {"markr": "####"})
    with pytest.raises(RewardError, match=r"must take \*\*columns"):
        check_arguments("misbehaving:no_columns", resolve("misbehaving:no_columns"), {})


def test_a_worker_imports_nothing_heavy_and_the_standard_math() -> None:
    code = (
        "import sys, megarl.rewards.worker, math;"
        "assert math.pi > 3;"
        "print([name for name in ('torch', 'numpy', 'transformers', 'sympy', 'omegaconf') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
