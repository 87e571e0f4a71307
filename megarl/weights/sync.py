"""Weights from the trainer to the vLLM engine in the same process, in memory, a bucket at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from megarl.weights.convert import WeightStream


class Receiver(Protocol):
    """What a rollout engine offers: `megarl.rollout.vllm_engine.VLLMEngine`."""

    def wake_weights(self) -> None: ...

    def load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None: ...

    def wake_kv_cache(self) -> None: ...


def push(stream: WeightStream, engine: Receiver) -> None:
    """Give the engine the trainer's current weights. A collective over all ranks.

    The engine's cache takes memory only after the last bucket is gone, so the peak is weights plus a bucket.
    """
    engine.wake_weights()
    engine.load_weights(iter(stream))
    engine.wake_kv_cache()
