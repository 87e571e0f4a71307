"""Exact equality, of numbers or of text: 1.0 when equal, else 0.0.

- `marker`, when given, must occur in the completion (0.0 if not); only what follows its last occurrence is looked at.
- If the reference answer is a number, the last number there must equal it as a number: 72, 72.0, $72 and "72." all
  equal 72, and 1,000 equals 1000. A percent sign is ignored. Fractions and powers are not understood; `math`
  understands them.
- Any other reference answer must equal that text character for character, surrounding white space aside.
"""

import re
from decimal import Decimal

# The look-behind keeps "3-4" from ending in -4, and digits inside words or version numbers from counting as numbers.
NUMBER = re.compile(r"(?<![A-Za-z0-9_.])[-−]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")


def exact_reward(completions: list[str], answers: list[str], marker: str | None = None, **columns: list) -> list[float]:
    """1.0 for each completion that ends in the reference answer."""
    return [score(completion, answer, marker) for completion, answer in zip(completions, answers, strict=True)]


def score(completion: str, answer: str, marker: str | None) -> float:
    """1.0 if the completion gives the reference answer, else 0.0."""
    if not answer.strip():
        raise ValueError("the reference answer is empty")
    if marker is not None:
        _, found, completion = completion.rpartition(marker)
        if not found:
            return 0.0
    expected = NUMBER.fullmatch(answer.strip())
    if expected is None:
        return float(completion.strip() == answer.strip())
    numbers = NUMBER.findall(completion)
    return float(bool(numbers) and to_number(numbers[-1]) == to_number(expected.group()))


def to_number(text: str) -> Decimal:
    """The value of what NUMBER matched."""
    return Decimal(text.replace(",", "").replace("−", "-"))
