"""What an asynchronous save costs: the time training waits for it against memcpy, and all of it against write + fsync.

    python tools/bench/checkpoint.py [--megabytes 400] [--rounds 5] [--folder /path/on/the/disk/to/measure]

One process, a Llama of the size that makes a checkpoint of about so many megabytes (fp32 weights and Adam's moments).
Saves and the two plain operations alternate in one run, over the same bytes in the same folder. The first save, which
makes the plan and the host buffer, is given apart. The total ends with the checkpoint under its name, published. Prints
medians and one JSON line; exits with 1 where a ratio is above its limit (1.5 for blocking, 1.15 for the total).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megarl.checkpoint import folder as disk
from megarl.checkpoint.state import sharded_state
from megarl.checkpoint.writer import DistWriter
from megarl.config import load
from megarl.model.engine import Engine
from megarl.model.family import read_spec
from megarl.parallel.mesh import build_mesh

LIMITS = {"blocking / memcpy": 1.5, "total / raw write + fsync": 1.15}
VOCABULARY, HIDDEN, LAYERS = 8192, 1024, 8


def model_of(folder: Path, megabytes: int) -> Path:
    """A random Llama whose parameters, as fp32 with two moments, are about so many megabytes."""
    parameters = megabytes * (1 << 20) / 12
    width = int((parameters - 2 * VOCABULARY * HIDDEN) / LAYERS / HIDDEN - 3 * HIDDEN) // 3 // 64 * 64
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=max(width, 64),
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def seconds(work, *args):
    """(seconds it took, what it returned)"""
    began = time.perf_counter()
    out = work(*args)
    return time.perf_counter() - began, out


def raw_write(path: Path, data: memoryview) -> None:
    with path.open("wb", buffering=0) as file:
        left = data
        while len(left):
            left = left[file.write(left) :]
        os.fsync(file.fileno())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        root = Path(scratch)
        model = model_of(root / "model", args.megabytes)
        recipe = root / "recipe.yaml"
        recipe.write_text("algorithm: sft\nmodel: {dtype: fp32}\ncluster: {device: cpu}\ndata: {path: none}\n")
        cfg = load([str(recipe), f"model.path={model}"], check_model=False)
        mesh = build_mesh(cfg)
        engine = Engine(cfg, mesh, read_spec(model), temperature=1.0, total_updates=1)
        writer = DistWriter(mesh.groups.dp_cp)
        source = torch.cat([p.detach().view(-1) for p in engine.model.parameters()]).repeat(
            3
        )  # as many bytes as a save
        target = torch.empty_like(source)
        target.copy_(source)
        times: dict[str, list[float]] = {name: [] for name in ("blocking", "memcpy", "total", "raw write + fsync")}

        def stage(folder):
            with mesh.platform():
                return writer.stage(sharded_state(engine), folder)

        for number in range(args.rounds + 1):
            folder = disk.begin(root, number)
            blocking, share = seconds(stage, folder)
            writing, (results, entries) = seconds(DistWriter.write, share)
            finishing, more = seconds(DistWriter.finish, share, [results])
            written = sum(entry.bytes for entry in entries.values())
            length, layout = {"max_num_steps": None, "max_num_epochs": 1}, {"world": 1}
            manifest = disk.Manifest(number, args.rounds, length, layout, None, ["model", "optimizer"], entries | more)
            publishing, published = seconds(disk.publish, folder, manifest)
            shutil.rmtree(published)
            if number == 0:
                first = blocking
                continue
            times["blocking"].append(blocking)
            times["memcpy"].append(seconds(target.copy_, source)[0])
            times["total"].append(blocking + writing + finishing + publishing)
            raw = memoryview(target.view(torch.uint8).numpy())
            times["raw write + fsync"].append(seconds(raw_write, root / "raw", raw)[0])
            (root / "raw").unlink()
        medians = {name: statistics.median(values) for name, values in times.items()}
        print(f"{written / 1e6:.0f} MB written, {source.nbytes / 1e6:.0f} MB copied, first save blocked {first:.3f} s")
        for name, value in medians.items():
            print(f"{name:20s} {value:.3f} s   of {', '.join(f'{each:.3f}' for each in times[name])}")
        ratios = {
            "blocking / memcpy": medians["blocking"] / medians["memcpy"],
            "total / raw write + fsync": medians["total"] / medians["raw write + fsync"],
        }
        print(json.dumps({name: round(value, 2) for name, value in ratios.items()}))
        mesh.close()
    return int(any(ratios[name] > limit for name, limit in LIMITS.items()))


if __name__ == "__main__":
    sys.exit(main())
