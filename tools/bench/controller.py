"""What driving rollouts costs: 1,024 of them against a stub of a server whose latency has a long tail.

    python tools/bench/controller.py [--rollouts 1024] [--concurrent 256] [--tokens 512]

The stub is a process of its own. It answers every request after a time of its own choosing (log-normal, mean 2 s,
sigma 0.8: the slowest of 1,024 takes some twelve times the median), with as many tokens and log-probs as asked for. The
controller is what a trainer's rank runs: `Stream`, `Client`, single-turn conversations in groups of 8. It is compared
with a controller that costs nothing: the same latencies, in the same order, each taken up as soon as one of the
`--concurrent` places is free.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import multiprocessing
import random
import time
from multiprocessing.connection import Connection

from aiohttp import web

from megarl.data.prompts import Prompt
from megarl.rollout.client import Bound, Client
from megarl.rollout.conversation import Sampling, single_turn
from megarl.rollout.stream import Loop, Stream

GROUP = 8


def latencies(count: int) -> list[float]:
    """Seconds; the mean of a log-normal is exp(mu + sigma**2 / 2)."""
    generator = random.Random(0)
    sigma = 0.8
    mu = 0.6931 - sigma**2 / 2
    return [generator.lognormvariate(mu, sigma) for _ in range(count)]


def ideal(times: list[float], places: int) -> float:
    """When the last one ends, where each begins as soon as a place is free."""
    free = [0.0] * places
    for seconds in times:
        heapq.heapreplace(free, free[0] + seconds)
    return max(free)


def stub(pipe: Connection, times: list[float], tokens: int) -> None:
    waiting = iter(times)
    choice = {
        "token_ids": list(range(tokens)),
        "finish_reason": "stop",
        "logprobs": {"content": [{"token_id": t, "logprob": -0.123456789, "rank": 1} for t in range(tokens)]},
        "weight_versions": [{"version": "0", "start": 0, "end": tokens}],
    }

    async def generate(request: web.Request) -> web.Response:
        await request.read()
        await asyncio.sleep(next(waiting))
        return web.json_response({"choices": [choice]})

    async def health(request: web.Request) -> web.Response:
        return web.Response()

    async def run() -> None:
        app = web.Application()
        app.router.add_post("/inference/v1/generate", generate)
        app.router.add_get("/health", health)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        pipe.send(f"http://127.0.0.1:{runner.addresses[0][1]}")
        await asyncio.Event().wait()

    asyncio.run(run())


def drive(url: str, rollouts: int, concurrent: int, tokens: int) -> tuple[float, float]:
    """(seconds, CPU seconds of this process)."""
    loop = Loop("bench")
    client = loop.call(lambda: Client(token=None))
    loop.call(client.use, [url], 0)
    room = asyncio.Semaphore(concurrent)
    engine = Bound(client, Sampling(n=1, max_tokens=tokens))

    async def one(prompt: Prompt):
        async with room:
            return await single_turn(engine, prompt)

    async def group(index: int, prompt: Prompt):
        return await asyncio.gather(*(one(prompt) for _ in range(GROUP)))

    prompts = [Prompt(str(i), list(range(100)), "", None, {}) for i in range(rollouts // GROUP)]
    waiting = iter(prompts)
    stream = Stream(loop, group, batch=len(prompts), max_staleness=0)
    began, cpu = time.perf_counter(), time.process_time()
    stream.begin(lambda count: [next(waiting) for _ in range(count)], steps=1)
    made = stream.want(len(prompts)).result()
    spent = time.perf_counter() - began, time.process_time() - cpu
    assert sum(len(samples) for samples in made.values()) == rollouts
    loop.run(client.close()).result()
    loop.close()
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rollouts", type=int, default=1024)
    parser.add_argument("--concurrent", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=512)
    args = parser.parse_args()
    times = latencies(args.rollouts)
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=stub, args=(theirs, times, args.tokens), daemon=True)
    process.start()
    seconds, cpu = drive(ours.recv(), args.rollouts, args.concurrent, args.tokens)
    process.kill()
    bound = ideal(times, args.concurrent)
    print(f"{args.rollouts} rollouts of {args.tokens} tokens, {args.concurrent} at a time")
    print(f"latency: median {sorted(times)[len(times) // 2]:.2f} s, slowest {max(times):.2f} s")
    print(f"at no cost {bound:.2f} s, here {seconds:.2f} s: {bound / seconds:.1%} of what latency allows")
    print(f"controller: {cpu / args.rollouts * 1e3:.2f} ms of one core a rollout, {cpu / seconds:.1%} of it busy")


if __name__ == "__main__":
    main()
