"""What each memory lever saves, measured on a small model, and what it costs.

    python tools/bench/memory.py [--layers 4] [--hidden 256] [--tokens 2048] [--repeats 2]

Two CPU ranks hold a random bf16 Llama by data parallelism, with the optimizer divided over them. For every lever, each
in an engine of its own: bytes of weights, gradients and optimizer on the device between the engine's verbs, by the
sizes of their storages; bytes that the layers keep of a microbatch for backward (`megarl.observe.activations`); and the
best time of an update. The weights after it are compared with those of a run without levers, bit for bit.
"""

from __future__ import annotations

import argparse
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from megarl.config import load
from megarl.data.records import Sample
from megarl.losses.sft import sft
from megarl.model.engine import Engine
from megarl.model.family import read_spec
from megarl.observe.activations import kept_by_decoder
from megarl.parallel.mesh import build_mesh

SELECTIVE = "model.recompute_granularity=selective"
FULL = ["model.recompute_granularity=full", "model.recompute_method=uniform"]
LEVERS = {
    "none": [],
    "offload.params": ["offload.params=true"],
    "offload.grads": ["offload.grads=true"],
    "offload.optimizer": ["offload.optimizer=true"],
    "all three": ["offload.params=true", "offload.grads=true", "offload.optimizer=true"],
    "optimizer_cpu_offload": ["optimizer.optimizer_cpu_offload=true"],
    "recompute core_attn": [SELECTIVE, "model.recompute_modules=[core_attn]"],
    "recompute mlp": [SELECTIVE, "model.recompute_modules=[mlp]"],
    "recompute full, every layer": [*FULL, "model.recompute_num_layers=1"],
    "recompute full, two at a time": [*FULL, "model.recompute_num_layers=2"],
}


def make_model(folder: Path, layers: int, hidden: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        vocab_size=8192,
        max_position_embeddings=4096,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    (folder / "data.jsonl").touch()
    (folder / "recipe.yaml").write_text(
        "algorithm: sft\ncluster: {device: cpu, gpus_per_node: 2}\nmodel: {dtype: bf16}\n"
        f"data: {{path: {folder / 'data.jsonl'}, max_prompt_length: 32}}\n"
        "train: {train_global_batch_size: 4}\n"
    )


def measure(folder: Path, overrides: list[str], tokens: int, repeats: int, mesh: Any) -> dict[str, Any]:
    cfg = load([str(folder / "recipe.yaml"), f"model.path={folder}", f"train.train_mb_tokens={tokens}", *overrides])
    engine = Engine(cfg, mesh, read_spec(folder), temperature=1.0, total_updates=repeats)
    generator = torch.Generator().manual_seed(mesh.rank)
    lengths = [tokens // 8] * 8
    samples = [
        Sample(f"{i}", 0, torch.randint(0, 8192, (n + 1,), generator=generator).tolist(), n // 2)
        for i, n in enumerate(lengths)
    ]
    kept = kept_by_decoder(engine.model)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        engine.step(samples, sft)
        seconds.append(time.perf_counter() - start)
    between = engine.residency.bytes_on_device()
    with engine.residency.on_device("params"):
        bits = [hash(p.detach().clone().view(torch.int16).numpy().tobytes()) for p in engine.model.parameters()]
    return {"between": between, "kept": max(kept), "seconds": min(seconds), "bits": bits}


def rank_main(rank: int, port: int, folder: str, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    path = Path(folder)
    mesh = build_mesh(load([str(path / "recipe.yaml"), f"model.path={path}"]))
    plain: list[int] = []
    for name, lever in LEVERS.items():
        one = measure(path, lever, arguments.tokens, arguments.repeats, mesh)
        plain = plain or one["bits"]
        if rank == 0:
            between = [one["between"][part] / 2**20 for part in ("params", "grads", "optimizer")]
            sizes = "".join(f"{size:8.1f}" for size in [*between, one["kept"] / 2**20])
            same = "the same bits" if one["bits"] == plain else "DIFFERENT"
            print(f"{name:32} {sizes}{one['seconds']:10.2f}  {same}", flush=True)
    mesh.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=2048, help="of a rank in a microbatch")
    parser.add_argument("--repeats", type=int, default=2, help="updates of each engine")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), arguments.layers, arguments.hidden)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        print(
            f"{arguments.layers} layers of {arguments.hidden}, {arguments.tokens} tokens a rank; MiB on rank 0 of two"
        )
        print(f"{'lever':32}{'weights':>9}{'grads':>8}{'optim.':>8}{'kept':>8}{'s/update':>10}  weights after")
        mp.spawn(rank_main, args=(port, folder, arguments), nprocs=2)


if __name__ == "__main__":
    main()
