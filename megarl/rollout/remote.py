"""vLLM servers in other processes, as the receiver of a push: `megarl.weights.sync.push` does not see the difference.

Rank 0 of the trainer talks HTTP to the servers and broadcasts the weights; all other ranks only take part in putting
tensors together. The servers' side is `megarl.rollout.receiver`, which also says how to start them.
"""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megarl.parallel.mesh import Mesh
from megarl.rollout import wire
from megarl.weights.plan import EVERYTHING, Box, Item, Needs
from megarl.weights.rules import CanonTensor
from megarl.weights.stream import Deal


class RemoteError(RuntimeError):
    """A server refused a call or did not answer."""


def to_sender(mesh: Mesh) -> Deal:
    """For `RemoteEngines`: rank 0 gets every tensor, the others none."""

    def needs(position: int, tensor: CanonTensor, name: str) -> Box | None:
        return EVERYTHING if mesh.replica_ranks[position] == 0 else None

    def deal(items: list[Item]) -> tuple[list[Item], Needs]:
        return items, needs

    return deal


class RemoteEngines:
    """Servers that are given weights together. Every rank of the trainer makes one; methods are collectives."""

    def __init__(
        self,
        urls: Sequence[str],
        mesh: Mesh,
        metadata: wire.Metadata,
        bucket_bytes: int,
        *,
        host: str = "",
        timeout_s: float = 600,
    ) -> None:
        """
        Args:
            metadata: what every push brings: `WeightStream.metadata`.
            host: an address of rank 0's machine that the servers reach; its host name if empty.
            timeout_s: the longest that one call, or one exchange, may take.
        """
        self._urls = list(urls)
        self._mesh = mesh
        self._metadata = metadata
        self._bucket_bytes = bucket_bytes
        self._timeout_s = timeout_s
        self._pool = ThreadPoolExecutor(len(self._urls) + 1)
        self._group = self._meet(host or socket.gethostname()) if mesh.rank == 0 else None

    def _meet(self, host: str) -> wire.Group:
        sizes = [self._call(url, "get_world_size")["world_size"] for url in self._urls]
        size = 1 + sum(sizes)
        store = dist.TCPStore(
            host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=self._timeout_s)
        )
        answers = []
        for k, url in enumerate(self._urls):
            info = {"host": host, "port": store.port, "first_rank": 1 + sum(sizes[:k]), "size": size}
            info["timeout_s"] = self._timeout_s
            answers.append(self._pool.submit(self._call, url, "init_weight_transfer_engine", {"init_info": info}))
        group = wire.Group.join(store, 0, size, self._mesh.device, self._timeout_s)
        for answer in answers:
            answer.result()
        return group

    def wake_weights(self) -> None:
        self._everywhere("pause?mode=keep")

    def wake_kv_cache(self) -> None:
        self._everywhere("resume")

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Send a whole stream of weights. On other ranks than 0, help to put it together."""
        if self._group is None:
            assert next(weights, None) is None, "only rank 0 is given tensors: make the stream with to_sender(mesh)"
            return
        self._everywhere("start_weight_update")
        announced = {"update_info": wire.described(self._metadata) | {"bucket_bytes": self._bucket_bytes}}
        answers = [self._pool.submit(self._call, url, "update_weights", announced) for url in self._urls]
        for bucket in wire.buckets_of(self._metadata, self._bucket_bytes):
            self._group.broadcast(wire.fill(bucket, weights, self._mesh.device))
        assert next(weights, None) is None, "the stream has more tensors than its metadata says"
        for answer in answers:
            answer.result()
        self._everywhere("finish_weight_update", {})
        self._everywhere("reset_prefix_cache")

    def checksums(self) -> dict[str, int]:
        """Of everything that the servers compute with; empty on other ranks than 0."""
        out: dict[str, int] = {}
        for url, answer in zip(
            self._urls, self._everywhere("collective_rpc", {"method": "megarl_checksums"}), strict=False
        ):
            for worker, sums in enumerate(answer["results"]):
                out |= {f"{url} worker {worker}: {name}": value for name, value in sums.items()}
        return out

    def spoil(self) -> None:
        """Make all weights useless, so that the next load shows which of them it brings."""
        self._everywhere("collective_rpc", {"method": "megarl_spoil"})

    def _everywhere(self, path: str, body: dict[str, Any] | None = None) -> list[Any]:
        if self._group is None:
            return []
        return list(self._pool.map(lambda url: self._call(url, path, body or {}), self._urls))

    def _call(self, url: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{url}/{path}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise RemoteError(f"{url}/{path}: {error.code} {error.read()[:500].decode(errors='replace')}") from error
        except OSError as error:
            raise RemoteError(f"{url}/{path}: {error}") from error
        return json.loads(text) if text else None
