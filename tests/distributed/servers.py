"""vLLM servers for tests: started, asked for tokens, stopped."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from megarl.config import load
from megarl.model.family import read_spec
from megarl.parallel.ports import free_port
from megarl.rollout.serve import discover, engines_folder
from megarl.rollout.vllm_config import model_arguments

STARTS_WITHIN_S = 600  # seconds, where others compute as well
ON_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0"}


@contextlib.contextmanager
def serving(model: Path, log: Path, *, dtype: str = "float32", gpu: int | None = None) -> Iterator[str]:
    """A server of a tiny model that takes pushes, by its address; on CPU if no ``gpu`` is given."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--skip-tokenizer-init", "--dtype", dtype, "--enforce-eager"]
    command += ["--max-model-len", "64", "--max-num-seqs", "8", "--logprobs-mode", "processed_logprobs"]
    command += ["--enable-scale-out", "--disable-uvicorn-access-log"]
    command += ["--worker-extension-cls", "megarl.rollout.receiver.Receiver"]
    command += ["--weight-transfer-config", '{"backend": "megarl"}']
    for name, value in model_arguments(read_spec(model), on_cpu=gpu is None).items():
        command += [f"--{name.replace('_', '-')}", json.dumps(value)]
    settings = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
    settings |= {"PYTHONPATH": os.pathsep.join(sys.path)}
    settings |= ON_CPU if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)}
    with log.open("w") as file:
        process = subprocess.Popen(command, env=os.environ | settings, stdout=file, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_it_answers(url, process, log)
        yield url
    finally:
        process.terminate()
        process.wait(60)


@contextlib.contextmanager
def served(recipe: Path, *overrides: str, count: int = 1) -> Iterator[list[dict]]:
    """Servers of a recipe's, by `megarl serve`: what their files in the run's folder say."""
    settings = [*overrides, f"rollout.num_engines={count}"]
    folder = engines_folder(load([str(recipe), *settings]))
    command = [sys.executable, "-m", "megarl", "serve", str(recipe), *settings]
    serve = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    try:
        deadline = time.monotonic() + STARTS_WITHIN_S
        while len(discover(folder)) < count:
            assert serve.poll() is None and time.monotonic() < deadline, list(folder.glob("*.log"))
            time.sleep(0.5)
        yield [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    finally:
        serve.terminate()
        serve.wait(60)


def generate(url: str, prompt: list[int], *, temperature: float, token: str = "") -> tuple[list[int], list[float]]:
    """A response of twelve tokens, and their log-probs."""
    body = {"token_ids": prompt, "sampling_params": {"max_tokens": 12, "temperature": temperature, "logprobs": 0}}
    body["sampling_params"]["detokenize"] = False
    request = urllib.request.Request(
        f"{url}/inference/v1/generate",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {token}"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        (choice,) = json.loads(answer.read())["choices"]
    return choice["token_ids"], [entry["logprob"] for entry in choice["logprobs"]["content"]]


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
