"""Countdown: 1.0 when the expression uses exactly the record's numbers and makes its target, else `format_score`.

The expression is what stands between the last `<answer>` and `</answer>`; "= 24" behind it is allowed where 24 is the
target. It may have whole numbers, + - * / (also × · ÷ −) and parentheses, and is computed in exact fractions by the
parser below: nothing a model writes is run as code. A completion without an expression scores 0.0, and so does one
that is not arithmetic; `format_score` (0.0) is for arithmetic with another value or other numbers.

Columns: `nums` and `target` of the records (`megarl.data.countdown`).
"""

import re
from fractions import Fraction

ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*)</answer>", flags=re.DOTALL)
TOKEN = re.compile(r"\s*([0-9]+|[-+*/()])")
DECIMAL_TOKEN = re.compile(r"\s*([0-9]*\.?[0-9]+|[-+*/()])")
SPELLINGS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-"})
MAX_CHARACTERS = 400  # an expression of a dozen numbers has less than 100
MAX_PARENTHESES = 100  # each is three calls deep


class NotArithmeticError(ValueError):
    """The text is no expression, or divides by zero."""


def countdown_reward(completions: list[str], format_score: float = 0.0, **columns: list) -> list[float]:
    """1.0, `format_score` or 0.0 for each completion."""
    problems = zip(completions, columns["nums"], columns["target"], strict=True)
    return [score(completion, nums, target, format_score) for completion, nums, target in problems]


def score(completion: str, nums: list[int], target: int, format_score: float) -> float:
    """What the last answer of a completion is worth."""
    answers = ANSWER.findall(completion)
    if not answers:
        return 0.0
    expression, equals, result = answers[-1].translate(SPELLINGS).partition("=")
    try:
        value, used = evaluate(expression)
    except NotArithmeticError:
        return 0.0
    said = result.strip() if equals else str(target)
    return 1.0 if value == target and sorted(used) == sorted(nums) and said == str(target) else format_score


def evaluate(expression: str, *, decimals: bool = False) -> tuple[Fraction, list[Fraction]]:
    """The value of an expression, and the numbers in it, with `decimals` not only whole ones. Raises
    NotArithmeticError."""
    if len(expression) > MAX_CHARACTERS:
        raise NotArithmeticError(f"{len(expression)} characters")
    if expression.count("(") > MAX_PARENTHESES:
        raise NotArithmeticError(f"{expression.count('(')} parentheses")
    expression = expression.strip()
    tokens: list[str] = []
    at = 0
    while at < len(expression):
        found = (DECIMAL_TOKEN if decimals else TOKEN).match(expression, at)
        if found is None:
            raise NotArithmeticError(f"cannot read {expression[at:]!r}")
        tokens.append(found[1])
        at = found.end()
    value, rest = sum_of(tokens)
    if rest:
        raise NotArithmeticError(f"cannot read {' '.join(rest)!r}")
    return value, [Fraction(token) for token in tokens if token[-1].isdigit()]


def sum_of(tokens: list[str]) -> tuple[Fraction, list[str]]:
    """term { (+ | -) term }: its value, and the tokens behind it."""
    value, rest = product_of(tokens)
    while rest and rest[0] in "+-":
        other, after = product_of(rest[1:])
        value = value + other if rest[0] == "+" else value - other
        rest = after
    return value, rest


def product_of(tokens: list[str]) -> tuple[Fraction, list[str]]:
    """factor { (* | /) factor }: its value, and the tokens behind it."""
    value, rest = factor_of(tokens)
    while rest and rest[0] in "*/":
        other, after = factor_of(rest[1:])
        if rest[0] == "/" and other == 0:
            raise NotArithmeticError("division by zero")
        value = value * other if rest[0] == "*" else value / other
        rest = after
    return value, rest


def factor_of(tokens: list[str]) -> tuple[Fraction, list[str]]:
    """number | ( sum ): its value, and the tokens behind it."""
    if tokens and tokens[0][-1].isdigit():
        return Fraction(tokens[0]), tokens[1:]
    if not tokens or tokens[0] != "(":
        raise NotArithmeticError(f"a number or ( is missing before {tokens[0] if tokens else 'the end'!r}")
    value, rest = sum_of(tokens[1:])
    if not rest or rest[0] != ")":
        raise NotArithmeticError(") is missing")
    return value, rest[1:]
