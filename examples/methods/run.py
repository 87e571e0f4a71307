"""Run any method on the quickstart's sums, on one CPU rank, and say what became of its objective.

    python examples/methods/run.py METHOD ... [--root runs/methods] [KEY=VALUE ...]     (all: every method)

A method is a recipe of this folder. What it starts from is made once: problems, preference data, and a model that SFT
has taught both to guess and to work sums out (the quickstart's, about a minute); for distillation a teacher, by GRPO.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
QUICKSTART = HERE.parent / "quickstart"
METHODS = sorted(path.stem for path in HERE.glob("*.yaml"))
BASES = ("rl", "pairs", "labels")
# What a method of each base is to move, and whether down.
OBJECTIVES = {"rl": "reward/mean", "pairs": "rewards/margins", "labels": "rewards/undesirable"}
OTHERS = {"reward_model": "rewards/accuracies", "distillation": "actor/teacher_kl"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("methods", nargs="+", metavar="METHOD|KEY=VALUE", help=", ".join(METHODS))
    parser.add_argument("--root", type=Path, default=Path("runs/methods"), help="folder of everything that is made")
    args = parser.parse_args()
    settings = [argument for argument in args.methods if "=" in argument]
    names = [argument for argument in args.methods if "=" not in argument]
    names = METHODS if names == ["all"] else names
    if unknown := [name for name in names if name not in METHODS]:
        parser.error(f"no recipe for {', '.join(unknown)}; there are {', '.join(METHODS)}")
    prepare(args.root)
    codes = [run(args.root, name, settings) for name in names]
    return max(codes)


def prepare(root: Path) -> None:
    """Data and the model that all methods start from, where they are missing."""
    python(HERE / "make_data.py", root / "data")
    if (root / "sft/hf/final/config.json").exists():
        return
    python(QUICKSTART / "problems.py", root / "data")
    python(QUICKSTART / "make_model.py", root / "model")
    megarl(
        QUICKSTART / "sft.yaml",
        f"run.root={root}",
        f"model.path={root / 'model'}",
        f"data.path={root / 'data/sft.jsonl'}",
    )


def run(root: Path, name: str, settings: list[str]) -> int:
    base = base_of(name)
    recipes = [HERE / f"{base}.yaml"] + ([] if name == base else [HERE / f"{name}.yaml"])
    data = {"rl": "train", "pairs": "pairs", "labels": "labels"}[base]
    more = [f"data.path={root / 'data' / data}.jsonl", f"model.path={root / 'sft/hf/final'}"]
    if name == "distillation":
        teacher = root / "rl/hf/final"
        if not (teacher / "config.json").exists():
            run(root, "rl", [])
        more.append(f"teacher.path={teacher}")
    started = time.monotonic()
    code = megarl(*recipes, f"run.root={root}", f"run.name={name}", "checkpoint.resume_mode=disable", *more, *settings)
    if code == 0:
        report(root / name / "metrics.jsonl", name, base, time.monotonic() - started)
    return code


def base_of(name: str) -> str:
    """The base that the recipe's first line names."""
    header = (HERE / f"{name}.yaml").read_text().split("\n", 1)[0]
    return next(base for base in BASES if f"methods/{base}.yaml" in header)


def report(metrics: Path, name: str, base: str, seconds: float) -> None:
    """First and last three steps of the objective, as means."""
    objective = OTHERS.get(name, OBJECTIVES[base])
    values = [row[objective] for row in map(json.loads, metrics.read_text().splitlines()) if objective in row]
    first, last = (sum(part) / len(part) for part in (values[:3], values[-3:]))
    print(f"{name:30} {objective:22} {first:8.3f} -> {last:8.3f}   {len(values)} steps, {seconds:.0f} s", flush=True)


def megarl(*arguments: Path | str) -> int:
    return subprocess.run([sys.executable, "-m", "megarl", "train", *map(str, arguments)]).returncode


def python(script: Path, out: Path) -> None:
    subprocess.run([sys.executable, str(script), str(out)], check=True)


if __name__ == "__main__":
    sys.exit(main())
