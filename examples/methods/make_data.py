"""Preference data for the quickstart's sums: ``python make_data.py FOLDER [--seed N]``.

Writes pairs.jsonl (a worked answer is chosen, a wrong guess is rejected; with scores, and with a longer prompt beside
the short one, for LongPO) and labels.jsonl (either of them, with a label).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))

from problems import guess, prompt, worked

ROWS = 1000


def make(seed: int) -> dict[str, list[dict[str, object]]]:
    """The rows of both files."""
    generator = random.Random(seed)

    def draw() -> int:
        return generator.randint(100, 999)

    pairs, labels = [], []
    for _ in range(ROWS):
        a, b = draw(), draw()
        wrong = guess(a, b + generator.choice([-100, -10, -1, 1, 10, 100]))
        sides = {"chosen": worked(a, b), "rejected": wrong, "chosen_score": 1, "rejected_score": 0}
        long = f"{draw()}+{draw()}={prompt(a, b)}"  # what comes before the sum is to be passed over
        pairs.append({"prompt": prompt(a, b), "long_prompt": long, "short_prompt": prompt(a, b), **sides})
        right = generator.random() < 0.5
        labels.append({"prompt": prompt(a, b), "response": worked(a, b) if right else wrong, "label": right})
    return {"pairs": pairs, "labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write preference data as JSONL.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in make(args.seed).items():
        (args.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
