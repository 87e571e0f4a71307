"""Requests to servers: to the least loaded of them, again to another where one fails, and joined where one broke off.

Contract: everything here runs in one asyncio loop. `Client.generate` returns a whole response, whatever becomes of
servers meanwhile: one that dies costs what it had generated of this request and nothing else, and what an aborted
request has so far is kept, and continued. While there is no server it waits: the trainer, which may be in the middle of
a step, sees that by `Client.starved` as soon as it needs what is asked for, and gives weights to the servers that it
finds or ends the run. It raises RolloutError where a server refuses the request itself, where answers are not answers
three times, and where sixteen servers were lost by it.

A server counts only with the weights of a push: every token's version comes from the server itself, and tokens of a
version that no push has brought (a server that was started anew) are not taken.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from megarl.rollout.conversation import Completion, Sampling
from megarl.rollout.vllm_engine import RolloutError

_HEALTH_S = 5.0  # between looks at servers that owe an answer
_PROBE_S = 1.0  # between looks at a server that failed
_SILENT = 3  # looks in a row that a server may leave unanswered
_STUCK_S = 300.0  # that one which answers may owe answers and read and write no token: longer than any step takes
_TOKENS = re.compile(r"^vllm:(?:prompt|generation)_tokens_total(?:{.*})? (\S+)$", re.MULTILINE)
_GARBAGE = 3  # answers to one request that may be none
_LOST = 16  # times that one request may be lost: it may itself be what ends servers
_ANSWERS_WITHIN_S = 10.0
_STARVED_S = 2.0


class _LostError(Exception):
    """A server did not answer; what it generated is lost."""


class _GarbageError(Exception):
    """A server answered what cannot be an answer."""


@dataclass
class _Server:
    url: str
    up: bool = True
    silent: int = 0  # looks in a row without an answer
    tokens: float = -1.0  # that it has read and written in its life
    moved: float = field(default_factory=time.monotonic)  # when those were seen to change, or it owed nothing
    requests: set[asyncio.Task[Completion]] = field(default_factory=set)


@dataclass
class Counts:
    """What has happened to requests so far."""

    requests: int = 0  # that were answered whole
    tokens: int = 0
    seconds: float = 0.0  # that those took
    lost: int = 0  # of which a server never answered
    lost_seconds: float = 0.0  # that those had taken
    continued: int = 0  # that a server broke off and another went on with

    def metrics(self) -> dict[str, float]:
        """Servers answer at the end only, so that how many tokens a dead one had generated is an estimate: as many as
        requests get on average in the time that the lost ones had run."""
        rate = self.tokens / self.seconds if self.seconds else 0.0
        return {
            "engines/lost_requests": float(self.lost),
            "engines/lost_tokens_estimate": self.lost_seconds * rate,
            "engines/continued_requests": float(self.continued),
        }


class Client:
    """The servers that generate now."""

    def __init__(self, *, token: str | None, salted: bool = False) -> None:
        """
        Args:
            salted: whether servers keep their cache at a push, so that a prefix computed by older weights has to be
                another prefix.
        """
        self.version = 0
        self.counts = Counts()
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._salted, self._salt = salted, ""
        self._servers: dict[str, _Server] = {}
        self._held = True
        self._usable = asyncio.Event()
        self._without_since = time.monotonic()
        self._session: aiohttp.ClientSession | None = None
        self._background: set[asyncio.Task[None]] = set()

    # ---- which servers there are -------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Send nothing new until `use`: a push is about to begin."""
        self._held = True
        self._look()

    def use(self, urls: Sequence[str], version: int) -> None:
        """These servers have the weights ``version``, and no others do."""
        if version not in (self.version, self.version + 1) or not self._salt:
            self._salt = secrets.token_hex(8)  # servers may remember another run's weights by the same number
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=_ANSWERS_WITHIN_S)
            connector = aiohttp.TCPConnector(limit=0)
            self._session = aiohttp.ClientSession(headers=self._headers, timeout=timeout, connector=connector)
            self._in_background(self._watch())
        for url in self._servers.keys() - set(urls):
            self._give_up(self._servers.pop(url))
        for url in urls:
            server = self._servers.setdefault(url, _Server(url))
            server.up, server.silent, server.moved = True, 0, time.monotonic()
        self.version, self._held = version, False
        self._look()

    @property
    def starved(self) -> bool:
        """Whether there has been no server for a while, though none is being given weights."""
        waited = time.monotonic() - self._without_since
        return not self._held and not self._usable.is_set() and waited > _STARVED_S

    async def usable(self) -> None:
        """Returns when there is a server that requests go to."""
        await self._usable.wait()

    async def close(self) -> None:
        for task in self._background:
            task.cancel()
        if self._session is not None:
            await self._session.close()

    def _look(self) -> None:
        """Settle whether requests can be sent."""
        usable = not self._held and any(server.up for server in self._servers.values())
        if usable:
            self._usable.set()
        elif self._usable.is_set():
            self._usable.clear()
            self._without_since = time.monotonic()

    def _give_up(self, server: _Server) -> None:
        """Expect no answer from it any more."""
        server.up = False
        for request in list(server.requests):
            request.cancel()

    def _failed(self, server: _Server) -> None:
        """Send it nothing until it is seen to be well, with the weights it should have."""
        if server.up and self._servers.get(server.url) is server:
            server.up = False
            self._in_background(self._until_well(server))
            self._look()

    async def _until_well(self, server: _Server) -> None:
        while self._servers.get(server.url) is server and not server.up:
            await asyncio.sleep(_PROBE_S)
            answer = await self._probe(server, "weight_info")
            if answer is not None and _version_in(answer) == str(self.version) and not server.up:
                server.up, server.silent, server.moved = True, 0, time.monotonic()
                self._look()

    async def _watch(self) -> None:
        """Find servers that neither answer nor hang up (a machine that is gone closes no connection), and those whose
        engine stands still behind a server that is well."""
        while True:
            await asyncio.sleep(_HEALTH_S)
            for server in self._servers.values():
                if self._held or not server.requests:
                    server.moved = time.monotonic()
            owing = [server for server in self._servers.values() if server.requests]
            for server, silent in zip(owing, await asyncio.gather(*map(self._is_silent, owing)), strict=True):
                server.silent = server.silent + 1 if silent else 0
                if server.silent == _SILENT:
                    self._failed(server)
                    self._give_up(server)
                elif time.monotonic() - server.moved > _STUCK_S:
                    self._give_up(server)  # until a push finds that it moves
                    self._look()

    async def _is_silent(self, server: _Server) -> bool:
        """Whether it does not answer, or is ill; and whether it has moved, where it says so."""
        if await self._probe(server, "health") is None:
            return True
        tokens = [float(number) for number in _TOKENS.findall(await self._probe(server, "metrics") or "")]
        if not tokens or sum(tokens) != server.tokens:
            server.tokens, server.moved = sum(tokens), time.monotonic()
        return False

    async def _probe(self, server: _Server, path: str) -> str | None:
        """Its answer, if it is well."""
        assert self._session is not None
        try:
            timeout = aiohttp.ClientTimeout(total=_ANSWERS_WITHIN_S)
            async with self._session.get(f"{server.url}/{path}", timeout=timeout) as answer:
                return await answer.text() if answer.status == 200 else None
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return None

    def _in_background(self, coroutine: Any) -> None:
        task = asyncio.ensure_future(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # ---- requests ----------------------------------------------------------------------------------------------------

    async def generate(
        self, tokens: Sequence[int], max_tokens: int, sampling: Sampling, stop_token_ids: Sequence[int] = ()
    ) -> Completion:
        """What follows ``tokens``: one response of at most ``max_tokens``."""
        prompt, garbage, lost = list(tokens), 0, 0
        out: list[int] = []
        logps: list[float] = []
        versions: list[int] = []
        began = time.monotonic()
        while True:
            server = await self._least_loaded()
            sent, oldest = time.monotonic(), self.version
            params = _parameters(sampling, max_tokens - len(out), stop_token_ids)
            try:
                part = await self._tracked(server, self._ask(server.url, prompt + out, params, oldest))
            except (_LostError, _GarbageError) as reason:
                self.counts.lost += 1
                self.counts.lost_seconds += time.monotonic() - sent
                self._failed(server)
                garbage += isinstance(reason, _GarbageError)
                lost += 1
                if garbage == _GARBAGE:
                    raise RolloutError(
                        f"{garbage} answers to one request made no sense; the last one: {reason}"
                    ) from None
                if lost == _LOST:
                    raise RolloutError(
                        f"a request (a prompt of {len(prompt)} tokens, {max_tokens} to come) was lost {lost} times, by "
                        f"servers that were well when it was sent: see what it does to them; the last time: {reason}"
                    ) from None
                continue
            out += part.tokens
            logps += part.logps
            versions += part.versions
            if part.finish_reason != "abort" or len(out) == max_tokens:
                self.counts.requests += 1
                self.counts.tokens += len(out)
                self.counts.seconds += time.monotonic() - began
                reason = "length" if part.finish_reason == "abort" else part.finish_reason
                return Completion(out, logps, reason, versions=versions)
            self.counts.continued += 1

    async def _least_loaded(self) -> _Server:
        while True:
            up = [server for server in self._servers.values() if server.up]
            if up and not self._held:
                return min(up, key=lambda server: len(server.requests))
            await self._usable.wait()

    async def _tracked(self, server: _Server, ask: Any) -> Completion:
        """A request that ends when its server is given up."""
        request = asyncio.ensure_future(ask)
        server.requests.add(request)
        try:
            return await request
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # it is the caller that gives up
                raise
            raise _LostError(f"{server.url} was given up") from None
        finally:
            server.requests.discard(request)

    async def _ask(self, url: str, tokens: list[int], params: dict[str, Any], oldest: int) -> Completion:
        assert self._session is not None
        body: dict[str, Any] = {"token_ids": tokens, "sampling_params": params}
        if self._salted:
            body["cache_salt"] = f"{self._salt}-{self.version}"
        try:
            async with self._session.post(f"{url}/inference/v1/generate", json=body) as answer:
                if answer.status != 200:
                    words = f"{url} answers {answer.status}: {(await answer.text())[:500]}"
                    if 400 <= answer.status < 500:
                        raise RolloutError(
                            f"{words} (a prompt of {len(tokens)} tokens, {params['max_tokens']} to come)"
                        )
                    raise _LostError(words)
                payload = await answer.json(content_type=None)
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError) as error:
            raise _LostError(f"{url}: {type(error).__name__}: {error}") from error
        except (aiohttp.ClientError, ValueError) as error:
            raise _GarbageError(f"{url}: {type(error).__name__}: {error}") from error
        return understood(payload, url, oldest, params["max_tokens"])


