"""Memory and time of the head that never holds [tokens, vocabulary], against plain log_softmax and TRL's heads.

    python tools/bench/head.py [--tokens 4096 16384] [--vocabulary 131072] [--hidden 256] [--repeats 3] [--chunk 256]
        [--trl PYTHON]

Every head computes log-probabilities and entropies of random targets, and gradients of both, in fp32 on one thread.
Each runs in processes of its own, which take turns; the best time and the largest memory count. Extra memory is the
rise of the process's peak (VmHWM) over what it held before: the gradient of the head's own weights, which all of them
return, included and also shown.

- naive: logits of all tokens, log_softmax, gather.
- megarl: `megarl.model.heads.token_logprobs` in chunks of ``model.logprob_chunk_size``, by default its default.
- trl-selective, trl-chunked: `trl.trainer.utils.selective_log_softmax` with `entropy_from_logits`, and
  `trl.kernels.chunked_logprob`, of the Python given with --trl, an environment that has them.

A head whose logits alone would not fit into free memory is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HEADS = ("naive", "megarl", "trl-selective", "trl-chunked")
COPIES = {"naive": 5, "trl-selective": 5}  # of [tokens, vocabulary] in fp32 that a head needs, about


def memory(field: str, path: str = "/proc/self/status") -> int:
    """Bytes of a field of /proc/self/status or /proc/meminfo."""
    lines = Path(path).read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))


def head_of(name: str, chunk: int | None) -> Callable:
    import torch

    if name == "naive":

        def naive(hidden, weight, targets):
            log_p = torch.log_softmax(hidden @ weight.t(), -1)
            return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

        return naive
    if name == "megarl":
        from megarl.config import ModelConfig
        from megarl.model.heads import VocabShard, token_logprobs

        chunk = chunk or ModelConfig().logprob_chunk_size
        return lambda hidden, weight, targets: token_logprobs(
            hidden, weight, targets, VocabShard(0, len(weight), None), 1.0, chunk
        )
    if name == "trl-selective":
        from trl.trainer.utils import entropy_from_logits, selective_log_softmax

        def selective(hidden, weight, targets):
            logits = hidden @ weight.t()
            return selective_log_softmax(logits, targets), entropy_from_logits(logits)

        return selective
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return lambda hidden, weight, targets: ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, 1.0, 8192, None, 1.0, ("entropy",)
    )[:2]


def measure(name: str, tokens: int, vocabulary: int, hidden_size: int, chunk: int | None) -> dict[str, float]:
    """Seconds, and bytes of extra memory, of one forward and backward."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    head = head_of(name, chunk)
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = (torch.randn(vocabulary, hidden_size) * 0.02).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,))
    head(hidden[:2], weight, targets[:2])[0].sum().backward()  # whatever is made at the first call
    hidden.grad = weight.grad = None
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start = time.perf_counter()
    logps, entropy = head(hidden, weight, targets)
    (logps.sum() + 0.1 * entropy.sum()).backward()
    seconds = time.perf_counter() - start
    extra = memory("VmHWM") - before
    return {"seconds": seconds, "extra": extra, "logps": logps.sum().item(), "grad": weight.grad.norm().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--vocabulary", type=int, default=131072)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--chunk", type=int, help="model.logprob_chunk_size")
    parser.add_argument("--trl", help="Python of an environment with TRL")
    parser.add_argument("--one", choices=HEADS, help=argparse.SUPPRESS)  # what the processes run
    arguments = parser.parse_args()
    if arguments.one:
        sizes = arguments.tokens[0], arguments.vocabulary, arguments.hidden
        print(json.dumps(measure(arguments.one, *sizes, arguments.chunk)))
        return
    for tokens in arguments.tokens:
        compare(tokens, arguments)


def compare(tokens: int, arguments: argparse.Namespace) -> None:
    """Print a table of all heads for this many tokens."""
    free = memory("MemAvailable", "/proc/meminfo")
    logits = tokens * arguments.vocabulary * 4
    heads = [head for head in HEADS if arguments.trl or not head.startswith("trl")]
    heads = [head for head in heads if COPIES.get(head, 0) * logits < free]
    found: dict[str, list[dict[str, float]]] = {head: [] for head in heads}
    for _ in range(arguments.repeats):
        for head in heads:
            python = arguments.trl if head.startswith("trl") else sys.executable
            command = [python, __file__, "--one", head, "--tokens", str(tokens), "--hidden", str(arguments.hidden)]
            command += ["--vocabulary", str(arguments.vocabulary)]
            command += ["--chunk", str(arguments.chunk)] if arguments.chunk else []
            out = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
            if out.returncode:
                sys.exit(f"{head} failed:\n{out.stderr}")
            found[head].append(json.loads(out.stdout.splitlines()[-1]))
    gradient = arguments.vocabulary * arguments.hidden * 4
    print(f"T = {tokens}, V = {arguments.vocabulary}, h = {arguments.hidden}; logits {logits / 2**20:,.0f} MiB")
    for head, runs in found.items():
        extra = max(run["extra"] for run in runs)
        print(
            f"  {head:14} {min(run['seconds'] for run in runs):6.2f} s, extra memory {extra / 2**20:8,.0f} MiB, "
            f"{(extra - gradient) / 2**20:8,.0f} without the weights' gradient; "
            f"log-probs {runs[0]['logps']:.6g}, gradient's norm {runs[0]['grad']:.6g}"
        )


if __name__ == "__main__":
    main()
