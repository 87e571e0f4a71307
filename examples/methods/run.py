"""Run any method on one CPU rank, and judge whether it moved what it is to move.

    python examples/methods/run.py METHOD ... [--root runs/methods] [--prefs FOLDER] [KEY=VALUE ...]   (or: all)

A method is a recipe of this folder, on the quickstart's sums. What it starts from is made once: problems, preference
data, and a model that SFT has taught both to guess and to work sums out (the quickstart's, about a minute; SFT itself
starts from random weights); for distillation a teacher, by GRPO; for the choice of prompts by difficulty, rewards of
that same run. The recipes real_... read --prefs FOLDER/dpo_en_demo.json and kto_en_demo.json (LLaMA-Factory's samples
of ShareGPT's and OpenAI's layouts), with a model and tokenizer made from their text.

It ends with a table, and with an error if a method's run failed, left its objective where it was, or took too long.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
QUICKSTART = HERE.parent / "quickstart"
SELECT = HERE.parents[1] / "tools" / "select_prompts.py"
METHODS = sorted(path.stem for path in HERE.glob("*.yaml"))
BASES = ("rl", "pairs", "labels", "sft")
DATA = {"rl": "train", "pairs": "pairs", "labels": "labels", "sft": "pairs"}
REAL = {"real_pairs": "dpo_en_demo.json", "real_labels": "kto_en_demo.json"}
# What a method of each base is to move, and by how much at least, from the mean of its first three steps to that of its
# last three.
OBJECTIVES = {
    "rl": ("reward/mean", 0.1),
    "pairs": ("rewards/margins", 0.05),
    "labels": ("rewards/undesirable", -0.05),
    "sft": ("actor/loss", -0.05),
}
OTHERS = {
    "reward_model": ("rewards/accuracies", 0.1),
    "distillation": ("actor/teacher_kl", -0.05),
}


@dataclass(frozen=True)
class Result:
    """What became of a method's objective."""

    name: str
    objective: str
    before: float
    after: float
    steps: int
    seconds: float
    problem: str  # empty where there is none

    def __str__(self) -> str:
        moved = f"{self.before:8.3f} -> {self.after:8.3f}"
        text = f"{self.name:30} {self.objective:22} {moved}   {self.steps} steps, {self.seconds:.0f} s"
        return f"{text}   {self.problem}".rstrip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("methods", nargs="+", metavar="METHOD|KEY=VALUE", help=", ".join(METHODS))
    parser.add_argument("--root", type=Path, default=Path("runs/methods"), help="folder of everything that is made")
    parser.add_argument("--prefs", type=Path, help="folder of real preference data")
    parser.add_argument("--limit-s", type=float, default=120, help="seconds that a method may take")
    args = parser.parse_args()
    settings = [argument for argument in args.methods if "=" in argument]
    names = [argument for argument in args.methods if "=" not in argument]
    names = METHODS if names == ["all"] else names
    if unknown := [name for name in names if name not in METHODS]:
        parser.error(f"no recipe for {', '.join(unknown)}; there are {', '.join(METHODS)}")
    if args.prefs is None and (skipped := [name for name in names if name in REAL]):
        print(f"skipped: {', '.join(skipped)}: no --prefs FOLDER with {', '.join(REAL.values())}")
        names = [name for name in names if name not in REAL]
    prepare(args.root)
    results = [run(args.root, name, settings, args.prefs, args.limit_s) for name in names]
    print(*results, sep="\n")
    return int(any(result.problem for result in results))


def prepare(root: Path) -> None:
    """Data and the model that all methods start from, where they are missing."""
    python(HERE / "make_data.py", root / "data")
    if (root / "start/hf/final/config.json").exists():
        return
    python(QUICKSTART / "problems.py", root / "data")
    python(QUICKSTART / "make_model.py", root / "model")
    files = [f"model.path={root / 'model'}", f"data.path={root / 'data/sft.jsonl'}"]
    megarl(QUICKSTART / "sft.yaml", f"run.root={root}", "run.name=start", *files)


def run(root: Path, name: str, settings: list[str], prefs: Path | None, limit_s: float) -> Result:
    base = base_of(name)
    recipes = [HERE / f"{base}.yaml"] + ([] if name == base else [HERE / f"{name}.yaml"])
    more = inputs_of(root, name, base, prefs)
    started = time.monotonic()
    code = megarl(*recipes, f"run.root={root}", f"run.name={name}", "checkpoint.resume_mode=disable", *more, *settings)
    seconds = time.monotonic() - started
    if code:
        return Result(name, "", 0.0, 0.0, 0, seconds, f"failed with exit code {code}")
    return judge(name, base, root / name / "metrics.jsonl", seconds, limit_s)


def inputs_of(root: Path, name: str, base: str, prefs: Path | None) -> list[str]:
    """Settings that say what a method starts from; what another run has to make for it is made."""
    if name in REAL:
        assert prefs is not None
        data, model = prefs / REAL[name], root / f"model_{name}"
        if not (model / "config.json").exists():
            subprocess.run([sys.executable, HERE.parent / "tiny_model.py", model, "--text", data], check=True)
        return [f"data.path={data}", f"model.path={model}"]
    start = "model" if base == "sft" else "start/hf/final"  # what SFT has taught there is nothing left to learn from
    files = [f"data.path={root / 'data' / DATA[base]}.jsonl", f"model.path={root / start}"]
    if name in ("distillation", "difficulty") and not (root / "rl/hf/final/config.json").exists():
        run(root, "rl", [], None, 0)
    if name == "rl":
        files.append("reward.save_scores=true")
    if name == "distillation":
        files.append(f"teacher.path={root / 'rl/hf/final'}")
    if name == "difficulty":
        rates = root / "data/pass_rates.jsonl"
        subprocess.run([sys.executable, SELECT, root / "rl/rewards.jsonl", rates], check=True)
        files.append(f"data.pass_rates={rates}")
    if name == "precomputed":
        files.append(f"preference.ref_log_probs_path={root / 'data/ref_log_probs.jsonl'}")
    return files


def base_of(name: str) -> str:
    """The base that the recipe's first line names."""
    header = (HERE / f"{name}.yaml").read_text().split("\n", 1)[0]
    return next(base for base in BASES if f"methods/{base}.yaml" in header)


def judge(name: str, base: str, metrics: Path, seconds: float, limit_s: float) -> Result:
    """First and last three steps of the objective, as means."""
    objective, least = OTHERS.get(name, OBJECTIVES[base])
    values = [row[objective] for row in map(json.loads, metrics.read_text().splitlines()) if objective in row]
    before, after = (sum(part) / len(part) for part in (values[:3], values[-3:]))
    problems = []
    if (after - before) * (1 if least > 0 else -1) < abs(least):
        problems.append(f"moved by {after - before:+.3f}, less than {least:+g}")
    if seconds > limit_s:
        problems.append(f"took longer than {limit_s:g} s")
    return Result(name, objective, before, after, len(values), seconds, "; ".join(problems))


def megarl(*arguments: Path | str) -> int:
    return subprocess.run([sys.executable, "-m", "megarl", "train", *map(str, arguments)]).returncode


def python(script: Path, out: Path) -> None:
    subprocess.run([sys.executable, str(script), str(out)], check=True)


if __name__ == "__main__":
    sys.exit(main())
