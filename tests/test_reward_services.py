"""Rewards that ask a service, against a real HTTP server that misbehaves in every way a service can."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from megarl.config import RewardConfig, RewardFunction
from megarl.rewards import RewardError
from megarl.rewards.http import http_reward
from megarl.rewards.judge import TEMPLATE, filled, judge_reward, mean_score
from megarl.rewards.reward_model import reward_model_reward
from megarl.rewards.runner import RewardInput, RewardWorkers
from megarl.rewards.service import FIRST_WAIT_S, Service, ServiceError, ask

pytestmark = pytest.mark.timeout(60)
TOKEN = "s3cret-of-the-test"


class Stub(ThreadingHTTPServer):
    """Remembers every request; does what the path says."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[str, dict[str, str], dict[str, Any], float]] = []
        self.elsewhere = ""  # where a redirect leads
        self.together = self.most_together = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up in the middle is what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    server: Stub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((self.path, dict(self.headers), body, time.monotonic()))
            times = sum(seen[0] == self.path for seen in self.server.seen)
        rewards = {"rewards": [float(len(text)) for text in body.get("completions", [])]}
        name, _, rest = self.path[1:].partition("/")
        acts: dict[str, Callable[[], None]] = {
            "ok": lambda: self.answer(200, rewards),
            "twice": lambda: self.answer(503, {}) if times < 3 else self.answer(200, rewards),
            "status": lambda: self.answer(int(rest), {"said": self.headers.get("Authorization")}),
            "later": lambda: self.answer(429, {}, {"Retry-After": "1"}) if times < 2 else self.answer(200, rewards),
            "much-later": lambda: self.answer(429, {}, {"Retry-After": "3600"}),
            "date": lambda: self.answer(503, {}, {"Retry-After": formatdate(time.time() + 3600, usegmt=True)}),
            "redirect": lambda: self.answer(307, {}, {"Location": self.server.elsewhere}),
            "garbage": lambda: self.raw(200, b"{'rewards': [1.0]}"),
            "huge": lambda: self.raw(200, b"[" + b"0," * 200_000 + b"0]"),
            "half": lambda: self.raw(200, b'{"rewards": [1.0', length=1000),
            "drip": self.drip,
            "hang": lambda: time.sleep(5),
            "not-http": lambda: self.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"),
            "short": lambda: self.answer(200, {"rewards": [1.0]}),
            "some": lambda: self.answer(200, {"rewards": [1.0, "no such test case", None]}),
            "together": self.together,
        }
        acts[name]()
        self.close_connection = True

    def answer(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        self.raw(status, json.dumps(body).encode(), headers=headers)

    def raw(self, status: int, text: bytes, length: int | None = None, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text) if length is None else length))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text)

    def drip(self) -> None:
        """A byte every 0.1 s: no single read is ever late."""
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        for _ in range(100):
            self.wfile.write(b" ")
            time.sleep(0.1)

    def together(self) -> None:
        with self.server.lock:
            self.server.together += 1
            self.server.most_together = max(self.server.most_together, self.server.together)
        time.sleep(0.1)
        with self.server.lock:
            self.server.together -= 1
        self.answer(200, {})

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def stub() -> Iterator[Stub]:
    server = Stub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def reward(stub: Stub, path: str, completions: list[str] | None = None, **options: Any) -> list[Any]:
    completions = ["a", "bb", "ccc"] if completions is None else completions
    settings = {"timeout_s": 2.0, "total_timeout_s": 8.0, "max_retries": 2} | options
    columns = {name: [value] * len(completions) for name, value in (("prompts", "p"), ("answers", "3"), ("level", 1))}
    return http_reward(completions, url=f"{stub.url}/{path}", **settings, **columns)


def test_a_service_gets_all_samples_at_once_and_the_columns_it_wants(stub: Stub) -> None:
    assert reward(stub, "ok", columns=["level"]) == [1.0, 2.0, 3.0]
    ((path, headers, body, _),) = stub.seen
    assert path == "/ok" and "Authorization" not in headers
    assert body == {"completions": ["a", "bb", "ccc"], "prompts": ["p"] * 3, "answers": ["3"] * 3, "level": [1] * 3}
    with pytest.raises(ValueError, match="no record has levle"):
        reward(stub, "ok", columns=["levle"])


