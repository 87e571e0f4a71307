"""vLLM servers in other processes, as the receiver of a push: `megarl.weights.sync.push` does not see the difference.

Rank 0 of the trainer talks HTTP to the servers. Weights come from one rank of each pipeline stage, in a group that this
rank has with all servers' workers, one stage after the other: they do not pass through rank 0, and no rank puts
together more than its stage. All other ranks only take part in that. The servers' side is `megarl.rollout.receiver`,
and `megarl.rollout.serve` starts them.

Servers come and go. Every push goes to those that are found at its beginning; when one is lost on the way, the others
are sent everything again, in a new group, and none of them generates before it has a whole set of weights. Whatever
happens on a rank that sends, all ranks hear the same verdict: none is left in a collective.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from megarl.parallel.collectives import gather_objects
from megarl.parallel.mesh import Mesh
from megarl.rollout import wire
from megarl.rollout.answers import RemoteError, apart, await_all, first_error
from megarl.rollout.auth import DIRECT
from megarl.weights.checksums import checksum
from megarl.weights.plan import EVERYTHING, Box, Holders, Item, Needs
from megarl.weights.rules import CanonTensor
from megarl.weights.stream import Deal, WeightStream

OnUpdate = Literal["recompute", "keep_kv", "wait"]
# What becomes of requests that a push meets. That clear_cache is "ignored when mode=keep", as vLLM 0.32 says, is wrong:
# it preempts all of them, and their cache is computed anew with the new weights.
_PAUSE = {
    "recompute": "pause?mode=keep&clear_cache=true",
    "keep_kv": "pause?mode=keep&clear_cache=false",
    "wait": "pause?mode=wait&clear_cache=true",
}
_INIT = "init_weight_transfer_engine"
_LOOK_AGAIN_S = 1.0
_PROBE_S = 10.0  # for a server that should answer at once
_SECOND_PROBE_S = 2.0  # for one that did not, the last time: all others are paused meanwhile
_EXCHANGE_S = 120.0  # for one bucket, to meet, or for a call: what a failure costs that nobody notices
_FRUITLESS = 3  # pushes that fail without the loss of a server
T = TypeVar("T")


def to_senders(mesh: Mesh) -> Deal:
    """For `RemoteEngines`: each tensor goes to the first rank of the first pipeline stage that holds it, of all ranks
    of the job; stages come one after the other."""
    stage = mesh.world_size // mesh.pp_size  # ranks of one

    def deal(items: list[Item], holders: Holders) -> tuple[list[Item], Needs]:
        held_by = {item.name: mesh.replica_ranks[holders.first(item.parts[0].name, 0)] for item in items}
        sender = {name: rank // stage * stage for name, rank in held_by.items()}

        def needs(position: int, tensor: CanonTensor, name: str) -> Box | None:
            return EVERYTHING if mesh.replica_ranks[position] == sender[name] else None

        return sorted(items, key=lambda item: sender[item.name]), needs

    return deal


@dataclass(frozen=True)
class Senders:
    """Which ranks send, and what."""

    ranks: list[int]
    of: list[int]  # of each tensor, the place of its sender in `ranks`

    @classmethod
    def of_stream(cls, stream: WeightStream) -> Senders:
        """Of a stream that was dealt `to_senders`. Nobody sends of a model replica without rank 0."""
        by_tensor = [ranks[0] for ranks in stream.receivers if ranks]
        ranks = sorted(set(by_tensor))
        return cls(ranks, [ranks.index(rank) for rank in by_tensor])


@dataclass(frozen=True)
class Meeting:
    """Where senders and servers' workers meet."""

    urls: list[str]
    host: str
    port: int
    sizes: list[int]  # workers of each server
    timeout_s: float

    @property
    def size(self) -> int:
        """Of each group: a sender, and all workers."""
        return 1 + sum(self.sizes)

    def information(self, senders: int) -> dict[str, dict[str, Any]]:
        """What each server's workers are told."""
        shared = {"host": self.host, "port": self.port, "size": self.size, "timeout_s": self.timeout_s}
        return {
            url: {"init_info": shared | {"senders": senders, "first_rank": 1 + sum(self.sizes[:k])}}
            for k, url in enumerate(self.urls)
        }


