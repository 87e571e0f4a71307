"""Pushes to servers that die, fail or come late: stand-ins that speak vLLM's calls and join the real group.

A stand-in receives with the same `wire` as `megarl.rollout.receiver`, into a dictionary. The servers themselves are in
tests/test_remote.py and tests/distributed/test_remote_failures.py.
"""

from __future__ import annotations

import json
import threading
import types
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import torch.distributed as dist

from megarl.rollout import remote as module
from megarl.rollout import wire
from megarl.rollout.remote import RemoteEngines, RemoteError, Sender
from megarl.weights.checksums import checksum

CPU = torch.device("cpu")
WEIGHTS = {f"layer.{i}.weight": torch.arange(64.0) + i for i in range(6)}  # 256 bytes each
METADATA = [(name, (64,), torch.float32) for name in WEIGHTS]
BUCKET = 512  # two of them


class Server:
    """A stand-in. ``breaks``: {call: how often it fails with 500}; ``dies_at``: the bucket at which it is gone."""

    def __init__(self, breaks: dict[str, int] | None = None, dies_at: int | None = None, flips: bool = False) -> None:
        self.breaks, self.dies_at, self.flips = dict(breaks or {}), dies_at, flips
        self.calls: list[str] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.version, self.paused, self.active = "default", False, False
        self.group: wire.Group | None = None
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer()

            def do_POST(self) -> None:
                self.answer()

            def answer(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
                path = self.path.lstrip("/").partition("?")[0]
                stand_in.calls.append(path)
                try:
                    assert self.headers["Authorization"] == "Bearer secret"
                    if stand_in.breaks.get(path, 0) > 0:
                        stand_in.breaks[path] -= 1
                        raise RuntimeError(f"{path} breaks")
                    out, code = getattr(stand_in, path)(**body), 200
                except ConnectionAbortedError:
                    self.connection.close()  # it is dead
                    return
                except Exception as error:
                    out, code = str(error), 500
                data = json.dumps(out).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def die(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        if self.group is not None:
            self.group.close()

    def health(self) -> None:
        pass

    def get_world_size(self) -> dict[str, int]:
        return {"world_size": 1}

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        assert self.weights.keys() == WEIGHTS.keys() and not self.active, "resumed without a whole set of weights"
        self.paused = False

    def init_weight_transfer_engine(self, init_info) -> None:
        store = dist.TCPStore(
            init_info["host"], init_info["port"], is_master=False, timeout=timedelta(seconds=init_info["timeout_s"])
        )
        self.group = wire.Group.join(store, init_info["first_rank"], init_info["size"], CPU, init_info["timeout_s"])

    def start_weight_update(self) -> None:
        if self.active:
            raise RuntimeError("start_weight_update called while a weight update is already active")
        self.active, self.weights = True, {}

    def update_weights(self, update_info) -> None:
        assert self.active and self.paused and self.group is not None
        try:
            metadata = wire.understood(update_info["names"], update_info["shapes"], update_info["dtypes"])
            for number, bucket in enumerate(wire.buckets_of(metadata, update_info["bucket_bytes"])):
                if number == self.dies_at:
                    self.die()
                    raise ConnectionAbortedError
                buffer, tensors = wire.views(bucket, CPU)
                self.group.broadcast(buffer)
                if update_info["verify"]:
                    sent = torch.zeros(1, dtype=torch.int64)
                    self.group.broadcast(sent)
                    if self.flips:
                        buffer[3] ^= 1
                    if checksum(buffer) != sent.item():
                        raise RuntimeError(f"a bucket of weights, {bucket[0][0]} to {bucket[-1][0]}, differs")
                self.weights |= {name: tensor.clone() for name, tensor in tensors.items()}
        except BaseException:
            self.active = False
            raise

    def finish_weight_update(self, weight_version=None) -> None:
        if not self.active:
            raise RuntimeError("finish_weight_update called without a matching start_weight_update")
        self.active = False
        self.version = weight_version or self.version

    @property
    def good(self) -> bool:
        return self.weights.keys() == WEIGHTS.keys() and all(
            torch.equal(self.weights[name], tensor) for name, tensor in WEIGHTS.items()
        )


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch) -> Iterator[None]:
    """A job of one rank, and no long pauses."""
    monkeypatch.setattr(module, "_LOOK_AGAIN_S", 0.02)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def engines_of(urls, **more) -> RemoteEngines:
    mesh = types.SimpleNamespace(rank=0, host_group=dist.group.WORLD)
    more = {"token": "secret", "timeout_s": 10, "wait_s": 1} | more
    return RemoteEngines(mesh, lambda: Sender(lambda: list(urls), METADATA, BUCKET, CPU, **more))


def push(engines: RemoteEngines, version: int) -> None:
    engines.announce(version)
    engines.wake_weights()
    engines.load_weights(WEIGHTS.items())
    engines.wake_kv_cache()


def test_all_servers_get_everything_and_the_versions_name():
    servers = [Server() for _ in range(2)]
    engines = engines_of([server.url for server in servers])
    for version in (3, 4):
        push(engines, version)
        assert all(server.good and server.version == str(version) and not server.paused for server in servers)
    assert [server.calls.count("init_weight_transfer_engine") for server in servers] == [1, 1]  # the group stays
    engines.close()


def test_a_server_that_died_before_a_push_is_left_out_and_one_that_came_is_taken_in():
    first, second, third = (Server() for _ in range(3))
    urls = [first.url, second.url]
    engines = engines_of(urls)
    push(engines, 1)
    first.die()
    urls.append(third.url)
    push(engines, 2)
    assert engines.urls == [second.url, third.url]
    assert second.good and third.good and second.version == third.version == "2"
    engines.close()


def test_when_one_dies_in_a_push_the_others_are_sent_everything_again():
    dying, living = Server(dies_at=1), Server()
    engines = engines_of([dying.url, living.url])
    push(engines, 1)
    assert engines.urls == [living.url] and living.good and living.version == "1" and not living.paused
    assert living.calls.count("update_weights") == 2 and not dying.good
    engines.close()


@pytest.mark.parametrize("call", ["start_weight_update", "update_weights", "finish_weight_update"])
def test_a_call_that_fails_once_costs_a_second_push(call):
    """The other server is in the middle of an update then, and its session has to be ended first."""
    breaking, other = Server(breaks={call: 1}), Server()
    engines = engines_of([breaking.url, other.url], timeout_s=2)
    push(engines, 7)
    assert all(server.good and server.version == "7" and not server.paused for server in (breaking, other))
    engines.close()


def test_what_always_fails_ends_the_push_and_nobody_generates_with_half_of_it():
    breaking, other = Server(breaks={"finish_weight_update": 99}), Server()
    engines = engines_of([breaking.url, other.url])
    with pytest.raises(RemoteError, match=r"failed 3 times with the same servers; .*finish_weight_update breaks"):
        push(engines, 1)
    assert breaking.paused and other.paused
    engines.close()


def test_buckets_that_differ_are_found_when_that_is_asked_for():
    flipping = Server(flips=True)
    engines = engines_of([flipping.url], verify=True, timeout_s=2)
    with pytest.raises(RemoteError, match=r"layer\.0\.weight to layer\.1\.weight, differs"):
        push(engines, 1)
    assert flipping.paused
    engines.close()
    fine = Server()
    engines = engines_of([fine.url], verify=True)
    push(engines, 1)
    assert fine.good
    engines.close()


def test_too_few_servers_are_waited_for_and_then_said_to_be_missing():
    server, late = Server(), Server()
    urls = [server.url]
    engines = engines_of(urls, min_engines=2, wait_s=5)
    timer = threading.Timer(0.2, urls.append, [late.url])
    timer.start()
    push(engines, 1)
    assert server.good and late.good
    late.die()
    engines = engines_of(urls, min_engines=2, wait_s=0.1)
    with pytest.raises(RemoteError, match=r"(?s)1 of 2 servers \(rollout\.min_engines\) answer .*Connection refused"):
        push(engines, 2)
    engines.close()


def test_a_server_that_is_lost_as_it_resumes_is_left_to_the_next_push():
    lost, other = Server(breaks={"resume": 1}), Server()
    engines = engines_of([lost.url, other.url])
    push(engines, 1)
    assert engines.urls == [other.url] and lost.paused
    push(engines, 2)
    assert engines.urls == [lost.url, other.url] and lost.good and not lost.paused
    engines.close()
