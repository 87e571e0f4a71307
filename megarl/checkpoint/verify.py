"""`megarl verify-resume`: the proof, for a user's own recipe, that a run which stops and resumes is the same run.

The recipe runs with a tiny random model of the same architecture and the same tokenizer, on this machine's CPU or GPUs,
in its own layout where the ranks fit: once straight, and once with a checkpoint and a stop half-way, in two processes
each. Every number of every step has to be equal, but for times. Rewards, data and rollouts are the recipe's own: one
that answers the same question differently is found here.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megarl.config import Config
from megarl.observe.metrics import read_metrics

# Numbers of the clock, and of when a thread had written.
UNLIKE = ("timing_s/", "perf/", "checkpoint/")
# Sizes of the twin. Heads of 32 are the smallest that vLLM's CPU attention has a kernel for.
TINY = {
    "num_hidden_layers": 4,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)


def verify(cfg: Config, recipe: str, overrides: Sequence[str], steps: int) -> int:
    """Print what differs. Returns 0 if nothing does, 1 if something does or a run failed."""
    with tempfile.TemporaryDirectory(prefix="megarl-verify-") as scratch:
        root = Path(scratch)
        twin(Path(cfg.model.path), root / "model")
        common = [
            *overrides,
            f"model.path={root / 'model'}",
            f"run.root={root}",
            f"run.max_num_steps={steps}",
            "run.max_num_epochs=1000000",
            "checkpoint.save_at_end=false",
            "checkpoint.save_contents=[model,optimizer]",
        ]
        runs = {
            "straight": [["run.name=straight", "checkpoint.save_period=0"]],
            "resumed": [["run.name=resumed", f"checkpoint.save_period={steps // 2}"]] * 2,
        }
        for name, starts in runs.items():
            for number, settings in enumerate(starts):
                stopped = name == "resumed" and number == 0
                if error := _train(recipe, [*common, *settings]):
                    print(f"megarl verify-resume: the {name} run failed:\n{error}", file=sys.stderr)
                    return 1
                if stopped:
                    _forget_the_end(root / "resumed", steps // 2)
        straight, resumed = (_numbers(root / name) for name in runs)
    different = compare(straight, resumed)
    for line in different[:20]:
        print(line)
    where = f"{steps} steps straight, and {steps // 2} + {steps - steps // 2} with a stop"
    print(f"{where}: " + (f"{len(different)} numbers differ" if different else "every number is the same, bit for bit"))
    return 1 if different else 0


def twin(source: Path, target: Path) -> None:
    """A tiny random model of the same architecture, with the same tokenizer and vocabulary."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    said = json.loads((source / "config.json").read_text())
    sizes = {name: size for name, size in TINY.items() if said.get(name) is not None}
    config = AutoConfig.from_pretrained(source)
    for name, size in sizes.items():
        setattr(config, name, min(size, said[name]))
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(target)
    for pattern in _TOKENIZER:
        for path in source.glob(pattern):
            shutil.copy(path, target)


def _train(recipe: str, overrides: Sequence[str]) -> str | None:
    """Run it as `megarl train` does. What it printed, if it failed."""
    command = [sys.executable, "-m", "megarl", "train", recipe, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else (done.stdout + done.stderr)[-3000:]


def _forget_the_end(run: Path, step: int) -> None:
    """Leave the run as a kill after ``step`` would have: with that checkpoint as its newest."""
    from megarl.checkpoint.folder import CHECKPOINTS, discard, finished, point, step_of

    for folder in finished(run / CHECKPOINTS):
        if step_of(folder) != step:
            discard(folder)
    point(run / CHECKPOINTS, step)


def _numbers(run: Path) -> dict[int, dict[str, Any]]:
    records = read_metrics(run)
    return {r["step"]: {k: v for k, v in r.items() if not k.startswith(UNLIKE)} for r in records}


def compare(straight: dict[int, dict[str, Any]], resumed: dict[int, dict[str, Any]]) -> list[str]:
    """Every number that the two do not share, as a line; NaN equals NaN."""
    lines = []
    for step in sorted({*straight, *resumed}):
        theirs, ours = straight.get(step, {}), resumed.get(step, {})
        for name in sorted({*theirs, *ours}):
            a, b = theirs.get(name), ours.get(name)
            if a != b and not (a != a and b != b):
                lines.append(f"step {step} {name}: {a} straight, {b} resumed")
    return lines
