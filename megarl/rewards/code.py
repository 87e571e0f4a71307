"""Programs, judged by running them in a sandbox (`megarl.sandbox`): the share of the record's tests that pass, or with
`partial=false` 1.0 when all do, else 0.0.

The program is the last fenced block of the completion (``` or ```python); without one the completion scores 0.0. The
column named by `tests_field` is a list of tests, each of one kind:

- `{"stdin": text, "stdout": text}`: what the program prints must be equal, spaces at ends of lines and of the text
  aside;
- `{"call": "add(1, 2)", "returns": 3}`: the expression, evaluated after the program, must give the value as JSON has it
  (a tuple is a list).

What is expected never enters the sandbox: a program that rewrites `print`, `json` or the process it runs in can spoil
its own output, and cannot know what to print instead. A program that is killed, runs too long or writes too much fails
the test at hand. What the machine or the record gets wrong is an error.
"""

import json
import re
from typing import Any

from megarl.sandbox import Limits, Outcome, run

BLOCK = re.compile(r"^```(?:python|py)?[ \t]*\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
# The program's own prints go nowhere; what calls give goes out as one line of JSON at the end.
CALLS = """
import json as _json, os as _os, sys as _sys
_calls = _json.loads(_sys.stdin.readline())
_out = _os.dup(1)
_os.dup2(_os.open("/dev/null", _os.O_WRONLY), 1)
_space = {{"__name__": "__main__"}}
exec(compile({program!r}, "program", "exec"), _space)
_results = []
for _call in _calls:
    try:
        _results.append([_json.loads(_json.dumps(eval(_call, _space)))])
    except Exception as _error:
        _results.append(None)
_os.write(_out, _json.dumps(_results).encode())
"""


def code_reward(
    completions: list[str],
    *,
    tests_field: str = "tests",
    partial: bool = True,
    wall_s: float = 5.0,
    cpu_s: int = 5,
    memory_mb: int = 1024,
    processes: int = 16,
    disk_mb: int = 32,
    output_bytes: int = 1 << 20,
    isolation: str = "namespaces",
    **columns: list,
) -> list[float]:
    """The share of tests that each completion's program passes."""
    limits = Limits(wall_s, cpu_s, memory_mb, processes, disk_mb, output_bytes, isolation)  # type: ignore[arg-type]
    if tests_field not in columns:
        raise ValueError(f"no record has the field {tests_field!r} (tests_field); there are {', '.join(columns)}")
    shares = [passed(*sample, limits) for sample in zip(completions, columns[tests_field], strict=True)]
    return [share if partial else float(share == 1.0) for share in shares]


def passed(completion: str, tests: Any, limits: Limits) -> float:
    """The share of tests that the completion's program passes. Raises ValueError for a test that is none."""
    printing, calling = sort_out(tests)
    program = program_in(completion)
    if program is None:
        return 0.0
    good = sum(same_text(run(program, test["stdin"], limits), test["stdout"]) for test in printing)
    if calling:
        calls = json.dumps([test["call"] for test in calling])
        returned = results(run(CALLS.format(program=program), f"{calls}\n", limits), len(calling))
        good += sum(found == [test["returns"]] for found, test in zip(returned, calling, strict=True))
    return good / len(tests)


def program_in(completion: str) -> str | None:
    """The last fenced block."""
    blocks = BLOCK.findall(completion)
    return blocks[-1] if blocks else None


def sort_out(tests: Any) -> tuple[list[dict], list[dict]]:
    """Tests of what is printed, and tests of what calls return."""
    if not isinstance(tests, list) or not tests:
        raise ValueError(f"tests are a list with at least one test, not {tests!r:.200}")
    printing = [test for test in tests if isinstance(test, dict) and test.keys() == {"stdin", "stdout"}]
    calling = [test for test in tests if isinstance(test, dict) and test.keys() == {"call", "returns"}]
    if len(printing) + len(calling) < len(tests):
        odd = next(test for test in tests if test not in printing and test not in calling)
        raise ValueError(f"a test is {{stdin, stdout}} or {{call, returns}}, not {odd!r:.200}")
    return printing, calling


def same_text(outcome: Outcome, expected: str) -> bool:
    """Whether the program ended well and printed what was expected."""
    return outcome.ok and lines(outcome.stdout) == lines(expected)


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def results(outcome: Outcome, expected: int) -> list[Any]:
    """For each call [what it returned], or None where it raised; all None where the program spoilt its output."""
    try:
        found = json.loads(outcome.stdout) if outcome.ok else None
    except ValueError:
        found = None
    return found if isinstance(found, list) and len(found) == expected else [None] * expected
