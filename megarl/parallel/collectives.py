"""Exchanges of host data between ranks: rollouts from where they were sampled to where they are trained on."""

from __future__ import annotations

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


def exchange_samples(outgoing: list[list[Sample]], group: dist.ProcessGroup) -> list[list[Sample]]:
    """Send ``outgoing[r]`` to rank r; returns what each rank sent here. Tokens and log-probabilities travel as flat
    tensors.

    No rank holds more than what it samples and what it trains on.
    """
    headers = gather_objects([[_header(s) for s in samples] for samples in outgoing], group)
    incoming = [sent[group.rank()] for sent in headers]
    tokens = _all_to_all(
        [np.concatenate([s.tokens for s in samples] or [[]]).astype(np.int64) for samples in outgoing],
        [sum(h["tokens"] for h in sent) for sent in incoming],
        group,
    )
    logps = _all_to_all(
        [np.concatenate([_logps(s) for s in samples] or [[]]).astype(np.float32) for samples in outgoing],
        [sum(h["logps"] for h in sent) for sent in incoming],
        group,
    )
    return [_rebuild(*parts) for parts in zip(incoming, tokens, logps, strict=True)]


def _header(sample: Sample) -> dict[str, Any]:
    return {
        "prompt_id": sample.prompt_id,
        "index": sample.index,
        "prompt_length": sample.prompt_length,
        "advantage": sample.advantage,
        "row": sample.row,
        "tokens": len(sample.tokens),
        "logps": 0 if sample.rollout_logps is None else len(sample.rollout_logps),
    }


def _logps(sample: Sample) -> np.ndarray:
    return np.empty(0, np.float32) if sample.rollout_logps is None else sample.rollout_logps.numpy()


def _rebuild(headers: list[dict[str, Any]], tokens: Tensor, logps: Tensor) -> list[Sample]:
    samples = []
    for header, ids, values in zip(
        headers,
        tokens.split([h["tokens"] for h in headers]),
        logps.split([h["logps"] for h in headers]),
        strict=True,
    ):
        sample = Sample(header["prompt_id"], header["index"], ids.tolist(), header["prompt_length"])
        sample.rollout_logps = values.clone() if header["logps"] else None
        sample.advantage, sample.row = header["advantage"], header["row"]
        samples.append(sample)
    return samples


def _all_to_all(outgoing: list[np.ndarray], sizes: list[int], group: dist.ProcessGroup) -> list[Tensor]:
    sent = torch.from_numpy(np.concatenate(outgoing))
    received = torch.empty(sum(sizes), dtype=sent.dtype)
    dist.all_to_all_single(received, sent, sizes, [len(part) for part in outgoing], group=group)
    return list(received.split(sizes))
