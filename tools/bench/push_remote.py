"""What a push to a vLLM server costs: seconds a MB, and how long the server does not generate.

    python tools/bench/push_remote.py [--layers 4] [--repeats 5] [--bucket-mb 16]

One rank pushes a random Llama (bf16, 385 MB by default) to a server that it starts, over the loopback. The server is
paused from the first call of a push to its last, so that this is also how long it generates nothing. In turns with it,
the trainer reads the same stream and copies every tensor: what sending cannot be faster than.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from megarl.config import load
from megarl.model.build import build_model
from megarl.model.family import read_spec
from megarl.parallel.mesh import build_mesh
from megarl.rollout.auth import token_of
from megarl.rollout.remote import RemoteEngines, Sender, to_sender
from megarl.rollout.serve import discover, engines_folder
from megarl.weights.stream import WeightStream
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bucket-mb", type=int, default=16)
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="push-remote-"))
    recipe = make(root, args.layers)
    cfg = load([str(recipe)])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    server = subprocess.Popen([sys.executable, "-m", "megarl", "serve", str(recipe)], env=environment)
    try:
        url = wait_for_a_server(engines_folder(cfg), server)
        mesh = build_mesh(cfg)
        spec = read_spec(cfg.model.path)
        model = build_model(cfg, spec, mesh, temperature=1.0)
        stream = WeightStream(model, spec, mesh, args.bucket_mb << 20, to_sender(mesh))
        megabytes = sum(t.numel() * t.itemsize for _, t in stream) / 2**20
        token = token_of(engines_folder(cfg))

        def sender() -> Sender:
            return Sender(lambda: [url], stream.metadata, args.bucket_mb << 20, mesh.device, token=token, timeout_s=100)

        engines = RemoteEngines(mesh, sender)
        push(stream, engines)  # the first one also meets
        pushes, copies = [], []
        for version in range(1, args.repeats + 1):
            engines.announce(version)
            began = time.perf_counter()
            push(stream, engines)
            pushes.append(time.perf_counter() - began)
            began = time.perf_counter()
            for _, tensor in stream:
                tensor.clone()
            copies.append(time.perf_counter() - began)
        took, copy = statistics.median(pushes), statistics.median(copies)
        print(json.dumps({"MB": round(megabytes), "layers": args.layers, "bucket_mb": args.bucket_mb}))
        print(f"push (and pause) {took:.2f} s = {took / megabytes * 1e3:.2f} ms/MB")
        print(f"reading the stream and copying it: {copy / megabytes * 1e3:.2f} ms/MB")
        engines.close()
    finally:
        server.terminate()
        server.wait(60)


if __name__ == "__main__":
    main()
