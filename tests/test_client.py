"""Requests to servers that die, abort, answer nonsense, or have no weights yet: with a stub that speaks HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from aiohttp import web

from megarl.rollout import client as module
from megarl.rollout.client import Bound, Client
from megarl.rollout.conversation import Completion, Sampling
from megarl.rollout.vllm_engine import RolloutError

SAMPLING = Sampling(n=1, max_tokens=6, temperature=0.7, top_k=5, stop_token_ids=[9])


def answer(tokens, reason="stop", versions=None, logps=None):
    spans = versions if versions is not None else [{"version": "3", "start": 0, "end": len(tokens)}]
    logps = [-t / 10 for t in tokens] if logps is None else logps
    content = [{"token_id": t, "logprob": logp} for t, logp in zip(tokens, logps, strict=False)]
    choice = {"token_ids": tokens, "finish_reason": reason, "logprobs": {"content": content}, "weight_versions": spans}
    return lambda: web.json_response({"choices": [choice]})


def failure(status=500, text="EngineCore died"):
    return lambda: web.Response(status=status, text=text)


class Stub:
    """A server whose answers are scripted, in turn; the last one stays."""

    def __init__(self, *answers, version="3"):
        self.answers, self.version, self.asked, self.healthy = list(answers), version, [], True
        self.counted, self.speed = None, 0

    async def start(self):
        app = web.Application()
        app.router.add_post("/inference/v1/generate", self.generate)
        app.router.add_get("/health", self.health)
        app.router.add_get("/weight_info", self.info)
        app.router.add_get("/metrics", self.metrics)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}"
        return self.url

    async def generate(self, request):
        self.asked.append(await request.json() | {"authorization": request.headers.get("Authorization")})
        given = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return await given(request) if asyncio.iscoroutinefunction(given) else given()

    async def health(self, request):
        return web.Response(status=200 if self.healthy else 503)

    async def metrics(self, request):
        """A line of each counter in vLLM's words; `counted` is what it has generated, None a server without metrics."""
        if self.counted is None:
            return web.Response(status=404)
        self.counted += self.speed
        labels = '{engine="0",model_name="m"}'
        lines = [f"vllm:{kind}_tokens_total{labels} {self.counted}.0" for kind in ("prompt", "generation")]
        return web.Response(text="\n".join(["# TYPE vllm:prompt_tokens_total counter", *lines, ""]))

    async def info(self, request):
        return web.json_response({"weight_version": self.version})


async def hang_up(request):
    request.transport.close()
    return web.Response()


async def never(request):
    await asyncio.sleep(60)


def run(scenario: Callable[[Client], Awaitable[None]], **options) -> None:
    async def scene():
        client = Client(token="secret", **options)
        try:
            await scenario(client)
        finally:
            await client.close()

    asyncio.run(scene())


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    for name in ("_PROBE_S", "_HEALTH_S", "_ANSWERS_WITHIN_S"):
        monkeypatch.setattr(module, name, 0.05)


async def serving(client, *stubs, version=3):
    client.use([await stub.start() for stub in stubs], version)


def test_what_is_asked_for_and_what_comes_back():
    async def scenario(client):
        stub = Stub(answer([4, 9]))
        await serving(client, stub)
        assert await Bound(client, SAMPLING).generate([1, 2], 4, stop_token_ids=[7]) == Completion(
            [4, 9], [-0.4, -0.9], "stop", versions=[3, 3]
        )
        asked = stub.asked[0]
        assert asked["token_ids"] == [1, 2] and asked["authorization"] == "Bearer secret"
        expected = {"max_tokens": 4, "temperature": 0.7, "top_k": 5, "stop_token_ids": [9, 7], "n": 1, "logprobs": 0}
        assert asked["sampling_params"].items() >= expected.items()
        assert "seed" not in asked["sampling_params"] and "cache_salt" not in asked

    run(scenario)


