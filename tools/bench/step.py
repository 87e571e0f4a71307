"""A training step of a dense model on one GPU: seconds, TFLOP/s, MFU, and peak memory against `megarl plan`.

    python tools/bench/step.py [--billions 1 3] [--lengths 4096 32768] [--mb-tokens 16384] [--fp8 blockwise]

A random Llama of that size in bf16 learns packed sequences of one length; two warm-up updates, then the best and the
median of the rest. FLOPs are the model's (`megarl.model.flops`: recomputation is not counted). The peak is that of the
card (989 TFLOP/s of an H100 or H200) and, beside it, the 790 that matrix multiplications reach in practice. Memory is
`torch.cuda.max_memory_allocated` over the updates, against the planner's terms without its allowance for contexts.
Needs CUDA; with Transformer Engine its layers are used, without it megatron's local ones with megarl's attention.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from megarl.config import load
from megarl.data.records import Sample
from megarl.losses.sft import sft
from megarl.model.engine import Engine
from megarl.model.family import read_spec
from megarl.observe.throughput import mfu
from megarl.parallel.mesh import Mesh, build_mesh
from megarl.plan import RESIDUE, plan, total_parameters

REACHED = 790.0  # TFLOP/s of bf16 matrix products of 8192 x 8192 random numbers on an H200
SIZES = {  # layers, hidden, heads, key/value heads, MLP columns
    1: (16, 2048, 32, 8, 8192),
    3: (28, 3072, 24, 8, 8192),
    4: (36, 3072, 24, 8, 9216),
}


def make_model(folder: Path, billions: int, longest: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, hidden, heads, groups, columns = SIZES[billions]
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        intermediate_size=columns,
        vocab_size=128256,
        max_position_embeddings=longest,
        tie_word_embeddings=billions == 1,
    )
    with torch.device("cuda"):
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    torch.cuda.empty_cache()
    (folder / "data.jsonl").touch()


def measure(folder: Path, mesh: Mesh, length: int, arguments: argparse.Namespace) -> dict[str, float]:
    settings = [f"model.path={folder}", f"data.path={folder / 'data.jsonl'}", "algorithm=sft"]
    settings += ["train.train_global_batch_size=8", f"train.train_mb_tokens={max(length, arguments.mb_tokens)}"]
    settings += [f"data.max_prompt_length={length // 2}", *arguments.overrides]
    if arguments.fp8:
        settings += ["fp8_cfg.enabled=true", f"fp8_cfg.fp8_recipe={arguments.fp8}"]
    cfg = load([str(folder / "recipe.yaml"), *settings])
    spec = read_spec(folder)
    engine = Engine(cfg, mesh, spec, temperature=1.0, total_updates=100)
    count = max(1, 4 * arguments.mb_tokens // length)
    samples = [Sample(f"{i}", 0, torch.randint(0, 128256, (length + 1,)).tolist(), 1) for i in range(count)]
    seconds = []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(arguments.repeats + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        engine.step(samples, sft)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    flops = engine.flops.train([length] * count)
    best = min(seconds[2:])
    return {
        "parameters": total_parameters(spec),
        "seconds": best,
        "median": statistics.median(seconds[2:]),
        "tokens_per_s": count * length / best,
        "tflops": flops / best / 1e12,
        "mfu": mfu(flops, best, torch.cuda.get_device_name()) or float("nan"),
        "of_reached": flops / best / 1e12 / REACHED,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "planned_gb": (plan(cfg, spec).training - RESIDUE) / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--billions", type=int, nargs="+", default=[1, 3], choices=SIZES)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--mb-tokens", type=int, default=16384)
    parser.add_argument("--fp8", choices=("tensorwise", "blockwise", "delayed", "mxfp8"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("overrides", nargs="*", help="settings, such as model.recompute_granularity=full")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tools/bench/step.py needs a CUDA device")
    print(torch.cuda.get_device_name(), "FP8 " + arguments.fp8 if arguments.fp8 else "bf16")
    mesh = None
    for billions in arguments.billions:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_model(folder, billions, max(arguments.lengths))
            (folder / "recipe.yaml").write_text("cluster: {device: cuda}\n")
            own = [f"model.path={folder}", f"data.path={folder / 'data.jsonl'}"]
            mesh = mesh or build_mesh(load([str(folder / "recipe.yaml"), *own, "algorithm=sft"]))
            for length in arguments.lengths:
                found = measure(folder, mesh, length, arguments)
                print(json.dumps({"billions": billions, "length": length} | {k: round(v, 4) for k, v in found.items()}))
                torch.cuda.empty_cache()
    if mesh:
        mesh.close()


if __name__ == "__main__":
    main()
