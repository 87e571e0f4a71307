"""Supervised fine-tuning: the negative log-likelihood of response tokens."""

from __future__ import annotations

from torch import Tensor

from megarl.data.records import MicroBatch


def sft(logps: Tensor, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """[T]: minus the log-probability of each target."""
    assert batch.entropy is not None, "the engine sets the entropy before it calls a loss"
    return -logps, {"entropy": batch.entropy}
