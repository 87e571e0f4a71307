"""A push to a vLLM server, a process of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.distributed import remote_cases, tiny_models

STARTS_WITHIN_S = 240


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A server of a tiny model, by its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    model = tiny_models.qwen2(tmp_path / "served", seed=0)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--skip-tokenizer-init", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "64", "--max-num-seqs", "8", "--logprobs-mode", "processed_logprobs"]
    command += ["--enable-scale-out", "--disable-uvicorn-access-log"]
    command += ["--worker-extension-cls", "megarl.rollout.receiver.Receiver"]
    command += ["--weight-transfer-config", '{"backend": "megarl"}']
    settings = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0"}
    settings |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "VLLM_NO_USAGE_STATS": "1"}
    log = tmp_path / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=os.environ | settings, stdout=file, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_it_answers(url, process, log)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def _wait_until_it_answers(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + STARTS_WITHIN_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-5000:]
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"no answer within {STARTS_WITHIN_S} s: {log.read_text()[-5000:]}")


def generate(url: str, prompt: list[int]) -> tuple[list[int], list[float]]:
    body = {"token_ids": prompt, "sampling_params": {"max_tokens": 12, "temperature": 1.0, "logprobs": 0}}
    body["sampling_params"]["detokenize"] = False
    request = urllib.request.Request(
        f"{url}/inference/v1/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        (choice,) = json.loads(answer.read())["choices"]
    return choice["token_ids"], [entry["logprob"] for entry in choice["logprobs"]["content"]]


@pytest.mark.timeout(600)
def test_a_server_gets_the_trainers_weights(server: str, ranks, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    new = tiny_models.qwen2(tmp_path / "new", seed=1)
    data, recipe = tmp_path / "data.jsonl", tmp_path / "recipe.yaml"
    data.touch()
    recipe.write_text(
        "algorithm: sft\ncluster: {device: cpu}\nmodel: {dtype: fp32}\n"
        f"data: {{path: {data}, max_prompt_length: 32}}\nrollout: {{max_response_length: 32}}\n"
        "train: {train_global_batch_size: 4}\n"
    )
    model = AutoModelForCausalLM.from_pretrained(new, dtype=torch.float32)
    prompt = [5, 6, 7, 9]

    def error() -> float:
        tokens, logps = generate(server, prompt)
        return (tiny_models.reference_logps(model, prompt, tokens) - torch.tensor(logps)).abs().max().item()

    assert error() > 0.1  # it still has other weights
    overrides = ["cluster.gpus_per_node=2", "parallel.pipeline_model_parallel_size=2"]
    ranks.run(remote_cases.pushed, 2, recipe=str(recipe), model=str(new), overrides=overrides, urls=[server])
    assert error() < 1e-5
