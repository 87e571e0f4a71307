"""Cases that `RankPool` runs: pushes to vLLM servers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file

from megarl.config import load
from megarl.parallel.mesh import Mesh, build_mesh
from megarl.rollout.client import Client
from megarl.rollout.conversation import Completion, Sampling
from megarl.rollout.remote import RemoteEngines, Sender, Senders, to_senders
from megarl.rollout.stream import Loop
from megarl.weights.stream import WeightStream
from megarl.weights.sync import push
from tests.distributed.model_cases import engine_of


def pushed(recipe: str, model: str, overrides: list[str], urls: list[str]) -> None:
    """Push twice, the second time verified."""
    policy = engine_of(recipe, model, overrides)
    stream = policy.stream(1 << 16, to_senders(policy.mesh))
    engines = engines_of(policy.mesh, stream, urls, verify=True)
    push(stream, engines)
    push(stream, engines, verify=True)
    engines.close()


def sent(
    recipe: str, model: str, overrides: list[str], urls: list[str], token: str
) -> tuple[list[str], list[str], list[str]]:
    """Push to two servers, one of which dies in it, and again. Returns who had the weights after the first push and
    the second, and the tensors that this rank sends."""
    policy = engine_of(recipe, model, overrides)
    stream = policy.stream(1 << 16, to_senders(policy.mesh))
    engines, had = engines_of(policy.mesh, stream, urls, token, bucket_bytes=1), []
    for version in range(2):
        engines.announce(version)
        push(stream, engines)
        had.append(engines.urls)
    engines.close()
    return *had, [name for name, _ in stream]


def engines_of(
    mesh: Mesh,
    stream: WeightStream,
    urls: list[str],
    token: str | None = None,
    bucket_bytes: int = 1 << 15,
    **more: Any,
) -> RemoteEngines:
    senders = Senders.of_stream(stream)

    def sender() -> Sender:
        who = {"senders": senders, "rank": mesh.rank, "token": token, "timeout_s": 100}
        return Sender(lambda: urls, stream.metadata, bucket_bytes, mesh.device, **who, **more)

    return RemoteEngines(mesh, sender, senders.ranks)


class Killing:
    """A stream in the middle of whose first stage, which rank 0 sends, a process is killed, once."""

    def __init__(self, stream: WeightStream, victim: int) -> None:
        self.stream, self.victim, self.mesh = stream, victim, stream.mesh

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for k, pair in enumerate(self.stream):
            if k == len(self.stream.items) // 4 and self.victim and self.mesh.rank == 0:
                os.killpg(self.victim, signal.SIGKILL)
                self.victim = 0
            yield pair


def pushed_while_servers_die(
    recipe: str, model: str, overrides: list[str], urls: list[str], token: str, victims: list[int]
) -> list[list[str]]:
    """Push to all, then to those left once the first victim is dead, then while the second one dies. Returns who had
    the weights after each."""
    policy = engine_of(recipe, model, overrides)
    stream = policy.stream(1 << 16, to_senders(policy.mesh))
    engines, had = engines_of(policy.mesh, stream, urls, token), []
    for version, weights in enumerate([stream, stream, Killing(stream, victims[1])]):
        if version == 1 and policy.mesh.rank == 0:
            os.killpg(victims[0], signal.SIGKILL)
        engines.announce(version)
        push(weights, engines)  # type: ignore[arg-type]
        had.append(engines.urls)
    engines.close()
    return had


def generated(url: str, token: str) -> float:
    """How many tokens a server has generated, by its own count."""
    headers = {"Authorization": f"Bearer {token}"}
    with urllib.request.urlopen(urllib.request.Request(f"{url}/metrics", headers=headers), timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("vllm:generation_tokens_total"))


def in_flight(
    recipe: str, overrides: list[str], url: str, token: str, folders: list[str], prompts: list[list[int]], length: int
) -> dict[str, list[list[Completion]]]:
    """For every way of updating: requests that a push meets half-way, and the same prompts after it."""
    mesh = build_mesh(load([recipe, *overrides]))
    old, new = (load_file(f"{folder}/model.safetensors") for folder in folders)
    metadata = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in old.items()]
    loop, sampling, out = Loop("in-flight"), Sampling(n=1, max_tokens=length), {}
    for mode in ("recompute", "keep_kv", "wait"):
        sender = Sender(lambda: [url], metadata, 1 << 15, mesh.device, token=token, on_update=mode)  # type: ignore[arg-type]
        engines = RemoteEngines(mesh, partial(_same, sender))
        client = loop.call(partial(Client, token=token, salted=mode == "keep_kv"))

        def give(weights: dict[str, torch.Tensor], version: int, engines=engines, client=client) -> None:
            loop.call(client.hold)
            engines.announce(version)
            engines.wake_weights()
            engines.load_weights(weights.items())
            engines.wake_kv_cache()
            loop.call(client.use, engines.urls, version)

        def ask(client=client) -> list[Future[Completion]]:
            return [loop.run(client.generate(prompt, length, sampling)) for prompt in prompts]

        give(old, 0)
        before = generated(url, token)
        running = ask()
        while generated(url, token) < before + len(prompts) * length / 8:
            time.sleep(0.01)
        give(new, 1)
        met = [request.result(120) for request in running]
        out[mode] = [met, [request.result(120) for request in ask()]]
        loop.run(client.close()).result()
        engines.close()
    loop.close()
    return out


def one_stands_still(
    recipe: str,
    overrides: list[str],
    urls: list[str],
    token: str,
    victim: int,
    requests: int,
    at_a_time: int,
    length: int,
) -> dict[str, Any]:
    """Requests to two servers, of which one is stopped as soon as both have their share, and let go on when the other
    has no more to do. Returns how many were answered meanwhile, how many tokens each got, how many were lost."""
    cfg = load([recipe, *overrides])
    mesh, policy = build_mesh(cfg), load_file(f"{cfg.model.path}/model.safetensors")
    metadata = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in policy.items()]
    sender = Sender(lambda: urls, metadata, 1 << 20, mesh.device, token=token, timeout_s=100)
    engines, loop = RemoteEngines(mesh, partial(_same, sender)), Loop("one-stands-still")
    engines.wake_weights()
    engines.load_weights(policy.items())
    engines.wake_kv_cache()
    client = loop.call(partial(Client, token=token))
    loop.call(client.use, engines.urls, 0)
    room = asyncio.Semaphore(at_a_time)
    done: list[Completion] = []

    async def one(number: int) -> None:
        async with room:
            if number == at_a_time - 1:  # those before it are sent, and it will be the last of the first ones
                os.killpg(victim, signal.SIGSTOP)
            done.append(await client.generate([3 + number % 10], length, Sampling(n=1, max_tokens=length)))

    async def all_of_them() -> int:
        tasks = [asyncio.ensure_future(one(number)) for number in range(requests)]
        deadline, seen, since = time.monotonic() + 60, -1, time.monotonic()
        while time.monotonic() < deadline and time.monotonic() - since < 3:  # nothing new for so long
            await asyncio.sleep(0.05)
            if len(done) != seen:
                seen, since = len(done), time.monotonic()
        os.killpg(victim, signal.SIGCONT)
        await asyncio.gather(*tasks)
        return seen

    try:
        meanwhile = loop.run(all_of_them()).result(200)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(victim, signal.SIGCONT)
    lost = loop.call(client.counts.metrics)["engines/lost_requests"]
    loop.run(client.close()).result()
    engines.close()
    loop.close()
    return {"meanwhile": meanwhile, "tokens": [len(completion.tokens) for completion in done], "lost": lost}


def _same(sender: Sender) -> Sender:
    return sender
