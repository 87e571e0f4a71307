"""What a push to a vLLM server costs: seconds a MB, and how long the server does not generate.

    python tools/bench/push_remote.py [--stages 1] [--layers 4] [--repeats 5] [--bucket-mb 16]

The ranks of a pipeline push a random Llama (bf16, 385 MB by default) to a server that is started for this, over the
loopback. The server is paused from the first call of a push to its last, so that this is also how long it generates
nothing. In turns with that: rank 0 as the only sender, to which all other stages' weights go first (the same, with one
stage), and reading the stream and copying every tensor, which is what sending cannot be faster than.
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megarl.config import Config, load
from megarl.model.build import build_model
from megarl.model.family import read_spec
from megarl.parallel.mesh import Mesh, build_mesh
from megarl.rollout.auth import token_of
from megarl.rollout.remote import RemoteEngines, Sender, Senders, to_senders
from megarl.rollout.serve import discover, engines_folder
from megarl.weights.plan import EVERYTHING, Holders, Item, Needs
from megarl.weights.stream import Deal, WeightStream
from megarl.weights.sync import push

RECIPE = """
cluster: {{device: cpu}}
run: {{root: {root}, name: push}}
model: {{path: {root}/model, dtype: bf16}}
data: {{path: {root}/data.jsonl, max_prompt_length: 32}}
rollout: {{mode: remote, max_response_length: 480, max_num_seqs: 8, kv_cache_gb: 0.5}}
train: {{train_mb_tokens: 512, logprob_mb_tokens: 512}}
"""


def make(root: Path, layers: int) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=32000,
        max_position_embeddings=1024,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(root / "model")
    (root / "data.jsonl").touch()
    (root / "recipe.yaml").write_text(RECIPE.format(root=root))
    return root / "recipe.yaml"


def wait_for_a_server(folder: Path, process: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + 300
    while not discover(folder):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"no server came up; see {folder}")
        time.sleep(0.2)
    return discover(folder)[0]


def to_one(mesh: Mesh) -> Deal:
    """Everything to rank 0."""

    def deal(items: list[Item], holders: Holders) -> tuple[list[Item], Needs]:
        return items, lambda position, tensor, name: EVERYTHING if mesh.replica_ranks[position] == 0 else None

    return deal


def timed_push(cfg: Config, mesh: Mesh, stream: WeightStream, url: str, bucket_bytes: int) -> float:
    """Seconds of the second of two pushes: in the first one, the ends also meet."""
    senders = Senders.of_stream(stream)
    settings = {"senders": senders, "rank": mesh.rank, "token": token_of(engines_folder(cfg)), "timeout_s": 100}
    make = partial(Sender, lambda: [url], stream.metadata, bucket_bytes, mesh.device, **settings)
    engines = RemoteEngines(mesh, make, senders.ranks)
    push(stream, engines)
    engines.announce(1)
    dist.barrier(group=mesh.host_group)
    began = time.perf_counter()
    push(stream, engines)
    took = time.perf_counter() - began
    engines.close()
    return took


def rank_main(rank: int, port: int, recipe: str, url: str, args: argparse.Namespace) -> None:
    """A rank of the pipeline; the first one prints."""
    meet = {"WORLD_SIZE": str(args.stages), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(meet | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    layout = [f"cluster.gpus_per_node={args.stages}", f"parallel.pipeline_model_parallel_size={args.stages}"]
    cfg = load([recipe, *layout])
    mesh, spec, bucket_bytes = build_mesh(cfg), read_spec(cfg.model.path), args.bucket_mb << 20
    model = build_model(cfg, spec, mesh, temperature=1.0)
    streams = {deal: WeightStream(model, spec, mesh, bucket_bytes, deal(mesh)) for deal in (to_senders, to_one)}
    seconds: dict[str, list[float]] = {"to_senders": [], "to_one": [], "copy": []}
    for _ in range(args.repeats):
        for deal, stream in streams.items():
            seconds[deal.__name__].append(timed_push(cfg, mesh, stream, url, bucket_bytes))
        began = time.perf_counter()
        for _, tensor in streams[to_one]:
            tensor.clone()
        seconds["copy"].append(time.perf_counter() - began)
    megabytes = sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in streams[to_one].metadata) / 2**20
    if rank == 0:
        print(f"{megabytes:.0f} MB, {args.stages} stages, buckets of {args.bucket_mb} MB; medians of {args.repeats}")
        for name, words in (
            ("to_senders", "push (and pause), a sender a stage"),
            ("to_one", "push (and pause), rank 0 sends"),
            ("copy", "reading the stream and copying it"),
        ):
            took = statistics.median(seconds[name])
            print(f"{words:36} {took:.2f} s = {took / megabytes * 1e3:.2f} ms/MB", flush=True)
    mesh.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bucket-mb", type=int, default=16)
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="push-remote-"))
    recipe = make(root, args.layers)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    server = subprocess.Popen([sys.executable, "-m", "megarl", "serve", str(recipe)], env=environment)
    try:
        url = wait_for_a_server(engines_folder(load([str(recipe)])), server)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        torch.multiprocessing.spawn(rank_main, (port, str(recipe), url, args), args.stages)
    finally:
        server.terminate()
        server.wait(60)


if __name__ == "__main__":
    main()
