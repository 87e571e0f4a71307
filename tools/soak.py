"""A long run of a tiny model with random faults, and what it leaves behind.

    python tools/soak.py [--algorithm sft|grpo] [--steps 2000] [--faults 20] [--seed 0] [--folder DIR]

Starts the run again and again until it is done. Each time one of the faults happens at a random moment: kill -9 of a
rank or of the launcher, SIGTERM or SIGUSR1 to a rank, a flipped bit in the newest checkpoint, a disk that is full for a
while (as root, on a small file system of its own), files that may not grow for a while. Fails unless in the end

- the losses are those of a run without faults, to the last bit, and the loss or reward reached its target;
- no start left a process behind, or lost more than two periods between checkpoints;
- in the longest start memory grew by less than 1 MB in 100 steps, and file handles and threads not at all.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import statistics
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

PERIOD = 10
RECIPE = f"""
cluster: {{{{gpus_per_node: 2, device: cpu}}}}
run: {{{{root: {{root}}, name: soak, max_num_steps: {{steps}}, max_num_epochs: 1000000, deadline_s: 120}}}}
model: {{{{path: {{root}}/model, dtype: fp32}}}}
optimizer: {{{{lr: 1.0e-3}}}}
train: {{{{train_global_batch_size: 8, train_mb_tokens: 400, logprob_mb_tokens: 400}}}}
data: {{{{path: {{root}}/rows.jsonl, apply_chat_template: false, max_prompt_length: 64}}}}
rollout: {{{{num_prompts_per_step: 2, num_generations_per_prompt: 4, max_response_length: 8, kv_cache_gb: 0.02}}}}
checkpoint: {{{{save_period: {PERIOD}, save_contents: [model, optimizer]}}}}
"""
# How much of a response is sevens: something that a random model can find out.
REWARD = """
def sevens(completions, **columns):
    return [completion.count("7") / max(len(completion), 8) for completion in completions]
"""
# The mean over the last 50 steps of the metric, and whether it is to be at least or at most so much.
TARGETS = {"sft": ("actor/loss", 1.0, "at most"), "grpo": ("reward/mean", 0.8, "at least")}
FAULTS = ["kill -9 a rank", "kill -9 the launcher", "SIGTERM", "SIGUSR1", "flipped bit", "files may not grow"]
PASSING = ("disk full", "files may not grow")  # the run goes on, and the fault ends after 10 seconds
SIGNALS = {"kill -9 a rank": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGUSR1": signal.SIGUSR1}


def start(root: Path, *overrides: str) -> subprocess.Popen[bytes]:
    log = (root / "log").open("ab")
    command = [sys.executable, "-m", "megarl", "train", str(root / "recipe.yaml"), *overrides]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)


def numbers(root: Path, run: str, metric: str) -> list[float]:
    return [record[metric] for record in read_metrics(root / run)]


def done(root: Path) -> int:
    """The last step that has a line."""
    path = root / "soak" / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def flip_a_bit(root: Path, chance: random.Random) -> None:
    """In the newest checkpoint, if there is one before it to go back to."""
    folders = disk.finished(root / "soak" / "checkpoints")
    if len(folders) > 1:
        folder = folders[0]
        victim = chance.choice(sorted(path for path in folder.iterdir() if path.stat().st_size))
        content = bytearray(victim.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        victim.write_bytes(content)


def fill(root: Path) -> None:
    """Take every byte that the file system has left."""
    with (root / "filler").open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue


def limit(ranks: list[psutil.Process], size: int) -> None:
    """The largest file that these processes may write."""
    for rank in ranks:
        resource.prlimit(rank.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


class Watch:
    """Memory, handles and threads of a start's ranks, step after step."""

    def __init__(self) -> None:
        self.samples: list[tuple[int, float, int, int]] = []

    def look(self, job: subprocess.Popen[bytes], step: int) -> list[psutil.Process]:
        try:
            ranks = psutil.Process(job.pid).children()
            if len(ranks) == 2:
                rank = ranks[0]
                self.samples.append((step, rank.memory_info().rss / 1e6, rank.num_fds(), rank.num_threads()))
            return ranks
        except psutil.Error:
            return []

    def growth(self) -> dict[str, float] | None:
        """Of the last three quarters of a start's steps: MB in 100 steps by least squares; handles and threads, as the
        median of the last third less that of the first. None for fewer than 200 steps."""
        first, last = (self.samples[0][0], self.samples[-1][0]) if self.samples else (0, 0)
        if last - first < 200:
            return None
        kept = [sample for sample in self.samples if sample[0] >= first + (last - first) / 4]
        steps, memory = [sample[0] for sample in kept], [sample[1] for sample in kept]
        slope = statistics.linear_regression(steps, memory).slope
        third = len(kept) // 3
        counts = {
            name: statistics.median(sample[at] for sample in kept[-third:])
            - statistics.median(sample[at] for sample in kept[:third])
            for at, name in ((2, "handles"), (3, "threads"))
        }
        return {"steps": last - first, "MB in 100 steps": round(100 * slope, 3)} | counts


