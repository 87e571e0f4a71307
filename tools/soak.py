"""A long run of a tiny model with random faults, and what it leaves behind.

    python tools/soak.py [--steps 2000] [--faults 20] [--seed 0] [--folder DIR]

Starts the run again and again until it is done. Each time one of the faults happens at a random moment: kill -9 of a
rank or of the launcher, SIGTERM or SIGUSR1 to a rank, a flipped bit in the newest checkpoint, a checkpoint folder that
cannot be written. At the end: the losses have to be those of a run without faults, no process may be left, and memory,
file handles and threads of the ranks may not grow from the first quarter of a start to its last.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from megarl.checkpoint import folder as disk
from megarl.observe.metrics import read_metrics

RECIPE = """
algorithm: sft
cluster: {{gpus_per_node: 2, device: cpu}}
run: {{root: {root}, name: soak, max_num_steps: {steps}, max_num_epochs: 1000000, deadline_s: 60}}
model: {{path: {root}/model, dtype: fp32}}
optimizer: {{lr: 1.0e-3}}
train: {{train_global_batch_size: 8, train_mb_tokens: 400}}
data: {{path: {root}/rows.jsonl, apply_chat_template: false, max_prompt_length: 64}}
checkpoint: {{save_period: 10, save_contents: [model, optimizer]}}
"""
FAULTS = ("kill -9 a rank", "kill -9 the launcher", "SIGTERM", "SIGUSR1", "flipped bit", "checkpoint not writable")


def start(root: Path, *overrides: str) -> subprocess.Popen[bytes]:
    log = (root / "log").open("ab")
    command = [sys.executable, "-m", "megarl", "train", str(root / "recipe.yaml"), *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)


def losses(root: Path, name: str) -> list[float]:
    return [record["actor/loss"] for record in read_metrics(root / name)]


def done(root: Path) -> int:
    path = root / "soak" / "metrics.jsonl"
    return len(read_metrics(path)) if path.exists() else 0


def flip_a_bit(root: Path, chance: random.Random) -> None:
    """In the newest checkpoint, if there is one before it to go back to."""
    folders = disk.finished(root / "soak" / "checkpoints")
    if len(folders) > 1:
        folder = folders[0]
        victim = chance.choice(sorted(path for path in folder.iterdir() if path.stat().st_size))
        content = bytearray(victim.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        victim.write_bytes(content)


class Watch:
    """Memory, handles and threads of a start's ranks, sample after sample."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, int, int]] = []

    def look(self, job: subprocess.Popen[bytes]) -> list[psutil.Process]:
        try:
            ranks = psutil.Process(job.pid).children()
            if len(ranks) == 2:
                rank = ranks[0]
                self.samples.append((rank.memory_info().rss / 1e6, rank.num_fds(), rank.num_threads()))
            return ranks
        except psutil.Error:
            return []

    def growth(self) -> dict[str, float] | None:
        """Mean of the last quarter less that of the second; the first is start-up. None for a start too short."""
        quarter = len(self.samples) // 4
        if quarter < 5:
            return None
        early, late = self.samples[quarter : 2 * quarter], self.samples[-quarter:]
        means = [[sum(column) / len(part) for column in zip(*part, strict=True)] for part in (early, late)]
        return dict(zip(("MB", "handles", "threads"), (b - a for a, b in zip(*means, strict=True)), strict=True))


def one_start(root: Path, fault: str | None, steps: int, chance: random.Random) -> dict[str, Any]:
    """Run until the fault, or to the end."""
    checkpoints = root / "soak" / "checkpoints"
    if fault == "flipped bit":
        flip_a_bit(root, chance)
    before = done(root)
    at = before + chance.randrange(3, max(steps // 8, 4))
    job, watch = start(root), Watch()
    ranks: list[psutil.Process] = []
    while job.poll() is None:
        ranks = watch.look(job) or ranks
        if fault not in (None, "flipped bit") and done(root) >= at and ranks:
            if fault == "kill -9 the launcher":
                job.kill()
            elif fault == "checkpoint not writable":
                checkpoints.mkdir(exist_ok=True)
                (checkpoints / (disk.name_of(done(root) // 10 * 10 + 10) + ".incomplete")).write_text("in the way")
            else:
                number = {"kill -9 a rank": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGUSR1": signal.SIGUSR1}[fault]
                chance.choice(ranks).send_signal(number)
            fault = None if fault == "checkpoint not writable" else "happened"
            if fault == "happened":
                job.wait(120)
        time.sleep(0.1)
    psutil.wait_procs(ranks, timeout=10)
    left = [rank.pid for rank in ranks if rank.is_running()]
    return {"from": before, "to": done(root), "code": job.returncode, "orphans": left, "growth": watch.growth()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    root = args.folder or Path(tempfile.mkdtemp(prefix="megarl-soak-"))
    root.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"{a} + {b} = ", "response": str(a + b)} for a in range(40) for b in range(10)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    maker = Path(__file__).parents[1] / "examples" / "tiny_model.py"
    make = [sys.executable, str(maker), str(root / "model"), "--text", str(root / "rows.jsonl")]
    subprocess.run(make, check=True, capture_output=True)
    (root / "recipe.yaml").write_text(RECIPE.format(root=root, steps=args.steps))
    chance, happened = random.Random(args.seed), Counter[str]()
    while done(root) < args.steps:
        fault = chance.choice(FAULTS) if sum(happened.values()) < args.faults else None
        highest = done(root)
        outcome = one_start(root, fault, args.steps, chance)
        happened[fault or "none"] += 1
        print(f"{fault or 'no fault'}: {json.dumps(outcome)}", flush=True)
        if outcome["orphans"] or outcome["to"] < highest - 20:
            print(f"failed: see {root / 'log'}")
            return 1
    start(root, "run.name=straight", "checkpoint.save_period=0", "checkpoint.save_at_end=false").wait()
    same = losses(root, "soak") == losses(root, "straight")
    print(f"{args.steps} steps, {dict(happened)}: losses {'equal' if same else 'DIFFER FROM'} those of a run without")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
