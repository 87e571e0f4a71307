"""JSON over HTTP, as rewards that ask a service need it: bounded in time, size, attempts and concurrency.

Contract: `ask` posts bodies and returns one answer each, in order: the JSON that came back, or a `ServiceError` that
says what went wrong. Nothing waits beyond `total_timeout_s` for all of them together.

- Asked again, at most `max_retries` times: connections that fail, answers that are late or end too soon, 408, 429, 500,
  502, 503 and 504. The wait is random between 0 and a bound that doubles (AWS's "full jitter"), and longer where
  Retry-After says so; a wait that the total deadline would cut short is not begun.
- Not asked again: every other status, JSON that cannot be read, an answer longer than `max_response_bytes`.
- A redirect is refused and never followed: it would carry samples, and the token, to whoever it names.
- The token is read from the environment variable `token_env` and appears in no message. Proxies, netrc and compressed
  answers (whose size no limit on bytes would bound) are not used.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from megarl.rewards import RewardError

TRY_AGAIN = (408, 429, 500, 502, 503, 504)
FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 8.0
MAX_SHOWN = 300  # characters of an answer in an error


class ServiceError(Exception):
    """One request came to nothing; the message says why."""


class Retry(Exception):
    """One attempt came to nothing; another may do better, `after_s` seconds from now at the earliest."""

    def __init__(self, reason: str, after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.after_s = after_s


@dataclass(frozen=True)
class Service:
    """Where to ask, and within which bounds."""

    url: str
    token_env: str | None = None
    timeout_s: float = 20.0  # one attempt, from connecting to the last byte
    total_timeout_s: float = 60.0
    max_retries: int = 3
    max_response_bytes: int = 1 << 20
    concurrency: int = 8

    def __post_init__(self) -> None:
        url = urlsplit(self.url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise RewardError(f"url = {self.url!r} is not http://... or https://...")
        if url.username or url.password:
            raise RewardError("a url with a user or password would be logged: name a variable in token_env instead")
        low = {"timeout_s": self.timeout_s, "total_timeout_s": self.total_timeout_s}
        low |= {"max_response_bytes": self.max_response_bytes, "concurrency": self.concurrency}
        if wrong := [f"{name} = {value}" for name, value in low.items() if not value > 0]:
            raise RewardError(f"{', '.join(wrong)}: must be above 0")
        if self.max_retries < 0:
            raise RewardError(f"max_retries = {self.max_retries}: must be 0 or more")

    def headers(self) -> dict[str, str]:
        if self.token_env is None:
            return {"Accept-Encoding": "identity"}
        token = os.environ.get(self.token_env, "").strip()
        if not token:
            raise RewardError(f"token_env names {self.token_env}, and no such variable is in the environment")
        return {"Accept-Encoding": "identity", "Authorization": f"Bearer {token}"}


def ask(service: Service, bodies: Sequence[dict[str, Any]]) -> list[Any]:
    """The answer to each body; a ServiceError where there is none."""
    return asyncio.run(_ask(service, bodies))


async def _ask(service: Service, bodies: Sequence[dict[str, Any]]) -> list[Any]:
    deadline = time.monotonic() + service.total_timeout_s
    free = asyncio.Semaphore(service.concurrency)
    settings: dict[str, Any] = {"auto_decompress": False, "trust_env": False, "headers": service.headers()}
    timeout = aiohttp.ClientTimeout(total=service.timeout_s)

    async def answer(body: dict[str, Any]) -> Any:
        async with free:
            return await _insist(session, service, body, deadline)

    # A connection kept for later may be closed by the time it is used, and cost an attempt.
    connector = aiohttp.TCPConnector(limit=service.concurrency, force_close=True)
    settings |= {"connector": connector, "cookie_jar": aiohttp.DummyCookieJar()}
    async with aiohttp.ClientSession(timeout=timeout, **settings) as session:
        tasks = [asyncio.create_task(answer(body)) for body in bodies]
        await asyncio.wait(tasks, timeout=service.total_timeout_s)
        late = [task for task in tasks if not task.done()]
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
    said = f"{service.url}: no answer within total_timeout_s = {service.total_timeout_s:g}"
    return [ServiceError(said) if task.cancelled() else task.exception() or task.result() for task in tasks]


async def _insist(session: aiohttp.ClientSession, service: Service, body: dict[str, Any], deadline: float) -> Any:
    """The answer, after as many attempts as the service's bounds allow."""
    for attempt in range(service.max_retries + 1):
        try:
            return await _attempt(session, service, body)
        except Retry as problem:
            bound = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**attempt)
            wait = problem.after_s + random.uniform(0, bound)
            told = f"{service.url}: {problem}"
            if attempt == service.max_retries:
                raise ServiceError(f"{told} (attempt {attempt + 1} of as many)") from problem
            if time.monotonic() + wait > deadline:
                within = f"total_timeout_s = {service.total_timeout_s:g}"
                raise ServiceError(f"{told}, and {within} leaves no time for the wait of {wait:.1f} s") from problem
            await asyncio.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


async def _attempt(session: aiohttp.ClientSession, service: Service, body: dict[str, Any]) -> Any:
    try:
        async with session.post(service.url, json=body, allow_redirects=False) as response:
            status, reason = response.status, f"{response.status} {response.reason}"
            if 300 <= status < 400:
                raise ServiceError(f"{service.url}: {reason}: a redirect is not followed; give the address it leads to")
            if status in TRY_AGAIN:
                raise Retry(reason, _retry_after(response.headers.get("Retry-After")))
            text = await _text(response, service)
            if status >= 400:
                hint = f" (is the token in {service.token_env} right?)" if status in (401, 403) else ""
                raise ServiceError(f"{service.url}: {reason}{hint}: {_shown(text, service)}")
    except TimeoutError as error:
        raise Retry(f"no whole answer within timeout_s = {service.timeout_s:g}") from error
    except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
        raise Retry(f"{type(error).__name__}: {error}") from error
    except aiohttp.ClientError as error:  # what came is not HTTP
        raise ServiceError(f"{service.url}: {type(error).__name__}: {error}") from error
    try:
        return json.loads(text)
    except ValueError as error:
        raise ServiceError(f"{service.url}: not JSON ({error}): {_shown(text, service)}") from error


async def _text(response: aiohttp.ClientResponse, service: Service) -> bytes:
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise ServiceError(f"{service.url}: the answer is compressed ({encoding}), which was not asked for")
    text = bytearray()
    async for part in response.content.iter_any():
        text += part
        if len(text) > service.max_response_bytes:
            raise ServiceError(f"{service.url}: more than max_response_bytes = {service.max_response_bytes}")
    return bytes(text)


def _shown(text: bytes, service: Service) -> str:
    """The start of an answer, without the token that a service may have repeated in it."""
    shown = text.decode(errors="replace")
    if service.token_env is not None:
        shown = shown.replace(os.environ.get(service.token_env, "").strip(), "<token>")
    return repr(shown[:MAX_SHOWN])


def _retry_after(header: str | None) -> float:
    """Seconds to wait: of a number or of an HTTP date (RFC 9110, 10.2.3); 0 for anything else."""
    if header is None:
        return 0.0
    if header.strip().isdigit():
        return float(header)
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # no date, or one without a time zone
        return 0.0
