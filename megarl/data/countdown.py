"""Countdown: combine a few numbers with +, -, * and / so that they make the target, each number exactly once.

    python -m megarl.data.countdown train.jsonl --count 10000 --seed 0 [--numbers 3 4]

writes records {"nums": [19, 36, 55, 7], "target": 65}, as in Jiayi-Pan/Countdown-Tasks-3to4 (TinyZero). Train with
data.adapter=countdown and the reward countdown.

Contract: `problems` depends on its arguments alone, on every machine and version of Python. Every problem has a
solution with whole numbers of at least 0 at each step, and none occurs twice. Two seeds may share problems.
"""

import argparse
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megarl.data.reading import RecordError, json_type

LARGEST_NUMBER = 99
TARGETS = range(10, 101)
MAX_TRIES = 2000  # for each problem still to find; one in about ten tries succeeds


def problems(seed: int, count: int, numbers: Sequence[int] = (3, 4)) -> Iterator[dict[str, Any]]:
    """`count` records, each with as many numbers as one of `numbers` says. Raises ValueError when there are no more."""
    if min(numbers) < 2:
        raise ValueError(f"numbers={tuple(numbers)}: a problem needs at least two numbers to combine")
    generator = random.Random(f"countdown/{seed}")
    seen: set[tuple[int, ...]] = set()
    while len(seen) < count:
        for _ in range(MAX_TRIES):
            size = numbers[draw(generator, len(numbers))]
            nums = [1 + draw(generator, LARGEST_NUMBER) for _ in range(size)]
            target = combine(nums, generator)
            if target in TARGETS and target not in nums and (*sorted(nums), target) not in seen:
                break
        else:
            raise ValueError(f"found only {len(seen)} of {count} different problems with {tuple(numbers)} numbers")
        seen.add((*sorted(nums), target))
        yield {"nums": nums, "target": target}


def draw(generator: random.Random, below: int) -> int:
    """A whole number under `below`, by `random.random`: only its sequence is guaranteed across versions of Python."""
    return int(generator.random() * below)


def combine(nums: list[int], generator: random.Random) -> int:
    """Two of the numbers at a time make one, by an operation that stays within the whole numbers, until one is left."""
    left = list(nums)
    while len(left) > 1:
        a, b = (left.pop(draw(generator, len(left))) for _ in range(2))
        results = [a + b, a * b]
        if a >= b:
            results.append(a - b)
        if b and a % b == 0:
            results.append(a // b)
        left.append(results[draw(generator, len(results))])
    return left[0]


def prompt_text(record: Mapping[str, Any]) -> str:
    """The problem in words; raises RecordError for a record that is none."""
    nums, target = record.get("nums"), record.get("target")
    if not isinstance(nums, list) or not nums or not all(type(number) is int for number in nums):
        raise RecordError(f"nums: must be a list of whole numbers, found {json_type(nums)} {nums!r:.40}")
    if type(target) is not int:
        raise RecordError(f"target: must be a whole number, found {json_type(target)}")
    return (
        f"Make {target} out of the numbers {', '.join(map(str, nums))}. Use each number exactly once, with +, -, * and "
        "/ and parentheses as needed. Think first, then write the expression between <answer> and </answer>, such as "
        "<answer>(1 + 2) / 3</answer>."
    )


def main() -> None:
    """Write a file of problems."""
    parser = argparse.ArgumentParser(description="Write Countdown problems, one JSON object a line.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--numbers", type=int, nargs="+", default=[3, 4], help="how many numbers a problem may have")
    args = parser.parse_args()
    rows = problems(args.seed, args.count, args.numbers)
    args.path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