def test_a_cache_that_survives_pushes_is_salted_by_the_version():
    async def scenario(client):
        stub = Stub(answer([4]))
        await serving(client, stub)
        await client.generate([1], 4, SAMPLING)
        client.use([stub.url], 4)
        stub.answers = [answer([4], versions=[{"version": "4", "start": 0, "end": 1}])]
        await client.generate([1], 4, SAMPLING)
        client.use([stub.url], 3)  # back to a checkpoint: the same number, other weights
        stub.answers = [answer([4])]
        await client.generate([1], 4, SAMPLING)
        (a, first), (b, second), (c, third) = (asked["cache_salt"].split("-") for asked in stub.asked)
        assert (first, second, third) == ("3", "4", "3") and a == b != c

    run(scenario, salted=True)


def test_an_aborted_request_goes_on_where_it_was_and_its_parts_are_joined():
    """2 tokens of push 3, then 1 of 3 and 2 of 4: 5 in all."""

    async def scenario(client):
        spans = [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 3}]
        stub = Stub(answer([4, 5], "abort"), answer([], "abort"), answer([6, 7, 8], "length", spans))
        await serving(client, stub)
        found = await client.generate([1, 2], 5, SAMPLING)
        assert found == Completion([4, 5, 6, 7, 8], [-0.4, -0.5, -0.6, -0.7, -0.8], "length", versions=[3, 3, 3, 4, 4])
        assert [asked["token_ids"] for asked in stub.asked] == [[1, 2], [1, 2, 4, 5], [1, 2, 4, 5]]
        assert [asked["sampling_params"]["max_tokens"] for asked in stub.asked] == [5, 3, 3]
        assert client.counts.continued == 2 and client.counts.lost == 0

    run(scenario)


@pytest.mark.parametrize(
    "bad",
    [hang_up, failure(), failure(200, "{"), answer([4, 5], logps=[-1.0])],
    ids=["hangs up", "500", "half an answer", "a log-prob is missing"],
)
def test_a_server_that_fails_costs_its_request_and_another_one_answers(bad):
    async def scenario(client):
        first, second = Stub(bad), Stub(answer([4, 9]))
        await serving(client, first, second)
        assert (await client.generate([1], 6, SAMPLING)).tokens == [4, 9]
        assert client.counts.lost == 1 and len(first.asked) == len(second.asked) == 1
        assert (await client.generate([1], 6, SAMPLING)).tokens == [4, 9]
        assert len(second.asked) == 2  # it is not asked again at once

    run(scenario)


def test_a_dead_server_is_left_alone_and_one_that_is_well_again_is_used():
    async def scenario(client):
        first, second = Stub(failure(), answer([5])), Stub(answer([4]))
        first.version = "default"  # started anew, with the weights it was started with
        await serving(client, first, second)
        assert (await client.generate([1], 6, SAMPLING)).tokens == [4]
        await asyncio.sleep(0.2)
        assert [(await client.generate([1], 6, SAMPLING)).tokens for _ in range(3)] == [[4]] * 3
        first.version = "3"
        await asyncio.sleep(0.2)
        busy = [client.generate([1], 6, SAMPLING) for _ in range(4)]
        assert sorted(found.tokens[0] for found in await asyncio.gather(*busy)) == [4, 4, 5, 5]  # least loaded

    run(scenario)


def test_tokens_of_weights_that_no_push_brought_are_not_taken():
    async def scenario(client):
        stale, fresh = Stub(answer([5], versions=[{"version": "default", "start": 0, "end": 1}])), Stub(answer([4]))
        await serving(client, stale, fresh)
        assert (await client.generate([1], 6, SAMPLING)).tokens == [4]
        assert len(stale.asked) == 1 and client.counts.lost == 1

    run(scenario)


def test_a_server_that_neither_answers_nor_hangs_up_is_given_up():
    async def scenario(client):
        frozen, other = Stub(never), Stub(answer([4]))
        await serving(client, frozen, other)
        frozen.healthy = False
        assert (await asyncio.wait_for(client.generate([1], 6, SAMPLING), 5)).tokens == [4]
        assert client.counts.lost == 1

    run(scenario)


