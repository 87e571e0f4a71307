"""Packing: how fast and how full the plan is, and useful tokens a second against padded batches.

    python tools/bench/packing.py [--repeats 5] [--plan-only]

1. Plan: 10,000 long-tailed lengths into bins of 32,768 tokens, on one core (median and best of the repeats); fill is
   tokens over bins x size, and the bound is the fewest bins that could hold them.
2. Balance: 1,024 of such sequences over 32 replicas, by tokens and by FLOPs of Llama-70B's sizes.
3. Training: one SFT update on 64 long-tailed lengths, of which a batch padded to its longest sequence is 35 % full, by
   the same engine on the same model: packed microbatches, against microbatches of sequences padded to the longest of
   all (padding is real tokens to the model, as in a padded batch, and counts for nothing in the loss). Both have the
   same room in a microbatch, take turns, and have the same gradient's norm.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from megarl.config import load
from megarl.data.packing import balance, microbatches_of
from megarl.data.records import Sample
from megarl.losses.sft import sft
from megarl.model.engine import Engine
from megarl.model.family import read_spec
from megarl.model.flops import ModelFlops
from megarl.parallel.mesh import build_mesh

BIN = 32768


def long_tailed(count: int, longest: int, median: float, seed: int = 0) -> list[int]:
    """Log-normal lengths, as responses of reasoning models have them; the longest is reached."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randn(count, generator=generator).mul(0.9).exp().mul(median).clamp(8, longest).int().tolist()
    return [longest, *lengths[1:]]


def plan(repeats: int) -> None:
    lengths = long_tailed(10_000, BIN, 4000.0)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        groups = microbatches_of(lengths, BIN)
        seconds.append(time.perf_counter() - start)
    bound = -(-sum(lengths) // BIN)
    fill = sum(lengths) / (len(groups) * BIN)
    print(f"10,000 lengths into {len(groups)} bins of {BIN} (bound {bound}): fill {fill:.4f},", end=" ")
    print(f"{statistics.median(seconds) * 1e3:.1f} ms, {min(seconds) * 1e3:.1f} at best")
    lengths = long_tailed(1024, BIN, 4000.0)
    flops = ModelFlops(matmul_parameters=70_000_000_000, full_attention=4 * 80 * 64 * 128)
    for what, costs in (("tokens", lengths), ("FLOPs", [flops.cost(n) for n in lengths])):
        start = time.perf_counter()
        parts = balance(costs, 32)
        taken = time.perf_counter() - start
        worst = []
        for weigh in (float, flops.cost):
            totals = [sum(weigh(lengths[i]) for i in part) for part in parts]
            worst.append(max(totals) / (sum(totals) / 32))
        print(f"1,024 over 32 replicas by {what}: max/mean of tokens {worst[0]:.3f}, of FLOPs {worst[1]:.3f}", end="; ")
        print(f"{taken * 1e3:.1f} ms")


def train(repeats: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    longest, count = 1024, 64
    lengths = long_tailed(count, longest, 0.24 * longest)
    fill = sum(lengths) / (count * longest)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        sizes = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2000}
        config = LlamaConfig(hidden_size=128, intermediate_size=352, max_position_embeddings=2048, **sizes)
        LlamaForCausalLM(config).save_pretrained(folder)
        (folder / "data.jsonl").touch()
        (folder / "recipe.yaml").write_text(
            f"algorithm: sft\ncluster: {{device: cpu}}\nmodel: {{path: {folder}, dtype: fp32}}\n"
            f"data: {{path: {folder / 'data.jsonl'}, max_prompt_length: 32}}\noptimizer: {{lr: 0.0}}\n"
            f"train: {{train_global_batch_size: {count}, train_mb_tokens: {8 * longest}}}\n"
        )
        cfg = load([str(folder / "recipe.yaml")])
        mesh = build_mesh(cfg)
        engine = Engine(cfg, mesh, read_spec(folder), temperature=1.0, total_updates=1000)
        generator = torch.Generator().manual_seed(1)
        packed, padded = [], []
        for i, n in enumerate(lengths):
            tokens = torch.randint(0, 2000, (n + 1,), generator=generator).tolist()
            packed.append(Sample(f"{i}", 0, tokens, 1))
            mask = torch.arange(longest) < n
            padded.append(Sample(f"{i}", 0, tokens + [0] * (longest - n), 1, loss_mask=mask))
        seconds: dict[str, list[float]] = {"packed": [], "padded": []}
        norms = {}
        for _ in range(repeats + 1):
            for way, samples in (("packed", packed), ("padded", padded)):
                start = time.perf_counter()
                norms[way] = engine.step(samples, sft)["grad_norm"]
                seconds[way].append(time.perf_counter() - start)
        mesh.close()
    best = {way: min(times[1:]) for way, times in seconds.items()}
    median = {way: statistics.median(times[1:]) for way, times in seconds.items()}
    print(f"{count} sequences, {sum(lengths)} tokens, the longest {longest}: padded batches are {fill:.2f} full")
    for way in best:
        print(
            f"  {way}: {sum(lengths) / best[way]:,.0f} useful tokens/s (median {sum(lengths) / median[way]:,.0f})",
            end="",
        )
        print(f", gradient's norm {norms[way]:.6f}")
    print(
        f"  packed / padded: {best['padded'] / best['packed']:.2f}, by medians "
        f"{median['padded'] / median['packed']:.2f}; the bound is 1 / fill = {1 / fill:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--plan-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    plan(arguments.repeats)
    if not arguments.plan_only:
        train(arguments.repeats)


if __name__ == "__main__":
    main()
