"""Context parallelism of a fixed size against one that follows each sequence's length: useful tokens a second.

    torchrun --nproc-per-node 2 tools/bench/context.py [--repeats 5]

One SFT update on 64 long-tailed lengths, by the same model on the same ranks, which are one context-parallel group; the
two ways take turns, and have the same gradient's norm. On CPUs the exchange is a copy through the kernel: what is seen
there is mostly that short sequences need none, and are not cut into tiny pieces.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from packing import long_tailed

from megarl.config import load
from megarl.data.records import Sample
from megarl.losses.sft import sft
from megarl.model.engine import Engine
from megarl.model.family import read_spec
from megarl.parallel.mesh import build_mesh

LONGEST, COUNT = 2048, 64


def make_model(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2000}
    config = LlamaConfig(hidden_size=128, intermediate_size=352, max_position_embeddings=4096, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "data.jsonl").touch()
    (folder / "recipe.yaml").write_text("algorithm: sft\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    ranks = int(os.environ["WORLD_SIZE"])
    lengths = long_tailed(COUNT, LONGEST, 0.2 * LONGEST)
    with tempfile.TemporaryDirectory() as own:
        make_model(Path(own))  # the same on every rank
        settings = [
            f"{own}/recipe.yaml",
            "cluster.device=cpu",
            f"cluster.gpus_per_node={ranks}",
            f"model.path={own}",
            "model.dtype=fp32",
            f"data.path={own}/data.jsonl",
            "data.max_prompt_length=32",
            "optimizer.lr=0.0",
            f"parallel.context_parallel_size={ranks}",
            f"train.train_global_batch_size={COUNT}",
            f"train.train_mb_tokens={2 * LONGEST // ranks}",
        ]
        dynamic = load([*settings, "parallel.dynamic_context_parallel=true"])
        mesh = build_mesh(dynamic)
        ways = {"fixed": load(settings), "dynamic": dynamic}
        spec = read_spec(own)
        engines = {way: Engine(cfg, mesh, spec, temperature=1.0, total_updates=1000) for way, cfg in ways.items()}
        generator = torch.Generator().manual_seed(1)
        draw = [torch.randint(0, 2000, (n + 1,), generator=generator).tolist() for n in lengths]
        samples = [Sample(f"{i}", 0, tokens, 1) for i, tokens in enumerate(draw)]
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        norms = {}
        for _ in range(repeats + 1):
            for way, engine in engines.items():
                dist.barrier()
                start = time.perf_counter()
                norms[way] = engine.step(samples, sft)["grad_norm"]
                seconds[way].append(time.perf_counter() - start)
        if mesh.rank == 0:
            report(lengths, seconds, norms)
        mesh.close()


def report(lengths: list[int], seconds: dict[str, list[float]], norms: dict[str, float]) -> None:
    best = {way: min(times[1:]) for way, times in seconds.items()}
    median = {way: statistics.median(times[1:]) for way, times in seconds.items()}
    total = sum(lengths)
    print(f"{COUNT} sequences, {total} tokens, the longest {LONGEST}")
    for way in seconds:
        print(f"  {way}: {total / best[way]:,.0f} tokens/s (median {total / median[way]:,.0f})", end="")
        print(f", gradient's norm {norms[way]:.6f}")
    print(f"  dynamic / fixed: {best['fixed'] / best['dynamic']:.2f}, by medians", end=" ")
    print(f"{median['fixed'] / median['dynamic']:.2f}")


if __name__ == "__main__":
    main()
