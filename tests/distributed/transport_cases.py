"""Cases that `RankPool` runs: the same stream of weights by a collective and through shared memory."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megarl.config import load
from megarl.model.build import build_model
from megarl.model.family import read_spec
from megarl.parallel.mesh import build_mesh
from megarl.weights.checksums import Checked
from megarl.weights.exchange import Arrived
from megarl.weights.load import load_hf
from megarl.weights.plan import Block, Bucket
from megarl.weights.stream import WeightStream
from megarl.weights.sync import to_engines
from megarl.weights.transport import Collective, SharedMemory, Transport


def both_ways(recipe: str, overrides: list[str]) -> dict[str, object]:
    """Stream the model three times by both transports: as loaded; with parameters changed in place; with parameters
    moved to other memory."""
    cfg = load([recipe, *overrides])
    mesh, spec = build_mesh(cfg), read_spec(cfg.model.path)
    with mesh.platform():
        model = build_model(cfg, spec, mesh, temperature=1.0)
        load_hf(model, spec, mesh, cfg.model.path)
    names_before = set(os.listdir("/dev/shm"))
    stream = WeightStream(model, spec, mesh, bucket_bytes=20_000)
    kind = type(stream.transport)
    shared, collective = stream.transport, Collective(mesh, stream._own)
    differing = []
    sums = []
    for change in (lambda p: None, lambda p: p.add_(1), lambda p: setattr(p, "data", p.detach() * 3)):
        with torch.no_grad():
            for parameter in model.parameters():
                change(parameter)
        got = {}
        for transport in (shared, collective):
            stream.transport = transport
            got[transport] = [(name, tensor.clone()) for name, tensor in stream]
        pairs = zip_longest(got[shared], got[collective], fillvalue=("", torch.empty(0)))
        differing += [a for (a, x), (b, y) in pairs if a != b or not torch.equal(x, y)]
        sums.append(sum(tensor.double().sum().item() for _, tensor in got[shared]))
    left = set(os.listdir("/dev/shm")) - names_before
    return {
        "shared": kind is SharedMemory,
        "differing": differing,
        "sums": sums,
        "files": sorted(name for name in left if name.startswith(f"torch_{os.getpid()}_")),
        "elements": sum(tensor.numel() for _, tensor in got[shared]),
    }


@dataclass
class Damaged:
    """A transport that changes one bit of the last element of the last block that comes to this rank in a bucket."""

    transport: Transport
    bucket: Bucket

    def begin(self) -> None:
        self.transport.begin()

    def end(self) -> None:
        self.transport.end()

    def send(self, bucket: Bucket) -> Any:
        on_its_way = self.transport.send(bucket)
        return Changing(on_its_way, self.victim(bucket)) if bucket is self.bucket else on_its_way

    @staticmethod
    def victim(bucket: Bucket) -> Block:
        return next(block for sender, block in reversed(bucket.arrivals) if sender in bucket.receives)


@dataclass
class Changing:
    on_its_way: Any
    block: Block

    def wait(self) -> Arrived:
        arrived = self.on_its_way.wait()

        def of(sender: int, block: Block) -> torch.Tensor:
            data = arrived.of(sender, block).clone()
            if block is self.block:
                data[(-1,) * data.dim()].view(torch.int32).bitwise_xor_(1)
            return data

        return Arrived(of, lasting=True)


def both_sides(recipe: str, overrides: list[str], vllm_tp: int) -> list[dict[str, Any]]:
    """By each transport: what is wrong as it should be, and with a flipped bit on the last rank. Then with a plan that
    takes two blocks from each other's place."""
    cfg = load([recipe, *overrides])
    mesh, spec = build_mesh(cfg), read_spec(cfg.model.path)
    with mesh.platform():
        model = build_model(cfg, spec, mesh, temperature=1.0)
        load_hf(model, spec, mesh, cfg.model.path)
    stream = WeightStream(model, spec, mesh, 20_000, to_engines(spec, mesh, vllm_tp))
    expected = stream.sums()
    out = []
    for transport in (stream.transport, Collective(mesh, stream._own)):
        stream.transport = transport
        found: dict[str, Any] = {"transport": type(transport).__name__, "tensors": len(expected)}
        found["right"] = wrong(stream, expected)
        found["objects"] = objects_exchanged(stream)
        travelling = [bucket for bucket in stream.buckets if bucket.receives]
        if mesh.rank == mesh.world_size - 1:
            stream.transport = Damaged(transport, travelling[len(travelling) // 2])
            found["flipped"] = Damaged.victim(travelling[len(travelling) // 2]).item.name
        found["found"] = wrong(stream, expected)
        stream.transport = transport
        out.append(found)
    out.append({"swapped": sorted(swap(stream)), "found": sorted(wrong(stream, expected))})
    return out


def swap(stream: WeightStream) -> set[str]:
    """Make the plan take two blocks of this rank's own, of one shape, from each other's place. Returns the names of
    what they belong to."""
    for bucket in stream.buckets:
        seen: dict[Any, int] = {}
        for b, (sender, block) in enumerate(bucket.arrivals):
            a = seen.setdefault((sender, block.shape), b)
            if a == b or sender != stream._position:
                continue
            other = bucket.arrivals[a][1]
            source, others = ({n: getattr(x, n) for n in ("tensor", "rows", "columns")} for x in (block, other))
            bucket.arrivals[a] = sender, replace(other, **source)
            bucket.arrivals[b] = sender, replace(block, **others)
            return {block.item.name, other.item.name}
    raise AssertionError("no two blocks of one shape in a bucket")


def objects_exchanged(stream: WeightStream) -> int:
    """How many collectives of Python objects one iteration takes."""
    calls = []
    with contextlib.ExitStack() as stack:
        for name in ("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"):
            collective = getattr(dist, name)
            counting = partial(lambda f, *args, **kwargs: (calls.append(f), f(*args, **kwargs))[1], collective)
            stack.enter_context(mock.patch.object(dist, name, counting))
        for _ in stream:
            pass
    return len(calls)


def wrong(stream: WeightStream, expected: dict[str, int]) -> list[str]:
    arriving = Checked(stream, expected)
    for _ in arriving:
        pass
    return arriving.wrong
