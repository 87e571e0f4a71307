"""Sums of two three-digit numbers: for SFT with a response, for GRPO and for checking with an answer only.

    python problems.py FOLDER [--seed N]

writes sft.jsonl, train.jsonl and held_out.jsonl. No held-out sum occurs in the other two.

SFT shows two ways to answer. A guess says the sum at once: ``#1552``. A worked answer adds units, tens
and hundreds with their carries first: ``u4+8+0=12t6+8+1=15h6+8+1=15#1552``. A model of this size cannot learn to guess
three-digit sums, and soon learns to work them out; which of the two ways pays is what GRPO has to find out.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

SFT_ROWS = 20_000
WORKED_SHARE = 0.42
TRAIN_ROWS = 4_000
HELD_OUT_ROWS = 256
Sum = tuple[int, int]


def worked(a: int, b: int) -> str:
    """Digit by digit from the right: place, digits and carry, their two-digit sum; then the answer."""
    steps, carry = [], 0
    for place, x, y in zip("uth", reversed(str(a)), reversed(str(b)), strict=True):
        total = int(x) + int(y) + carry
        steps.append(f"{place}{x}+{y}+{carry}={total:02d}")
        carry = total // 10
    return "".join(steps) + guess(a, b)


def guess(a: int, b: int) -> str:
    return f"#{a + b}"


def prompt(a: int, b: int) -> str:
    return f"{a}+{b}="


def make(seed: int) -> dict[str, list[dict[str, str]]]:
    """The rows of every file."""
    generator = random.Random(seed)

    def draw() -> Sum:
        return generator.randint(100, 999), generator.randint(100, 999)

    held_out: dict[Sum, None] = {}  # a set that keeps its order
    while len(held_out) < HELD_OUT_ROWS:
        held_out[draw()] = None

    def others(count: int) -> list[Sum]:
        rows: list[Sum] = []
        while len(rows) < count:
            if (drawn := draw()) not in held_out:
                rows.append(drawn)
        return rows

    def graded(sums: list[Sum]) -> list[dict[str, str]]:
        return [{"prompt": prompt(a, b), "answer": str(a + b)} for a, b in sums]

    def answer(a: int, b: int) -> str:
        return worked(a, b) if generator.random() < WORKED_SHARE else guess(a, b)

    sft = [{"prompt": prompt(a, b), "response": answer(a, b)} for a, b in others(SFT_ROWS)]
    return {"sft": sft, "train": graded(others(TRAIN_ROWS)), "held_out": graded(list(held_out))}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write arithmetic problems as JSONL.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in make(args.seed).items():
        (args.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
