"""A long asynchronous run of a tiny model whose servers are killed at random, and what that cost.

    python tools/soak_engines.py [--steps 200] [--engines 2] [--every 15] [--seed 0] [--folder DIR]

`megarl train` starts ranks and servers; about every so many seconds, every process of a server is killed (SIGKILL) as
soon as there is one that answers. At the end: the run has to be done, the reward (share of responses with a "#") has to
be above 0.95 where a random model's is a half, every step has to have all of its groups, whole and once, no token may
be staler than allowed, and no process may be left. Printed: kills, requests that were lost and the tokens that this
cost, and how many servers steps had.
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

import psutil

from megarl.observe.metrics import read_metrics

PROMPTS, SAMPLES, STALENESS = 8, 4, 2
GONE_WITHIN_S = 60  # servers end what they have; one that is still importing ends when it has
RECIPE = """
cluster: {{device: cpu}}
run: {{root: {root}, name: soak, max_num_steps: {steps}, max_num_epochs: 1000000}}
model: {{path: {root}/model, dtype: fp32}}
optimizer: {{lr: 3.0e-4}}
train: {{train_global_batch_size: 32, train_mb_tokens: 800, logprob_mb_tokens: 800}}
data: {{path: {root}/prompts.jsonl, apply_chat_template: false, max_prompt_length: 8}}
rollout:
  mode: remote
  max_staleness: {staleness}
  num_engines: {engines}
  num_prompts_per_step: {prompts}
  num_generations_per_prompt: {samples}
  max_response_length: 12
  max_num_seqs: 64
  kv_cache_gb: 0.05
loss: {{truncated_importance_sampling_type: tis}}
reward: {{workers: 1, save_scores: true, functions: [{{name: format, args: {{pattern: ".*#.*"}}}}]}}
checkpoint: {{save_at_end: false}}
"""


def make(root: Path, steps: int, engines: int) -> Path:
    """Model, prompts and recipe."""
    maker = Path(__file__).parents[1] / "examples" / "quickstart" / "make_model.py"
    subprocess.run([sys.executable, str(maker), str(root / "model")], check=True)
    rows = [{"prompt": f"{a}+{b}=", "answer": ""} for a in range(10, 30) for b in range(10, 30)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = root / "recipe.yaml"
    sizes = {"prompts": PROMPTS, "samples": SAMPLES, "staleness": STALENESS}
    path.write_text(RECIPE.format(root=root, steps=steps, engines=engines, **sizes))
    return path


def kill_one(engines: Path, chance: random.Random) -> bool:
    """Every process of a server that answers."""
    files = sorted(engines.glob("*.json"))
    if not files:
        return False
    os.killpg(json.loads(chance.choice(files).read_text())["pid"], signal.SIGKILL)
    return True


def soak(root: Path, every: float, chance: random.Random, recipe: Path) -> tuple[int, int]:
    """(exit code, kills)."""
    command = [sys.executable, "-m", "megarl", "train", str(recipe)]
    with (root / "log").open("wb") as log:
        job = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    kills, metrics = 0, root / "soak" / "metrics.jsonl"
    following = None
    while job.poll() is None:
        time.sleep(0.2)
        if following is None and metrics.exists() and metrics.stat().st_size:
            following = time.monotonic() + every
        if following is not None and time.monotonic() > following and kill_one(root / "soak" / "engines", chance):
            kills += 1
            following = time.monotonic() + every * chance.uniform(0.5, 1.5)
    return job.returncode, kills


def check(root: Path, steps: int) -> list[str]:
    """What is wrong."""
    records = read_metrics(root / "soak")
    wrong = []
    if [record["step"] for record in records] != list(range(1, steps + 1)):
        wrong.append(f"{len(records)} steps of {steps}")
    trained: dict[int, Counter[str]] = {}
    for line in (root / "soak" / "rewards.jsonl").read_text().splitlines():
        row = json.loads(line)
        trained.setdefault(row["step"], Counter())[row["id"]] += 1
    for step, prompts in trained.items():
        if len(prompts) != PROMPTS or set(prompts.values()) != {SAMPLES}:
            wrong.append(f"step {step} has {dict(prompts)}")
    epoch = 400 // PROMPTS  # steps in which every prompt has its turn, once
    for first in range(1, steps - epoch + 2, epoch):
        seen = Counter(name for step in range(first, first + epoch) for name in trained.get(step, ()))
        if len(seen) != 400 or set(seen.values()) != {1}:
            wrong.append(
                f"steps {first} to {first + epoch - 1}: {len(seen)} prompts of 400, {sum(seen.values())} groups"
            )
    stalest = max(record["staleness/max"] for record in records)
    if stalest > STALENESS:
        wrong.append(f"a token was {stalest:.0f} updates old")
    reward = sum(record["reward/mean"] for record in records[-10:]) / 10
    if reward < 0.95:
        wrong.append(f"the reward ends at {reward:.3f}")
    until = time.monotonic() + GONE_WITHIN_S
    while (left := processes_of(root)) and time.monotonic() < until:
        time.sleep(1)
    if left:
        wrong.append(f"processes are left: {left}")
    return wrong


def processes_of(root: Path) -> list[str]:
    """Those that were started with the run's folder among their arguments."""
    commands = {p.pid: " ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])}
    return [f"{pid}: {said}" for pid, said in commands.items() if str(root) in said and pid != os.getpid()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--every", type=float, default=15, help="seconds between kills, on average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None)
    args = parser.parse_args()
    root = args.folder or Path(tempfile.mkdtemp(prefix="soak-engines-"))
    recipe = make(root, args.steps, args.engines)
    began = time.monotonic()
    code, kills = soak(root, args.every, random.Random(args.seed), recipe)
    seconds = time.monotonic() - began
    if code:
        print(f"the run ended with {code}; its log is {root / 'log'}")
        return 1
    records = read_metrics(root / "soak")
    last = records[-1]
    tokens = sum(record["response_length/mean"] * PROMPTS * SAMPLES for record in records)
    servers = Counter(int(record["engines/number"]) for record in records)
    rewards = [record["reward/mean"] for record in records]
    print(
        f"{args.steps} steps in {seconds:.0f} s, {kills} servers killed; steps by how many were left: {dict(servers)}"
    )
    print(
        f"lost: {last['engines/lost_requests']:.0f} requests, an estimated {last['engines/lost_tokens_estimate']:.0f} "
        f"tokens of {tokens:.0f} trained on; reward {sum(rewards[:5]) / 5:.2f} to {sum(rewards[-10:]) / 10:.2f}"
    )
    wrong = check(root, args.steps)
    print("\n".join(wrong) or "no group lost or trained twice, no token too old, no process left")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
