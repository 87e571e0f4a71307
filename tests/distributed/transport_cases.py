"""Cases that `RankPool` runs: the same stream of weights by a collective and through shared memory."""

from __future__ import annotations

import os
from itertools import zip_longest

import torch

from megarl.config import load
from megarl.model.build import build_model
from megarl.model.family import read_spec
from megarl.parallel.mesh import build_mesh
from megarl.weights.load import load_hf
from megarl.weights.stream import WeightStream
from megarl.weights.transport import Collective, SharedMemory


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