def test_the_token_comes_from_the_environment_and_stays_out_of_messages(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADER_TOKEN", TOKEN)
    assert reward(stub, "ok", token_env="GRADER_TOKEN") == [1.0, 2.0, 3.0]
    assert stub.seen[0][1]["Authorization"] == f"Bearer {TOKEN}"
    refused = reward(stub, "status/401", token_env="GRADER_TOKEN")
    assert "401 Unauthorized (is the token in GRADER_TOKEN right?)" in str(refused[0])
    assert TOKEN not in str(refused[0]) and "<token>" in str(refused[0])  # the service had repeated it
    assert len(stub.seen) == 2  # once each: a wrong token does not become right
    monkeypatch.delenv("GRADER_TOKEN")
    with pytest.raises(RewardError, match="token_env names GRADER_TOKEN, and no such variable"):
        reward(stub, "ok", token_env="GRADER_TOKEN")
    with pytest.raises(RewardError, match="a url with a user or password"):
        Service(f"http://user:{TOKEN}@127.0.0.1/")


def test_a_redirect_is_not_followed_and_the_token_stays_here(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADER_TOKEN", TOKEN)
    with socket.create_server(("127.0.0.1", 0)) as canary:
        canary.settimeout(0.2)
        stub.elsewhere = f"http://127.0.0.1:{canary.getsockname()[1]}/"
        assert "a redirect is not followed" in str(reward(stub, "redirect", token_env="GRADER_TOKEN")[0])
        with pytest.raises(TimeoutError):
            canary.accept()
    assert len(stub.seen) == 1


def test_retries_are_bounded_and_succeed_when_the_service_recovers(stub: Stub) -> None:
    assert reward(stub, "twice") == [1.0, 2.0, 3.0]
    assert len(stub.seen) == 3
    failed = reward(stub, "status/500")
    assert "500 Internal Server Error (attempt 3 of as many)" in str(failed[0]) and len(stub.seen) == 6
    assert "404 Not Found" in str(reward(stub, "status/404")[0]) and len(stub.seen) == 7
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        stub_url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        (refused,) = ask(Service(stub_url, max_retries=1), [{}])
    assert "ClientConnectorError" in str(refused) and "attempt 2 of as many" in str(refused)


def test_waits_are_random_within_a_bound_that_doubles(stub: Stub) -> None:
    """Thirty requests of two attempts: the waits between them spread over [0, FIRST_WAIT_S]."""
    ask(Service(f"{stub.url}/status/500", max_retries=1, concurrency=30), [{"at": i} for i in range(30)])
    waits = []
    for i in range(30):
        first, second = [seen[3] for seen in stub.seen if seen[2]["at"] == i]
        waits.append(second - first)
    assert max(waits) - min(waits) > FIRST_WAIT_S / 4  # without jitter they would all be the same


def test_retry_after_is_obeyed_or_given_up_on(stub: Stub) -> None:
    assert reward(stub, "later") == [1.0, 2.0, 3.0]
    assert stub.seen[1][3] - stub.seen[0][3] >= 1.0
    started = time.monotonic()
    for path in ("much-later", "date"):
        failed = reward(stub, path)
        assert "total_timeout_s = 8 leaves no time for the wait of 3" in str(failed[0]), failed
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("path", "said", "attempts"),
    [
        ("drip", "no whole answer within timeout_s = 0.5 (attempt 2 of as many)", 2),
        ("hang", "no whole answer within timeout_s = 0.5 (attempt 2 of as many)", 2),
        ("half", "ClientPayloadError", 2),
        ("garbage", "not JSON", 1),
        ("not-http", "Bad status line", 1),
        ("huge", "more than max_response_bytes = 65536", 1),
        ("short", "expected {'rewards': [3 numbers]}, found {'rewards': [1.0]}", 1),
    ],
)
def test_answers_that_are_none(stub: Stub, path: str, said: str, attempts: int) -> None:
    failed = reward(stub, path, timeout_s=0.5, max_retries=1, max_response_bytes=65536)
    assert all(isinstance(value, ServiceError) and said in str(value) for value in failed), failed
    assert (len(failed), len(stub.seen)) == (3, attempts)


def test_the_total_deadline_ends_everything(stub: Stub) -> None:
    started = time.monotonic()
    answers = ask(Service(f"{stub.url}/hang", timeout_s=4, total_timeout_s=1, concurrency=2), [{}] * 5)
    assert time.monotonic() - started < 3
    assert ["no answer within total_timeout_s = 1" in str(answer) for answer in answers] == [True] * 5
    assert len(stub.seen) == 2  # no more than may run at the same time


def test_no_more_requests_than_configured_run_together(stub: Stub) -> None:
    assert ask(Service(f"{stub.url}/together", concurrency=3), [{}] * 9) == [{}] * 9
    assert stub.most_together == 3


def test_what_one_sample_lacks_costs_that_sample_alone(stub: Stub) -> None:
    functions = [RewardFunction("http", 1.0, {"url": f"{stub.url}/some"})]
    workers = RewardWorkers(RewardConfig(functions=functions, workers=1))
    columns = {"completions": "x", "prompts": "p", "answers": "3", "url": "a record's own field, not the option"}
    results = workers.score([RewardInput("p", i, columns) for i in range(3)])
    workers.close()
    assert [result.total for result in results] == [1.0, None, None]
    assert "no such test case" in results[1].error and "returned None, expected a number" in results[2].error


def test_a_service_has_to_end_before_its_worker_is_killed() -> None:
    with pytest.raises(RewardError, match=r"total_timeout_s = 120 does not end before reward.timeout_s = 10"):
        RewardWorkers(RewardConfig(functions=[RewardFunction("judge", 1.0, {"url": "http://127.0.0.1:1"})]))


def reply(*texts: str) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}} for text in texts]}


