"""Speed and memory of a push of weights on this machine's CPUs, against copying the same bytes.

    python tools/bench/push.py [--layers 6] [--bucket-mb 64] [--repeats 5] [--vllm]

Two ranks hold a random Llama of about 1 GB (bf16) by TP2 or PP2; each then gets what its part of vLLM keeps, at TP1 the
whole model, at TP2 half of it. Copies and pushes take turns; both ranks work at the same time in both. Printed for each
rank's bytes per second:

- copy: a copy from memory to memory that is already there;
- stream: the exchange, with every tensor written into memory that is already there;
- vllm (with --vllm): the push into a vLLM engine, and vLLM's own load of the same tensors out of memory.

Extra memory is how far the process's peak (VmHWM) rises over what it held before (VmRSS, after the allocator gave back
what was free): of the stream, whose tensors are dropped as vLLM would; of the push; and of vLLM's own load, which takes
new memory for a module, and to pack it for its kernels, before it copies it over the old one. What a push adds to that
is megarl's part.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megarl.config import RolloutConfig, load
from megarl.model.build import build_model
from megarl.model.family import read_spec
from megarl.parallel.mesh import build_mesh
from megarl.rollout.vllm_layout import kept_by
from megarl.weights.boxed import Boxed
from megarl.weights.stream import WeightStream
from megarl.weights.sync import push, to_engines

CASES = {"TP2 to TP1": (2, 1, 1), "PP2 to TP2": (1, 2, 2)}  # trainer's TP and PP, vLLM's TP


def model_folder(folder: Path, layers: int) -> Path:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "data.jsonl").touch()
    (folder / "recipe.yaml").write_text(
        "algorithm: sft\ncluster: {device: cpu, gpus_per_node: 2}\nmodel: {dtype: bf16}\n"
        f"data: {{path: {folder / 'data.jsonl'}, max_prompt_length: 32}}\nrollout: {{max_response_length: 32}}\n"
        "train: {train_global_batch_size: 4}\n"
    )
    return folder


def memory(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))


def extra_memory(work: Callable[[], object]) -> int:
    """Bytes by which this rank's memory rises while all ranks do this. A first round maps and allocates what stays."""
    work()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    dist.barrier()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    work()
    return memory("VmHWM") - before


def timed(work: Callable[[], object]) -> float:
    dist.barrier()
    start = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - start


def measure(rank: int, port: int, folder: Path, case: str, arguments: argparse.Namespace) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    tp, pp, vllm_tp = CASES[case]
    layout = [f"parallel.tensor_model_parallel_size={tp}", f"parallel.pipeline_model_parallel_size={pp}"]
    cfg = load([str(folder / "recipe.yaml"), f"model.path={folder}", *layout])
    mesh, spec = build_mesh(cfg), read_spec(folder)
    with mesh.platform():
        model = build_model(cfg, spec, mesh, temperature=1.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.05, 0.05)
    stream = WeightStream(model, spec, mesh, arguments.bucket_mb << 20, to_engines(spec, mesh, vllm_tp))
    there = {item.name: torch.zeros(item.shape, dtype=item.dtype) for item in stream.items}
    kept, nbytes = kept_by(spec, vllm_tp), 0
    boxes = {}
    for item in stream.items:
        box = kept(rank % vllm_tp, item.parts[0], item.name)
        rows, columns = slice(box.top, box.bottom), slice(box.left, box.right)
        boxes[item.name] = rows if len(item.shape) == 1 else (rows, columns)
        nbytes += there[item.name][boxes[item.name]].numel() * item.dtype.itemsize
    source = {name: torch.zeros(nbytes // len(boxes), dtype=torch.uint8) for name in boxes}
    target = {name: torch.zeros_like(tensor) for name, tensor in source.items()}

    def copy() -> None:
        for name, tensor in source.items():
            target[name].copy_(tensor)

    def receive() -> None:
        for _ in stream.tensors(there.__getitem__):
            pass

    def pass_by() -> None:
        for _ in stream:
            pass

    copy(), receive()
    extra = {"stream": extra_memory(pass_by)}
    turns = [(timed(copy), timed(receive)) for _ in range(arguments.repeats)]
    copies, streams = zip(*turns, strict=True)
    median = statistics.median(copies)
    if rank == 0:
        where = f"{case}, {nbytes / 1e9:.2f} GB a rank, buckets of {arguments.bucket_mb} MiB"
        print(f"{where}: copy {nbytes / median / 1e9:.2f} GB/s", flush=True)
    say(rank, nbytes, median, {"stream": statistics.median(streams)}, extra)
    if arguments.vllm:
        there.clear(), source.clear(), target.clear()
        say(rank, nbytes, median, *into_vllm(stream, folder, vllm_tp, arguments.repeats))
    mesh.close()


def say(rank: int, nbytes: int, copying: float, seconds: dict[str, float], extra: dict[str, int]) -> None:
    """Speeds, as parts of a copy's too, and memory, of rank 0."""
    for name, taken in seconds.items() if rank == 0 else ():
        speed = f"{nbytes / taken / 1e9:.2f} GB/s, {copying / taken:.2f} of a copy"
        print(f"  {name}: {speed}; extra memory {extra[name] / 2**20:.0f} MiB", flush=True)


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or what is there of it, in memory of its own."""
    if isinstance(tensor, Boxed):
        return Boxed(tensor.whole, tensor.shape, tensor.box.clone(), tensor.at)
    return tensor.clone()


def into_vllm(
    stream: WeightStream, folder: Path, vllm_tp: int, repeats: int
) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds and extra memory of a push into vLLM, and of vLLM's load of tensors that are there already."""
    from megarl.rollout.vllm_engine import VLLMEngine

    ready = {name: copied(tensor) for name, tensor in stream}
    if stream.mesh.rank == 0:
        from safetensors.torch import save_file

        zeros = {name: torch.zeros(shape, dtype=dtype) for name, shape, dtype in stream.metadata}
        save_file(zeros, folder / "model.safetensors")
        del zeros
    dist.barrier()
    rollout = RolloutConfig(tensor_parallel_size=vllm_tp, kv_cache_gb=0.1, max_num_seqs=4)
    engine = VLLMEngine(str(folder), rollout, dtype="bf16", device_type="cpu", max_model_len=64, seed=0)

    def load() -> None:
        engine.load_weights(iter(ready.items()))

    extra = {"vLLM's load alone": extra_memory(load), "push into vLLM": extra_memory(lambda: push(stream, engine))}
    turns = [(timed(load), timed(lambda: push(stream, engine))) for _ in range(repeats)]
    engine.close()
    loads, pushes = zip(*turns, strict=True)
    seconds = {"vLLM's load alone": statistics.median(loads), "push into vLLM": statistics.median(pushes)}
    return seconds, extra


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--bucket-mb", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--vllm", action="store_true")
    parser.add_argument("--case", choices=list(CASES))
    arguments = parser.parse_args()
    for number, case in enumerate(CASES if arguments.case is None else [arguments.case]):
        with tempfile.TemporaryDirectory() as folder:
            path = model_folder(Path(folder), arguments.layers)
            mp.spawn(measure, args=(29600 + os.getpid() % 300 + number, path, case, arguments), nprocs=2)


if __name__ == "__main__":
    main()
