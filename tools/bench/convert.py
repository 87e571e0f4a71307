"""Throughput of `megarl convert` beside copying the same files, and its peak memory.

    .venv/bin/python tools/bench/convert.py [--rounds 3] [--folder DIR]

The model is two layers of Llama-3-70B's shape (3.4 GB of bf16 random bits; a small vocabulary). A round is: copy the
source's files with one fsync each, convert, in both directions, each with the target's disk at rest before (sync) and
the target removed after. Copying and converting take turns, so that what else the machine does meets both. Timed is the
work, not Python's start; the source is in the page cache for both. The ratio is copy seconds / convert seconds. Memory
is the converting process's RssAnon, sampled every 10 ms from /proc: what it cannot give back, mapped files aside.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from megarl.model.family import read_spec

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 2,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
}
# Bytes of the weights in bf16.
WHOLE = {"Llama-3-70B": 141.1e9, "DeepSeek-V3 (671B)": 1342e9}
CHILD = """
import json, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from megarl.convert.hf2mcore import ToMegatron, convert_to_megatron
from megarl.convert.mcore2hf import ToHF, convert_to_hf
direction, source, target, workers = sys.argv[1:]
start = time.perf_counter()
if direction == "hf2mcore":
    convert_to_megatron(ToMegatron(Path(source), Path(target)), workers=int(workers))
else:
    convert_to_hf(ToHF(Path(source), Path(target)), workers=int(workers))
print(json.dumps(time.perf_counter() - start))
"""


def make_model(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for tensor in read_spec(path).tensors():
        for name, shape in tensor.hf_shapes().items():
            if name not in tensors:
                words = torch.empty(torch.Size(shape).numel() // 4, dtype=torch.int64)
                tensors[name] = words.random_(generator=generator).view(torch.bfloat16).view(shape)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    os.sync()


def weights(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.suffix in (".safetensors", ".distcp"))


def copy(source: Path, target: Path) -> float:
    """Seconds to copy the files that hold weights, each on disk before the next."""
    target.mkdir()
    os.sync()
    start = time.perf_counter()
    for file in weights(source):
        shutil.copyfile(file, target / file.name)
        descriptor = os.open(target / file.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def convert(direction: str, source: Path, target: Path, workers: int) -> tuple[float, int]:
    """Seconds, and peak RssAnon in bytes (of the largest process)."""
    os.sync()
    command = [sys.executable, "-c", CHILD, direction, str(source), str(target), str(workers)]
    root = str(Path(__file__).parents[2])
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": root}
    )
    peak = 0
    while child.poll() is None:
        peak = max(peak, anonymous(child.pid))
        time.sleep(0.01)
    answer = child.stdout.read() if child.stdout else b""
    if child.returncode:
        sys.exit(f"{direction} ended with code {child.returncode}")
    return float(answer), peak


def anonymous(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    for line in text.splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured (default: the temporary folder's)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        hf, megatron = folder / "hf", folder / "megatron"
        make_model(hf)
        convert("hf2mcore", hf, megatron, 1)
        size = sum(file.stat().st_size for file in weights(hf))
        print(f"{size / 1e9:.2f} GB, {args.workers} worker(s)")
        for direction, source in (("hf2mcore", hf), ("mcore2hf", megatron)):
            pairs, peak = [], 0
            for k in range(args.rounds):
                copied = copy(source, folder / "copy")
                seconds, anon = convert(direction, source, folder / "out", args.workers)
                shutil.rmtree(folder / "out")
                pairs.append((copied, seconds))
                peak = max(peak, anon)
                print(f"  {direction} {k}: copy {copied:.2f} s, convert {seconds:.2f} s, ratio {copied / seconds:.2f}")
            middle = statistics.median(seconds for _, seconds in pairs)
            ratio = statistics.median(copied / seconds for copied, seconds in pairs)
            print(f"{direction}: {size / middle / 1e9:.2f} GB/s, ratio {ratio:.2f}, peak anonymous {peak / 1e6:.0f} MB")
            for model, nbytes in WHOLE.items():
                print(f"  extrapolated: {model} in {nbytes / size * middle / 60:.0f} min")


if __name__ == "__main__":
    main()
