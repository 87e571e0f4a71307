"""Final answers out of worked solutions, and reasoning out of responses: what the adapters share.

Contract: pure functions of strings. One that looks for something returns None where it is not there.
"""

import re

NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")
BOXED = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)|\\boxed\s+(?=[^\s{])")
THINK, END_THINK = "<think>", "</think>"


def last_boxed(text: str) -> str | None:
    r"""What the last closed ``\boxed{...}`` (or ``\fbox``) holds, nested braces and all; ``\boxed 7`` holds ``7``.

    ``\{`` and ``\}`` are LaTeX's printed braces and open or close nothing. A box that never closes, as in an answer cut
    off by a length limit, is none; that of an earlier, complete one counts.
    """
    for found in reversed(list(BOXED.finditer(text))):
        if text[found.end()] != "{":
            return re.split(r"[\s$]", text[found.end() :], maxsplit=1)[0].rstrip(".,")
        depth = 0
        for brace in re.finditer(r"\\.|[{}]", text[found.end() :], flags=re.DOTALL):
            depth += {"{": 1, "}": -1}.get(brace.group(), 0)
            if depth == 0:
                return text[found.end() + 1 : found.end() + brace.start()].strip()
    return None


def after_marker(text: str, marker: str = "####") -> str | None:
    """What follows the last `marker`."""
    _, found, rest = text.rpartition(marker)
    return rest.strip() if found else None


def trace(reasoning: str, answer: str) -> str:
    """A response in the form that DeepSeek-R1 gave the field: the reasoning between think tags, then the answer."""
    return f"{THINK}\n{reasoning.strip()}\n{END_THINK}\n\n{answer.strip()}"


def between(text: str, start: str, end: str) -> str | None:
    """What stands between the first `start` and the last `end` behind it."""
    _, found, rest = text.partition(start)
    inner, closed, _ = rest.rpartition(end)
    return inner.strip() if found and closed else None
