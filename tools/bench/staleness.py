"""Tokens a second and final reward at several bounds of staleness and numbers of servers, against colocated engines.

    python tools/bench/staleness.py [--steps 40] [--ranks 2] [--staleness 0 1 2 4] [--engines 0 1 2]

Every run has the same model, task, seed, prompts and number of samples. ``--engines 0`` is the colocated run. The task:
a small random model is to write a "#", which half of its responses contain at the start. Tokens a second are those of
responses trained on over the time of steps 3 to the last, so that no start-up counts. On a machine where trainer and
servers share the cores this shows what overlaps, and not what more machines would give.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from megarl.observe.metrics import read_metrics

sys.path.insert(0, str(Path(__file__).parents[1]))
from soak_engines import PROMPTS, SAMPLES, make


def run(recipe: Path, name: str, *settings: str) -> tuple[float, float, float]:
    """(tokens a second, mean reward of the last five steps, mean staleness)."""
    command = [sys.executable, "-m", "megarl", "train", str(recipe), f"run.name={name}", *settings]
    with (recipe.parent / f"{name}.log").open("wb") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=True)
    records = read_metrics(recipe.parent / name)
    tokens = sum(record["response_length/mean"] * PROMPTS * SAMPLES for record in records[2:])
    seconds = sum(record["timing_s/step"] for record in records[2:])
    stale = [record.get("staleness/mean", 0.0) for record in records]
    return tokens / seconds, statistics.mean(r["reward/mean"] for r in records[-5:]), statistics.mean(stale)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--engines", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, default=2, help="that train")
    args = parser.parse_args()
    recipe = make(Path(tempfile.mkdtemp(prefix="staleness-")), args.steps, 1)
    off = ["rollout.mode=colocated", "rollout.max_staleness=0", "rollout.num_engines=1"]
    print("engines    max_staleness  tokens/s  reward  mean staleness", flush=True)
    rows = [("colocated", 0, off)] if 0 in args.engines else []
    for engines in filter(None, args.engines):
        for bound in args.staleness:
            settings = [f"rollout.max_staleness={bound}", f"rollout.num_engines={engines}"]
            rows.append((f"{engines} server{'s' * (engines > 1)}", bound, settings))
    for what, bound, settings in rows:
        settings = [*settings, f"cluster.gpus_per_node={args.ranks}"]
        speed, reward, stale = run(recipe, f"{what}-{bound}".replace(" ", ""), *settings)
        print(f"{what:10} {bound:13}  {speed:8.0f}  {reward:6.3f}  {stale:.2f}", flush=True)


if __name__ == "__main__":
    main()