@pytest.mark.parametrize(("counted", "speed"), [(5, 0), (5, 1), (None, 0)])
def test_a_server_whose_engine_stands_still_behind_it_is_left_to_the_next_push(counted, speed, monkeypatch):
    """It says that it is well, and generates nothing; one that is only slow, or does not say, is waited for."""
    monkeypatch.setattr(module, "_STUCK_S", 0.4)

    async def slow(request):
        await asyncio.sleep(1.2)
        return answer([5])()

    async def scenario(client):
        stub, other = Stub(slow), Stub(answer([4]))
        stub.counted, stub.speed = counted, speed
        await serving(client, stub)
        request = asyncio.create_task(client.generate([1], 6, SAMPLING))
        await asyncio.sleep(0.9)
        stuck = counted is not None and not speed
        assert client.counts.lost == stuck and client._usable.is_set() != stuck
        client.use([await other.start() if stuck else stub.url], 3)
        assert (await request).tokens == ([4] if stuck else [5])

    run(scenario)


def test_requests_wait_while_weights_are_pushed():
    async def scenario(client):
        stub = Stub(answer([4]))
        await serving(client, stub)
        client.hold()
        request = asyncio.ensure_future(client.generate([1], 6, SAMPLING))
        await asyncio.sleep(0.1)
        assert not stub.asked and not request.done()
        client.use([stub.url], 3)
        assert (await request).tokens == [4]

    run(scenario)


def test_a_server_that_is_gone_at_a_push_gives_its_requests_to_those_that_are_left():
    async def scenario(client):
        gone, left = Stub(never), Stub(answer([4]))
        await serving(client, gone, left)
        request = asyncio.ensure_future(client.generate([1], 6, SAMPLING))
        await asyncio.sleep(0.1)
        assert len(gone.asked) == 1
        client.use([left.url], 3)
        assert (await request).tokens == [4]

    run(scenario)


@pytest.mark.parametrize(
    "answers, said",
    [
        ([failure(400, "prompt too long")], "400: prompt too long"),
        (
            [answer([4], "length")],
            "has no room for 6 tokens, and ended a response after 1: it was started with a smaller",
        ),
        ([answer([4] * 9)], "3 answers to one request made no sense; .* 9 tokens of at most 6"),
    ],
)
def test_what_no_server_can_do_ends_the_request(answers, said):
    async def scenario(client):
        stub = Stub(*answers)
        await serving(client, stub)
        with pytest.raises(RolloutError, match=said):
            await client.generate([1], 6, SAMPLING)

    run(scenario)


def test_without_any_server_a_request_waits_for_the_next_push_however_long_the_trainer_takes():
    async def scenario(client):
        stub = Stub(failure(), answer([4, 9]), version="default")
        await serving(client, stub)
        request = asyncio.create_task(client.generate([1], 6, SAMPLING))
        await asyncio.sleep(0.5)
        assert not client.starved  # only after two seconds
        client._without_since -= 3600
        await asyncio.sleep(0.5)
        assert client.starved and not request.done()
        client.use([stub.url], 3)
        assert (await request).tokens == [4, 9]
        assert client.counts.lost == 1

    run(scenario)


def test_a_request_that_ends_servers_ends_the_run():
    """A server that is well again after every time."""

    async def scenario(client):
        await serving(client, Stub(hang_up))
        with pytest.raises(RolloutError, match=r"prompt of 2 tokens, 6 to come\) was lost 16 times, .* the last time"):
            await client.generate([1, 2], 6, SAMPLING)
        assert client.counts.lost == 16

    run(scenario)


def test_lost_tokens_are_estimated_from_what_requests_get():
    """100 tokens in 10 s, and requests lost after 3 s in all: 30 tokens."""
    counts = module.Counts(requests=2, tokens=100, seconds=10.0, lost=2, lost_seconds=3.0)
    assert counts.metrics()["engines/lost_tokens_estimate"] == pytest.approx(30)
