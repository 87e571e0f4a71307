"""Print the parity matrix as Markdown: how far every layout of tests/distributed/layouts.py is from one rank.

    python tools/parity_matrix.py [MODEL ...]    # dense, MoE, MLA, ...; without any, all of them

Its ranks are CPU processes, up to 8, in fp32. Differences of losses are relative to the size of their terms, those of
gradient norms relative, those of log-probabilities (or values) as they are, those of gradients relative to the largest
element of their tensor (where the experts of a layer are one tensor); each the worst over ranks, and of gradients over
tensors. Exit code 1 where one is above 1e-5.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from megarl.verify.measure import Difference
from tests.distributed.layouts import LAYOUTS, TOLERANCE, differences, prepare
from tests.distributed.ranks import RankPool

HEAD = """| model | layout | ranks | loss | log-probs | gradient norm | gradients |
|---|---|---|---|---|---|---|"""


def main(models: list[str]) -> int:
    if unknown := [model for model in models if model not in LAYOUTS]:
        print(f"{', '.join(unknown)}: not among {', '.join(LAYOUTS)}", file=sys.stderr)
        return 2
    pool = RankPool(max(layout.world_size for model in models for layout in LAYOUTS[model].values()))
    worst = 0.0
    print(HEAD)
    for model in models:
        with tempfile.TemporaryDirectory(prefix="megarl-parity-") as folder:
            prepare(pool, model, Path(folder))
            for name, layout in LAYOUTS[model].items():
                rows = differences(pool, model, name, Path(folder))
                found = [_largest(rows, end) for end in (": loss", (": log-probs", ": values"), ": gradient norm")]
                found.append(max(row.difference for row in rows if row.tensor))
                worst = max(worst, *found)
                print(
                    f"| {model} | {name} | {layout.world_size} | {' | '.join(f'{x:.1e}' for x in found)} |", flush=True
                )
    pool.close()
    print(f"\nThe largest difference is {worst:.1e}; {TOLERANCE:g} is allowed.")
    return int(not worst <= TOLERANCE)


def _largest(rows: list[Difference], end: str | tuple[str, ...]) -> float:
    return max(row.difference for row in rows if row.what.endswith(end))


if __name__ == "__main__":
    # The ranks are spawned: they import this file too.
    sys.exit(main(sys.argv[1:] or list(LAYOUTS)))