@pytest.mark.parametrize(
    ("texts", "options", "expected"),
    [
        (["Good. Score: 7"], {}, 0.7),
        (["score 2 was too low.\n**Score:** 8.5"], {}, 0.85),
        (["Score: 10", "Score: 0", "Score: 5"], {}, 0.5),
        (["Score: 3"], {"lowest": 1, "highest": 5}, 0.5),
        (["<verdict>B</verdict>"], {"pattern": "<verdict>(.)</verdict>", "scores": {"A": 1.0, "B": -1.0}}, -1.0),
        (["I cannot say"], {}, "has no match of"),
        (["Score: 11"], {}, "11, which is not from 0 to 10"),
        (["[[C]]"], {"pattern": r"\[\[(.)\]\]", "scores": {"A": 1.0}}, "'C', which is none of A"),
        (["[[C]]"], {"pattern": r"\[\[(.)\]\]"}, "'C', which is no number"),
        ([], {}, "without choices"),
    ],
)
def test_verdicts(texts: list[str], options: dict[str, Any], expected: float | str) -> None:
    settings = {"pattern": r"(?i)score\W{0,6}([-+]?\d+(?:\.\d+)?)", "scores": None, "lowest": 0.0, "highest": 10.0}
    found = mean_score(reply(*texts), **settings | options)
    if isinstance(expected, str):
        assert isinstance(found, ServiceError) and expected in str(found)
    else:
        assert found == pytest.approx(expected)


def test_templates_take_columns_and_say_what_they_lack() -> None:
    columns = {"prompts": ["2+2="], "answers": ["4"], "rubric": ["be {kind}"]}
    assert filled("{rubric}|{prompt}{completion}|{answer}|{{}}", 0, ["{5}"], columns) == "be {kind}|2+2={5}|4|{}"
    assert "[response]\n{5}\n" in filled(TEMPLATE, 0, ["{5}"], columns)
    with pytest.raises(ValueError, match=r"template has \{rubrik\}"):
        filled("{rubrik}", 0, ["5"], columns)


def test_not_a_chat_completion(stub: Stub) -> None:
    (found,) = judge_reward(["a"], url=f"{stub.url}/ok", prompts=["p"], answers=["1"], model="m")
    assert "not a chat completion (KeyError: 'choices')" in str(found)
    ((path, _, body, _),) = stub.seen
    assert path == "/ok/v1/chat/completions" and (body["n"], body["temperature"]) == (1, 0.0)
    (found,) = reward_model_reward(["a"], ["p"], url=f"{stub.url}/ok", model="m")
    assert "not an answer of /classify (KeyError: 'data')" in str(found)
    assert stub.seen[1][2] == {"model": "m", "use_activation": False, "input": ["pa"]}
    reward_model_reward(["a"], ["p"], url=f"{stub.url}/ok", chat=True, prompt_field="question", question=["q"])
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert stub.seen[2][2]["messages"] == talk
