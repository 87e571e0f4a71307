"""Maps for the environment `grid`, each with a way from P to G.

    python -m megarl.data.grid train.jsonl --count 10000 --seed 0 [--size 4] [--holes 0.15] [--walls 0.1]

writes records {"prompt": ..., "answer": "2", "grid": ["P_O_", ...]}: the answer is the length of a shortest way.

Contract: `problems` depends on its arguments alone, on every machine and version of Python.
"""

import argparse
import json
import random
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megarl.data.countdown import draw

MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
MAX_TRIES = 1000  # for each map; nearly all of modest density have a way
RULES = (
    "You stand at P on a map and want to get to G. O is a hole, # a wall, _ floor. Each turn, say one of up, down, "
    "left and right; then you see the map again.\n"
)


def parse(rows: Sequence[str]) -> tuple[tuple[int, int], tuple[int, int]]:
    """(row, column) of P and of G. Raises ValueError for a map that is none."""
    if not rows or not all(isinstance(row, str) and len(row) == len(rows[0]) for row in rows):
        raise ValueError(f"grid: must be rows of the same length, found {rows!r:.100}")
    where = {mark: [(r, c) for r, row in enumerate(rows) for c, x in enumerate(row) if x == mark] for mark in "PG"}
    odd = set("".join(rows)) - set("PGO#_")
    if odd or any(len(found) != 1 for found in where.values()):
        raise ValueError(f"grid: must have one P, one G and else O, # and _, found {rows!r:.100}")
    return where["P"][0], where["G"][0]


def shortest(rows: Sequence[str]) -> int | None:
    """Steps from P to G around holes and walls; None where there is no way."""
    start, goal = parse(rows)
    steps = {start: 0}
    ahead = deque([start])
    while ahead:
        at = ahead.popleft()
        if at == goal:
            return steps[at]
        for move in MOVES.values():
            row, column = at[0] + move[0], at[1] + move[1]
            inside = 0 <= row < len(rows) and 0 <= column < len(rows[0])
            if inside and rows[row][column] not in "O#" and (row, column) not in steps:
                steps[row, column] = steps[at] + 1
                ahead.append((row, column))
    return None


def problems(seed: int, count: int, size: int = 4, holes: float = 0.15, walls: float = 0.1) -> Iterator[dict[str, Any]]:
    """`count` records. Raises ValueError where maps of this kind have no way."""
    if size < 2 or holes < 0 or walls < 0 or holes + walls >= 1:
        raise ValueError(f"size = {size}, holes = {holes}, walls = {walls}: a map needs two rows and some floor")
    generator = random.Random(f"grid/{seed}")
    for _ in range(count):
        for _ in range(MAX_TRIES):
            rows = new_map(generator, size, holes, walls)
            length = shortest(rows)
            if length is not None:
                break
        else:
            raise ValueError(f"no map with a way in {MAX_TRIES} tries: take fewer holes ({holes}) and walls ({walls})")
        yield {"prompt": RULES + "\n".join(rows) + "\n", "answer": str(length), "grid": rows}


def new_map(generator: random.Random, size: int, holes: float, walls: float) -> list[str]:
    cells = []
    for _ in range(size * size):
        x = generator.random()
        cells.append("O" if x < holes else "#" if x < holes + walls else "_")
    start = draw(generator, size * size)
    goal = (start + 1 + draw(generator, size * size - 1)) % (size * size)
    cells[start], cells[goal] = "P", "G"
    return ["".join(cells[row * size : (row + 1) * size]) for row in range(size)]


def main() -> None:
    """Write a file of maps."""
    parser = argparse.ArgumentParser(description="Write grid problems, one JSON object a line.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=4)
    parser.add_argument("--holes", type=float, default=0.15, help="share of the map")
    parser.add_argument("--walls", type=float, default=0.1, help="share of the map")
    args = parser.parse_args()
    rows = problems(args.seed, args.count, args.size, args.holes, args.walls)
    args.path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