def one_start(root: Path, fault: str | None, steps: int, chance: random.Random, last: bool) -> dict[str, Any]:
    """Run until the fault, or to the end. What a run survives by itself is followed by a SIGTERM some steps later, but
    for the last fault."""
    if fault == "flipped bit":
        flip_a_bit(root, chance)
    before = done(root)
    at = before + chance.randrange(3, max(steps // 20, 4))
    job, watch = start(root), Watch()
    ranks: list[psutil.Process] = []
    heal_at, survived = None, fault in (*PASSING, "flipped bit") and not last
    while job.poll() is None:
        step = done(root)
        ranks = watch.look(job, step) or ranks
        if fault not in (None, "flipped bit") and step >= at and ranks:
            if fault == "kill -9 the launcher":
                job.kill()
            elif fault == "disk full":
                fill(root)
            elif fault == "files may not grow":
                limit(ranks, 10_000)
            else:
                chance.choice(ranks).send_signal(SIGNALS[fault])
            heal_at = time.monotonic() + 10 if fault in PASSING else None
            if fault not in PASSING:
                job.wait(180)
            fault = None
        if heal_at is not None and time.monotonic() > heal_at:
            (root / "filler").unlink(missing_ok=True)
            limit(ranks, resource.RLIM_INFINITY)
            heal_at = None
        if survived and heal_at is None and fault in (None, "flipped bit") and step >= at + steps // 40:
            survived = False
            job.terminate()
        time.sleep(0.2)
    (root / "filler").unlink(missing_ok=True)
    psutil.wait_procs(ranks, timeout=10)
    left = [rank.pid for rank in ranks if rank.is_running()]
    return {"from": before, "to": done(root), "code": job.returncode, "orphans": left, "growth": watch.growth()}


def prepare(args: argparse.Namespace, root: Path) -> bool:
    """Model, data and recipe. Returns whether the folder is a small file system of its own."""
    root.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=128m", "tmpfs", str(root)]
    own = os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    rows = [{"prompt": f"{a} + {b} = ", "response": str(a + b)} for a in range(40) for b in range(10)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row | {"answer": row["response"]}) + "\n" for row in rows))
    (root / "soak_reward.py").write_text(REWARD)
    maker = Path(__file__).parents[1] / "examples" / "tiny_model.py"
    make = [sys.executable, str(maker), str(root / "model"), "--text", str(root / "rows.jsonl")]
    subprocess.run(make, check=True, capture_output=True)
    rewards = "reward: {workers: 1, functions: [{name: 'soak_reward:sevens'}]}\n" if args.algorithm == "grpo" else ""
    recipe = RECIPE.format(root=root, steps=args.steps)
    (root / "recipe.yaml").write_text(f"algorithm: {args.algorithm}\n{recipe}{rewards}")
    return own


def judge(root: Path, args: argparse.Namespace, growth: dict[str, float] | None) -> list[str]:
    """What is wrong in the end."""
    wrong = []
    start(root, "run.name=straight", "checkpoint.save_period=0", "checkpoint.save_at_end=false").wait()
    if numbers(root, "soak", "actor/loss") != numbers(root, "straight", "actor/loss"):
        wrong.append("losses differ from those of a run without faults")
    metric, target, side = TARGETS[args.algorithm]
    reached = statistics.mean(numbers(root, "soak", metric)[-50:])
    print(f"{metric}, mean of the last 50 steps: {reached:.3f} ({side} {target})")
    if reached > target if side == "at most" else reached < target:
        wrong.append(f"{metric} = {reached:.3f} is not {side} {target}")
    print(f"longest start: {growth}")
    if growth is None:
        wrong.append("no start was long enough to see whether memory grows")
    elif growth["MB in 100 steps"] >= 1 or growth["handles"] > 0 or growth["threads"] > 0:
        wrong.append("memory, handles or threads grow")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithm", choices=sorted(TARGETS), default="sft")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    root = args.folder or Path(tempfile.mkdtemp(prefix="megarl-soak-"))
    own = prepare(args, root)
    faults, chance, happened = FAULTS + ["disk full"] * own, random.Random(args.seed), Counter[str]()
    longest: dict[str, float] | None = None
    wrong: list[str] = []
    while done(root) < args.steps and not wrong:
        # Every kind once, in turn, then by chance.
        number = sum(happened.values())
        fault = None if number >= args.faults else faults[number] if number < len(faults) else chance.choice(faults)
        highest = done(root)
        outcome = one_start(root, fault, args.steps, chance, last=number + 1 >= args.faults)
        happened[fault or "none"] += 1
        print(f"{fault or 'no fault'}: {json.dumps(outcome)}", flush=True)
        if (growth := outcome["growth"]) and growth["steps"] >= (longest or growth)["steps"]:
            longest = growth
        if outcome["orphans"]:
            wrong.append("a process was left behind")
        if outcome["to"] < highest - 2 * PERIOD:
            wrong.append(f"steps were lost: {highest} were done, now {outcome['to']}")
        if fault is None and outcome["code"]:
            wrong.append(f"a start without a fault ended with {outcome['code']}")
    wrong = wrong or judge(root, args, longest)
    print(f"{args.steps} steps of {args.algorithm}, {dict(happened)}: " + ("; ".join(wrong) or "all of it held"))
    print(f"log: {root / 'log'}")
    if own and not wrong:
        subprocess.run(["umount", "-l", str(root)], check=True)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
