"""Mathematical equality by the math-verify library: 1.0 when the completion's answer equals the reference, else 0.0.

math-verify takes as the answer what follows "final answer is" or stands in \\boxed{}, else the last formula or
number, and compares as mathematics: 1/2, 0.5 and \\frac{1}{2} are equal. A completion whose answer it cannot read, or
cannot show to be equal, scores 0.0. A reference answer that it cannot read is an error.

`marker`, when given, must occur in the completion (0.0 if not), and only what follows its last occurrence is read.
Where answers have a marker this is more exact: math-verify takes the 5 of "answered 5 of 9\\n#### 4" for the answer.
"""

import logging

from math_verify import parse, verify

# math-verify's own timeouts use signal.alarm, which works on the main thread only and cannot stop a long C call.
# Reward workers have a deadline per sample that can, so they are off, and with them the warning that they are.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def math_reward(completions: list[str], answers: list[str], marker: str | None = None, **columns: list) -> list[float]:
    """1.0 for each completion whose answer equals the reference."""
    return [score(completion, answer, marker) for completion, answer in zip(completions, answers, strict=True)]


def score(completion: str, answer: str, marker: str | None) -> float:
    """1.0 if the completion's answer equals the reference, else 0.0."""
    # Boxed, so that bare LaTeX such as x^2+1 or (1,2) is read as LaTeX.
    reference = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    if not reference:
        raise ValueError(f"math-verify cannot read the reference answer {answer!r}")
    if marker is not None:
        _, found, completion = completion.rpartition(marker)
        if not found:
            return 0.0
    return float(verify(reference, parse(completion, parsing_timeout=None), timeout_seconds=None))