class Bound:
    """`megarl.rollout.conversation.AsyncEngine`: the servers, and how a rollout samples."""

    def __init__(self, client: Client, sampling: Sampling) -> None:
        self._client, self._sampling, self.max_tokens = client, sampling, sampling.max_tokens

    async def generate(self, tokens: list[int], max_tokens: int, *, stop_token_ids: Sequence[int] = ()) -> Completion:
        return await self._client.generate(tokens, max_tokens, self._sampling, stop_token_ids)

    async def ready(self) -> None:
        await self._client.usable()


def _version_in(info: str) -> str | None:
    """Of what a server says of its weights."""
    try:
        version: str = json.loads(info)["weight_version"]
    except (ValueError, KeyError, TypeError):
        return None
    return version


def _parameters(sampling: Sampling, max_tokens: int, stop_token_ids: Sequence[int]) -> dict[str, Any]:
    """vLLM's SamplingParams. No seed: on CPUs a request with one ends the engine when its cache is computed anew in
    chunks (``set_offset`` of a CPU generator, vLLM 0.32)."""
    return {
        "n": 1,
        "max_tokens": max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "stop_token_ids": [*sampling.stop_token_ids, *stop_token_ids],
        "logprobs": 0,  # of the sampled token alone
        "detokenize": False,
    }