class Sender:
    """A sender's end: the group that it broadcasts weights in and, on rank 0, the servers. Every method raises
    RemoteError. Those that all senders call are `join`, `send`, `leave` and `close`; the others are rank 0's."""

    def __init__(
        self,
        find: Callable[[], Sequence[str]],
        metadata: wire.Metadata,
        bucket_bytes: int,
        device: torch.device,
        *,
        senders: Senders | None = None,
        rank: int = 0,
        token: str | None = None,
        on_update: OnUpdate = "recompute",
        min_engines: int = 1,
        wait_s: float = 600,
        timeout_s: float = 600,
        verify: bool = False,
    ) -> None:
        """
        Args:
            find: the addresses of the servers that should be there now.
            metadata: what every push brings: `WeightStream.metadata`.
            senders: who sends it; None: rank 0 alone.
            rank: which of them this is.
            token: what servers want to hear from those they obey.
            on_update: what becomes of requests that a push meets.
            min_engines, wait_s: how many servers there have to be, and how long to wait for them.
            timeout_s: the longest that a push may take, or, with ``on_update`` wait, the requests that it meets. What
                ends sooner has `_EXCHANGE_S`.
            verify: compare checksums of every bucket at both ends.
        """
        self.urls: list[str] = []  # the servers that have the weights, or are being given them
        self.version = 0
        self._senders = senders or Senders([0], [0] * len(metadata))
        self._place, self._lead = self._senders.ranks.index(rank), rank == 0
        self._answers: dict[str, Future[Any]] = {}  # of the servers, to what is being sent
        self._silent: set[str] = set()  # those that did not answer the last push
        self._none_resumed = 0  # pushes in a row
        self._store: dist.TCPStore | None = None  # rank 0's, in which all meet
        self._find, self._metadata, self._bucket_bytes, self._device = find, metadata, bucket_bytes, device
        self._token, self._on_update, self._verify = token, on_update, verify
        self._min_engines, self._wait_s, self._timeout_s = min_engines, wait_s, timeout_s
        self._patience = min(timeout_s, _EXCHANGE_S)
        # A thread for every server: a call of a push comes back only when all servers have been called.
        self._pool = ThreadPoolExecutor(4096, thread_name_prefix="megarl-push")
        self._group: wire.Group | None = None

    def invite(self, began: float, failures: Sequence[str]) -> Meeting | None:
        """Pause every server that answers, and say where to meet with all of them; None where all have met before.
        Waits until there are enough.

        Args:
            began: when this was first tried.
            failures: what came of the meeting that was tried last.
        """
        words = list(failures)
        hurry = self._silent  # but for those that have to be waited for
        while True:
            found = list(self._find())
            answers = self._each(found, partial(self._pause, hurry=hurry))
            self._silent = {url for url, answer in answers.items() if isinstance(answer, RemoteError)}
            alive = [url for url, answer in answers.items() if not isinstance(answer, RemoteError)]
            words += [str(answer) for answer in answers.values() if isinstance(answer, RemoteError)]
            if len(alive) >= self._min_engines and not failures:
                if self._group is not None and alive == self.urls:
                    return None
                try:
                    return self._open(alive)
                except RemoteError as error:  # one was lost in between
                    words.append(str(error))
            if time.monotonic() > began + self._wait_s:
                said = "".join(f"\n  {line}" for line in words) or " none was found"
                raise RemoteError(
                    f"{len(alive)} of {self._min_engines} servers (rollout.min_engines) answer after {self._wait_s:.0f}"
                    f" s (rollout.engine_timeout_s):{said}"
                )
            time.sleep(_LOOK_AGAIN_S)
            words, failures, hurry = [], (), set()

    def _pause(self, url: str, hurry: set[str]) -> None:
        # Its answer does not take long: a machine that is gone costs no more than that.
        self._call(url, "health", timeout=_SECOND_PROBE_S if url in hurry else _PROBE_S)
        if self._on_update == "wait":  # until its requests have ended; other ranks wait for this one, but no longer
            patience = self._timeout_s / 2
        else:
            patience = _PROBE_S if url in hurry else self._patience  # an engine may stand still behind a server
        self._call(url, _PAUSE[self._on_update], timeout=min(patience, self._timeout_s))

    def _open(self, urls: list[str]) -> Meeting:
        """A store to meet in."""
        local = all(urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1") for url in urls)
        host = "127.0.0.1" if local else socket.gethostname()
        sizes = [
            answer["world_size"]
            for answer in self._all(urls, partial(self._call, path="get_world_size", timeout=_PROBE_S))
        ]
        self.leave()
        self._store = dist.TCPStore(
            host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=self._patience)
        )
        return Meeting(urls, host, self._store.port, sizes, self._patience)

    def join(self, meeting: Meeting) -> None:
        """A new group, of this rank and every worker of the servers."""
        answers: dict[str, Future[Any]] = {}
        if self._lead:
            told = meeting.information(len(self._senders.ranks))
            answers = {url: apart(self._call, url, _INIT, told[url]) for url in meeting.urls}
        else:
            self.leave()
        patience = timedelta(seconds=meeting.timeout_s)
        try:
            store = self._store or dist.TCPStore(meeting.host, meeting.port, is_master=False, timeout=patience)
            group = wire.Group.join(store, 0, meeting.size, self._device, meeting.timeout_s, self._place)
        except RuntimeError as error:
            raise RemoteError(f"no group with {', '.join(meeting.urls)}: {error}; {first_error(answers)}") from error
        self.urls, self._group = meeting.urls, group
        await_all(answers, self._patience)

    def begin(self) -> None:
        """Tell the servers what comes."""
        self._all(self.urls, self._start)
        announced = wire.described(self._metadata) | {"bucket_bytes": self._bucket_bytes, "verify": self._verify}
        body = {"update_info": announced | {"senders": self._senders.of}}
        self._answers = {
            url: apart(self._call, url, "update_weights", body, timeout=self._timeout_s) for url in self.urls
        }

    def send(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Send this sender's share of a stream of weights to the servers, which were told."""
        assert self._group is not None, "join() comes first"

        def watch() -> None:
            for answer in self._answers.values():  # before the last bucket only failures are answered
                if answer.done() and (error := answer.exception()) is not None:
                    raise error

        shares = wire.shares_of(self._metadata, self._senders.of)
        share = [entry for sender, entries in shares if sender == self._place for entry in entries]
        try:
            for bucket in wire.buckets_of(share, self._bucket_bytes):
                buffer = wire.fill(bucket, weights, self._device)
                self._group.broadcast(buffer, watch)
                if self._verify:
                    sums = torch.tensor([checksum(buffer)], dtype=torch.int64, device=self._device)
                    self._group.broadcast(sums, watch)
            if next(weights, None) is not None:
                raise ValueError("the stream has more tensors than its metadata says")
        except RuntimeError as error:
            self.leave()  # so that servers which wait for this rank hear of it
            said = first_error(self._answers)
            self._silent |= {url for url, answer in self._answers.items() if not answer.done()}
            raise RemoteError(f"{error}; {said}") from error

    def finish(self) -> None:
        """All of it was sent, by all senders."""
        await_all(self._answers, self._patience)
        self._all(self.urls, lambda url: self._call(url, "finish_weight_update", {"weight_version": str(self.version)}))

    def _start(self, url: str) -> None:
        try:
            self._call(url, "start_weight_update", {})
        except RemoteError as error:
            if "already active" not in str(error):
                raise
            # Some of its workers are still in an update that others, or a trainer that is gone, did not end; those that
            # are not refuse to end it.
            ended = self._each([url], lambda url: self._call(url, "finish_weight_update", {}))
            try:
                self._call(url, "start_weight_update", {})
            except RemoteError as again:
                raise RemoteError(f"{again}; {ended[url]}") from error

    def resume(self) -> None:
        """Let the servers generate. One that is lost now is left to the next push, which comes at once where none is
        left and something is asked for."""
        answers = self._each(self.urls, lambda url: self._call(url, "resume", {}))
        lost = [answer for answer in answers.values() if isinstance(answer, RemoteError)]
        self.urls = [url for url, answer in answers.items() if not isinstance(answer, RemoteError)]
        if lost:
            self.leave()
        self._none_resumed = 0 if self.urls else self._none_resumed + 1
        if self._none_resumed == _FRUITLESS:
            raise RemoteError(f"after {_FRUITLESS} pushes in a row no server went on to generate: {lost[0]}")

    def ask(self, method: str) -> dict[str, list[Any]]:
        """What every worker of every server returns from a method of `megarl.rollout.receiver.Receiver`."""
        call = partial(self._call, path="collective_rpc", body={"method": method}, timeout=self._timeout_s)
        answers = self._all(self.urls, call)
        return {url: answer["results"] for url, answer in zip(self.urls, answers, strict=True)}

    def leave(self) -> None:
        """Leave the group; the next `join` makes another."""
        if self._group is not None:
            self._group.close()
        self._group = self._store = None

    def close(self) -> None:
        self.leave()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _each(self, urls: Sequence[str], call: Callable[[str], Any]) -> dict[str, Any]:
        """Each server's answer, or the RemoteError in its place."""

        def caught(url: str) -> Any:
            try:
                return call(url)
            except RemoteError as error:
                return error

        return dict(zip(urls, self._pool.map(caught, urls), strict=True))

    def _all(self, urls: Sequence[str], call: Callable[[str], Any]) -> list[Any]:
        """All servers' answers, in order."""
        answers = self._each(urls, call)
        for answer in answers.values():
            if isinstance(answer, RemoteError):
                raise answer
        return list(answers.values())

    def _call(self, url: str, path: str, body: dict[str, Any] | None = None, timeout: float | None = None) -> Any:
        """POST, or GET without a body where that is what vLLM takes."""
        data = None if path in ("health", "get_world_size") else json.dumps(body or {}).encode()
        headers = {"Content-Type": "application/json"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        request = urllib.request.Request(f"{url}/{path}", data, headers)
        try:
            with DIRECT.open(request, timeout=timeout or self._patience) as answer:
                text = answer.read()
            return json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            with contextlib.suppress(OSError, http.client.HTTPException):  # it may die while it says why
                raise RemoteError(
                    f"{url}/{path}: {error.code} {error.read()[:500].decode(errors='replace')}"
                ) from error
            raise RemoteError(f"{url}/{path}: {error.code}") from error
        except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
            raise RemoteError(f"{url}/{path}: {error or type(error).__name__}") from error


class RemoteEngines:
    """Servers that are given weights together. Every rank of the trainer makes one; methods are collectives, and raise
    RemoteError on all ranks or on none."""

    def __init__(self, mesh: Mesh, make: Callable[[], Sender], senders: Sequence[int] = (0,)) -> None:
        """
        Args:
            make: makes a sender's end; it is called on senders only.
            senders: the ranks that send, rank 0 among them: `Senders.ranks`.
        """
        self._mesh = mesh
        self._sender = make() if mesh.rank in senders else None
        self._lead = self._sender if mesh.rank == 0 else None
        self.urls: list[str] = []  # the servers that generate with the weights of the last push
        self.seconds: dict[str, float] = {}  # of the last push, in which servers are paused
        self._began = 0.0

    def announce(self, version: int) -> None:
        """What the next weights are called."""
        if self._lead is not None:
            self._lead.version = version

    def wake_weights(self) -> None:
        self._began = time.monotonic()
        self._gather()

    def _gather(self) -> None:
        """Meet with every server that answers."""
        began, failures = time.monotonic(), list[str]()
        while True:
            meeting = self._on_lead(partial(Sender.invite, began=began, failures=failures))
            if meeting is None:
                return
            failures = self._on_senders(partial(Sender.join, meeting=meeting))
            if not failures:
                return
            self._leave()

    def _leave(self) -> None:
        if self._sender is not None:
            self._sender.leave()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Send a whole stream of weights, again to those that are left where one is lost on the way. On ranks that do
        not send, help to put it together."""
        fruitless = 0
        while (failed := self._attempt(iter(weights))) is not None:
            self._leave()
            before = self._on_lead(lambda lead: list(lead.urls))
            self._gather()
            same = set(self._on_lead(lambda lead: list(lead.urls))) >= set(before)
            fruitless = fruitless + 1 if same else 0
            if fruitless == _FRUITLESS:
                raise RemoteError(f"a push failed {_FRUITLESS} times with the same servers; the last time: {failed}")

    def _attempt(self, weights: Iterator[tuple[str, torch.Tensor]]) -> str | None:
        """Send once. What went wrong, on every rank."""
        try:
            self._on_lead(Sender.begin)
            if self._sender is None and next(weights, None) is not None:
                raise ValueError(
                    "this rank does not send, and was given tensors: make the stream with to_senders(mesh)"
                )
            failures = self._on_senders(partial(_sent, weights=weights))
            if not failures:
                self._on_lead(Sender.finish)
        except RemoteError as error:
            return str(error)
        return failures[0] if failures else None

    def wake_kv_cache(self) -> None:
        self._on_lead(Sender.resume)
        self.urls = self._on_lead(lambda lead: list(lead.urls))
        self.seconds = {"timing_s/push": time.monotonic() - self._began}

    def checksums(self) -> dict[str, int]:
        """Of everything that the servers compute with; empty on other ranks than 0."""
        answers = self._on_lead(lambda lead: lead.ask("megarl_checksums"))
        if self._lead is None:
            return {}
        return {
            f"{url} worker {worker}: {name}": value
            for url, workers in answers.items()
            for worker, sums in enumerate(workers)
            for name, value in sums.items()
        }

    def spoil(self) -> None:
        """Make all weights useless, so that the next load shows which of them it brings."""
        self._on_lead(lambda lead: lead.ask("megarl_spoil"))

    def close(self) -> None:
        if self._sender is not None:
            self._sender.close()

    def _on_lead(self, do: Callable[[Sender], T]) -> T:
        """Rank 0 does something; all ranks get what it returns, or the RemoteError that it raised."""
        outcome: list[Any] = [None, None]
        if self._lead is not None:
            try:
                outcome = [do(self._lead), None]
            except RemoteError as error:
                outcome = [None, str(error)]
        dist.broadcast_object_list(outcome, 0, group=self._mesh.host_group)
        if outcome[1] is not None:
            raise RemoteError(outcome[1])
        return outcome[0]

    def _on_senders(self, do: Callable[[Sender], None]) -> list[str]:
        """All senders do something. What went wrong, on every rank."""
        failed = None
        if self._sender is not None:
            try:
                do(self._sender)
            except RemoteError as error:
                failed = str(error)
        return [words for words in gather_objects(failed, self._mesh.host_group) if words]


def _sent(sender: Sender, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Send a share of a stream, and help with all of it whatever happens: other ranks are in its collectives."""
    try:
        sender.send(weights)
    finally:
        for _ in weights:
            pass
