"""Form of the completion: 1.0 when the whole of it matches `pattern`, else 0.0.

`pattern` is a regular expression for the whole completion, in which `.` matches newlines too. The default asks for a
final answer after the marker `####` on the last line, as GSM8K's solutions have it.
"""

import re

FINAL_ANSWER = r".*####[ \t]*[^\s#][^\n]*\s*"


def format_reward(completions: list[str], pattern: str = FINAL_ANSWER, **columns: list) -> list[float]:
    """1.0 for each completion that matches."""
    return [float(re.fullmatch(pattern, completion, flags=re.DOTALL) is not None) for completion in completions]