def understood(payload: Any, url: str, oldest: int, max_tokens: int) -> Completion:
    """A server's answer. Raises _GarbageError where its parts do not fit, _LostError where its tokens are of weights
    that no push since ``oldest`` brought, and RolloutError where the server is one of another recipe."""
    try:
        (choice,) = payload["choices"]
        tokens, reason = [int(token) for token in choice["token_ids"]], choice["finish_reason"]
        content = choice["logprobs"]["content"] if tokens else []
        logps = [float(entry["logprob"]) for entry in content]
        spans = [(span["version"], int(span["start"]), int(span["end"])) for span in choice["weight_versions"] or []]
    except (KeyError, TypeError, ValueError) as error:
        raise _GarbageError(f"{url}: {type(error).__name__}: {error} in {str(payload)[:300]}") from error
    if reason not in ("stop", "length", "abort") or len(logps) != len(tokens) or len(tokens) > max_tokens:
        words = f"{len(tokens)} tokens of at most {max_tokens}, {len(logps)} log-probs, finish_reason {reason!r}"
        raise _GarbageError(f"{url}: {words}")
    if reason == "length" and len(tokens) < max_tokens:
        raise RolloutError(
            f"{url} has no room for {max_tokens} tokens, and ended a response after {len(tokens)}: it was started with "
            "a smaller rollout.max_model_len (or data.max_prompt_length + rollout.max_response_length) than this run's"
        )
    if not tokens and reason != "abort":
        raise _GarbageError(f"{url}: no token, finish_reason {reason!r}")
    versions: list[int] = []
    for version, start, end in spans:
        if start != len(versions) or end < start:
            raise _GarbageError(f"{url}: {len(tokens)} tokens with versions {spans}")
        if not version.isdecimal() or int(version) < oldest:
            raise _LostError(f"{url} generates with weights {version!r}, not with those of push {oldest}")
        versions += [int(version)] * (end - start)
    if len(versions) != len(tokens):
        raise _GarbageError(f"{url}: {len(tokens)} tokens with versions {spans}")
    return Completion(tokens, logps, reason, versions=versions)
