"""Exchanges of host data between ranks: rollouts from where they were sampled to where they are trained on, and small
objects and sums that every rank is to know."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megarl.data.records import Sample


def gather_objects(mine: Any, group: dist.ProcessGroup) -> list[Any]:
    """Every rank's small object, in rank order, on every rank."""
    out = [None] * group.size()
    dist.all_gather_object(out, mine, group=group)
    return out


def summed_over(group: dist.ProcessGroup) -> Callable[[Tensor], Tensor]:
    """A function that adds up small tensors in host memory over the group's ranks: `advantages.whiten`'s ``reduce``."""
    return lambda part: torch.stack(gather_objects(part.cpu(), group)).sum(0)


def exchange_samples(outgoing: list[list[Sample]], group: dist.ProcessGroup) -> list[list[Sample]]:
    """Send ``outgoing[r]`` to rank r; returns what each rank sent here, every field of it.

    Tokens and tensors travel as bytes in one exchange, the rest in a small header. No rank holds more than what it
    samples and what it trains on. Tensors arrive in host memory.
    """
    packed = [[_packed(sample) for sample in samples] for samples in outgoing]
    headers = gather_objects([[header for header, _ in samples] for samples in packed], group)
    incoming = [sent[group.rank()] for sent in headers]
    bodies = _all_to_all(
        [np.concatenate([np.empty(0, np.uint8), *(body for _, body in samples)]) for samples in packed],
        [sum(_size(header) for header in sent) for sent in incoming],
        group,
    )
    return [_rebuild(sent, body) for sent, body in zip(incoming, bodies, strict=True)]


@dataclasses.dataclass
class _Header:
    """A sample without its tokens and tensors, and what those are: (field, dtype, shape), in the order of the bytes."""

    plain: dict[str, Any]
    arrays: list[tuple[str, torch.dtype, torch.Size]]


def _packed(sample: Sample) -> tuple[_Header, np.ndarray]:
    plain, arrays, body = {}, [], []
    for name, value in vars(sample).items():
        tensor = torch.tensor(value, dtype=torch.int32) if name == "tokens" else value
        if not isinstance(tensor, Tensor):
            plain[name] = value
            continue
        arrays.append((name, tensor.dtype, tensor.shape))
        # by rows of bytes, which every dtype has, bfloat16 too
        body.append(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return _Header(plain, arrays), np.concatenate(body)


def _size(header: _Header) -> int:
    return sum(_bytes(dtype, shape) for _, dtype, shape in header.arrays)


def _bytes(dtype: torch.dtype, shape: torch.Size) -> int:
    return dtype.itemsize * shape.numel()


def _rebuild(headers: list[_Header], body: Tensor) -> list[Sample]:
    samples, at = [], 0
    for header in headers:
        fields = dict(header.plain)
        for name, dtype, shape in header.arrays:
            part = body[at : at + _bytes(dtype, shape)]
            fields[name] = part.clone().view(dtype).view(shape)
            at += len(part)
        fields["tokens"] = fields["tokens"].tolist()
        samples.append(Sample(**fields))
    return samples


def _all_to_all(outgoing: list[np.ndarray], sizes: list[int], group: dist.ProcessGroup) -> list[Tensor]:
    sent = torch.from_numpy(np.concatenate(outgoing))
    received = torch.empty(sum(sizes), dtype=sent.dtype)
    dist.all_to_all_single(received, sent, sizes, [len(part) for part in outgoing], group=group)
    return list(received.split(sizes))
