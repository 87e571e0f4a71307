"""A stand-in for a vLLM server: it speaks vLLM's calls, joins the real group, and generates nonsense.

It receives with the same `wire` as `megarl.rollout.receiver`, into a dictionary.
"""

from __future__ import annotations

import json
import random
import threading
import time
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
import torch.distributed as dist

from megarl.rollout import wire
from megarl.weights.checksums import checksum

CPU = torch.device("cpu")
EOS, TOKENS = 1, range(3, 18)


class Backlog(ThreadingHTTPServer):
    request_queue_size = 512  # connections that wait to be taken
    daemon_threads = True


class StandIn:
    """A stand-in. ``breaks``: {call: how often it fails with 500}; ``dies_at``: the bucket at which it is gone;
    ``freezes_at``: the bucket, or the call, from which on it neither answers nor hangs up until `thaw` (at a call it
    still says that it is well)."""

    def __init__(
        self,
        breaks: dict[str, int] | None = None,
        dies_at: int | None = None,
        flips: bool = False,
        token: str = "secret",
        freezes_at: str | None = None,
    ) -> None:
        self.freezes_at, self.awake = freezes_at, threading.Event()
        self.awake.set()
        self.breaks, self.dies_at, self.flips = dict(breaks or {}), dies_at, flips
        self.calls: list[str] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.names: set[str] = set()
        self.version, self.paused, self.active, self.dead = "default", False, False, False
        self.groups: list[wire.Group] = []
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer()

            def do_POST(self) -> None:
                self.answer()

            def answer(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
                path = self.path.partition("?")[0].rpartition("/")[2]
                stand_in.calls.append(path)
                if path == stand_in.freezes_at:
                    stand_in.awake.clear()
                if path != "health" or stand_in.freezes_at == "all":
                    stand_in.awake.wait()
                try:
                    assert self.headers["Authorization"] == f"Bearer {token}"
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
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments: object) -> None:
                pass

        self.http = Backlog(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def die(self) -> None:
        self.dead = True
        self.http.shutdown()
        self.http.server_close()
        for group in self.groups:
            group.close()

    def thaw(self) -> None:
        """As after a restart: what it was in the middle of is forgotten."""
        self.freezes_at, self.active, self.groups = None, False, []
        self.awake.set()

    def health(self) -> None:
        pass

    def get_world_size(self) -> dict[str, int]:
        return {"world_size": 1}

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        assert self.names == set(self.weights) and not self.active, "resumed without a whole set of weights"
        self.paused = False

    def init_weight_transfer_engine(self, init_info) -> None:
        store = dist.TCPStore(
            init_info["host"], init_info["port"], is_master=False, timeout=timedelta(seconds=init_info["timeout_s"])
        )
        where = init_info["first_rank"], init_info["size"], CPU, init_info["timeout_s"]
        self.groups = [wire.Group.join(store, *where, sender) for sender in range(init_info["senders"])]

    def start_weight_update(self) -> None:
        if self.active:
            raise RuntimeError("start_weight_update called while a weight update is already active")
        self.active, self.weights = True, {}

    def update_weights(self, update_info) -> None:
        assert self.active and self.paused and self.groups
        try:
            self.names = set(update_info["names"])
            metadata = wire.understood(update_info["names"], update_info["shapes"], update_info["dtypes"])
            buckets = (
                (self.groups[sender], bucket)
                for sender, share in wire.shares_of(metadata, update_info["senders"])
                for bucket in wire.buckets_of(share, update_info["bucket_bytes"])
            )
            for number, (group, bucket) in enumerate(buckets):
                if str(number) == self.freezes_at:
                    self.freezes_at = "all"
                    self.awake.clear()
                    self.awake.wait()
                    raise ConnectionAbortedError
                if number == self.dies_at:
                    self.die()
                    raise ConnectionAbortedError
                buffer, tensors = wire.views(bucket, CPU)
                group.broadcast(buffer)
                if update_info["verify"]:
                    sent = torch.zeros(1, dtype=torch.int64)
                    group.broadcast(sent)
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

    def weight_info(self) -> dict[str, str]:
        return {"weight_version": self.version}

    def generate(
        self, token_ids: list[int], sampling_params: dict[str, Any], cache_salt: str | None = None
    ) -> dict[str, Any]:
        """Up to as many random tokens as allowed, some milliseconds each; those after a pause are of new weights."""
        chance, out, versions = random.Random(), [], []
        while len(out) < sampling_params["max_tokens"] and EOS not in out:
            time.sleep(chance.choice([0, 0.001, 0.003]))
            while self.paused:
                time.sleep(0.001)
            if self.dead:
                raise ConnectionAbortedError
            out.append(chance.choice([EOS, *TOKENS]))
            versions.append(self.version)
        starts = [i for i, version in enumerate(versions) if i == 0 or version != versions[i - 1]]
        spans = zip(starts, [*starts[1:], len(out)], strict=True)
        choice = {
            "token_ids": out,
            "finish_reason": "stop" if out[-1] == EOS else "length",
            "logprobs": {"content": [{"logprob": -2.77} for _ in out]},  # log(1 / 16)
            "weight_versions": [{"version": versions[start], "start": start, "end": end} for start, end in spans],
        }
        return {"choices": [choice]}
