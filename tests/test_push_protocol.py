"""Pushes to servers that die, fail or come late: stand-ins that speak vLLM's calls and join the real group.

Real servers are in tests/test_remote.py and tests/distributed/test_remote_failures.py.
"""

from __future__ import annotations

import threading
import time
import types
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from megarl.rollout import remote as module
from megarl.rollout.answers import RemoteError
from megarl.rollout.remote import RemoteEngines, Sender
from tests.standin import CPU, StandIn

WEIGHTS = {f"layer.{i}.weight": torch.arange(64.0) + i for i in range(6)}  # 256 bytes each
METADATA = [(name, (64,), torch.float32) for name in WEIGHTS]
BUCKET = 512  # two of them


class Server(StandIn):
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


@pytest.mark.parametrize(("freezes_at", "on_update"), [("0", "recompute"), ("2", "recompute"), ("pause", "keep_kv")])
def test_one_that_stands_still_in_a_push_is_left_out_of_it(monkeypatch, freezes_at, on_update):
    """At a bucket, or at a call though it says that it is well: as a machine that is gone, which closes no connection.
    The next pushes ask it again, and wait for it less."""
    monkeypatch.setattr(module, "_PROBE_S", 1.0)
    monkeypatch.setattr(module, "_SECOND_PROBE_S", 0.1)
    monkeypatch.setattr(module, "_EXCHANGE_S", 1.0)
    still, other = Server(freezes_at=freezes_at), Server()
    engines = engines_of([still.url, other.url], on_update=on_update, timeout_s=600, wait_s=60)
    started = time.monotonic()
    push(engines, 1)
    assert time.monotonic() - started < 20
    assert engines.urls == [other.url] and other.good and other.version == "1" and not other.paused
    started = time.monotonic()
    push(engines, 2)
    assert engines.urls == [other.url] and other.version == "2" and time.monotonic() - started < 3
    still.thaw()
    push(engines, 3)
    assert sorted(engines.urls) == sorted([still.url, other.url]) and still.good and still.version == "3"
    engines.close()


def test_without_a_server_that_resumes_the_next_push_finds_some():
    server = Server(breaks={"resume": 1})
    engines = engines_of([server.url])
    push(engines, 1)
    assert engines.urls == [] and server.paused
    push(engines, 1)
    assert engines.urls == [server.url] and server.good and not server.paused
    engines.close()


def test_servers_that_never_resume_end_the_run():
    server = Server(breaks={"resume": 9})
    engines = engines_of([server.url])
    push(engines, 1)
    push(engines, 1)
    with pytest.raises(RemoteError, match=r"after 3 pushes in a row no server went on to generate: .*resume breaks"):
        push(engines, 1)
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
