"""Seconds per GRPO step: megarl beside TRL's GRPOTrainer, on one CPU thread each.

    .venv/bin/python tools/bench/grpo_vs_trl.py [--steps 6]

Each trainer is a process of its own that keeps everything loaded and makes one step when told; they take turns, so
that what else the machine does meets both. The first two steps of each are warm-up. TRL lives in a virtual environment
of its own, which `trl_setup.sh` makes in $MEGARL_BENCH_HOME (default /tmp/megarl-bench) when it is missing.

Equal on both sides: the model and its initial weights, prompts and their order, 32 x 8 responses a step of exactly 48
tokens (counted on both sides, and compared), the reward function, one update a step in 4 microbatches, learning rate,
fused AdamW, clipping, temperature 1, fp32, one torch thread, torch's version. A step is all that a trainer does from
one to the next: sampling, rewards, update, its own metrics, and for megarl the push of weights.

What differs is what is compared: megarl samples with vLLM and trains with megatron-core; TRL does both with
transformers, which is its only way on a CPU. With vLLM there its first push of weights fails: TRL calls vLLM's
`model.load_weights` alone, and on a CPU vLLM has packed the weights for its kernels and left empty parameters behind.
Lengths that are all equal suit transformers best: it samples until a batch's longest response ends, vLLM does not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import workload
from workload import NEW_TOKENS, PROMPTS, SAMPLES

HERE = Path(__file__).parent
WARM_UP = 2


class Worker:
    """A trainer in a process of its own. It starts into its first step at once."""

    def __init__(self, name: str, command: list[str], log: Path) -> None:
        self.name, self.log = name, log
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment = os.environ | threads | {"PYTHONPATH": str(HERE.parents[1])}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=environment,
        )
        self.steps: list[dict[str, float]] = []

    def take(self) -> None:
        """Wait for the step that is under way."""
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"{self.name} ended with code {self.process.wait()}:\n{self.log.read_text()[-3000:]}")
        self.steps.append(json.loads(answer))

    def go(self) -> None:
        """Let it begin the next step, or end after the last."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()


def measure(folder: Path, steps: int) -> list[Worker]:
    """megarl and TRL, after as many steps each."""
    trl_python = Path(os.environ.get("MEGARL_BENCH_HOME", "/tmp/megarl-bench")) / "trl-venv/bin/python"
    commands = {
        "megarl": [sys.executable, str(HERE / "megarl_side.py"), str(folder)],
        "TRL": [str(trl_python), str(HERE / "trl_side.py"), str(folder), str(steps)],
    }
    workers = []
    for name, command in commands.items():
        worker = Worker(name, command, folder / f"{name}.log")
        workers.append(worker)
        worker.take()
    for step in range(2, steps + 1):
        for worker in workers:
            worker.go()
            worker.take()
        print(
            f"step {step}: " + ", ".join(f"{w.name} {w.steps[-1]['seconds']:.2f} s" for w in workers), file=sys.stderr
        )
    for worker in workers:
        worker.go()
        worker.process.wait(timeout=60)
    return workers


def table(workers: list[Worker]) -> str:
    """The fastest and the middle step of each; CPU seconds of its main process, which other work disturbs less."""
    lines = [f"{'':<8}{'s/step min':>12}{'median':>9}{'CPU s min':>11}{'tokens/step':>13}{'tokens/s':>10}"]
    best = {}
    for worker in workers:
        measured = worker.steps[WARM_UP:]
        seconds = [step["seconds"] for step in measured]
        best[worker.name] = min(seconds)
        tokens = measured[0]["tokens"]
        lines.append(
            f"{worker.name:<8}{min(seconds):>12.3f}{statistics.median(seconds):>9.3f}"
            f"{min(step['cpu_seconds'] for step in measured):>11.3f}{tokens:>13}{tokens / min(seconds):>10.0f}"
        )
    return "\n".join([*lines, f"seconds per step, TRL / megarl: {best['TRL'] / best['megarl']:.2f}x"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="measured steps of each side")
    steps = parser.parse_args().steps + WARM_UP
    subprocess.run(["bash", str(HERE / "trl_setup.sh")], check=True)
    with tempfile.TemporaryDirectory() as scratch:
        workload.make(Path(scratch), steps)
        workers = measure(Path(scratch), steps)
    expected = PROMPTS * SAMPLES * NEW_TOKENS
    for worker in workers:
        sampled = {step["tokens"] for step in worker.steps}
        assert sampled == {expected}, f"{worker.name} sampled {sampled} tokens a step, not {expected}"
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    print(f"{steps - WARM_UP} steps of {PROMPTS} x {SAMPLES} responses; load of the machine {load}")
    print(table(workers))


if __name__ == "__main__":
    main()
