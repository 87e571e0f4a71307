"""A rank of a run that is killed (SIGKILL) in the middle of a push, if it is the one that sends.

    dying_sender.py <version> <recipe> [key=value ...]

Run it as `megarl.train` is run, on every rank. What is pushed as ``version`` ends after half of its tensors, of which
servers already have all but the last bucket.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import torch

from megarl.rollout import remote_sampler
from megarl.rollout.remote import Sender
from megarl.train import main

BUCKET = 1 << 13  # bytes: a tiny model takes many


class Dying(Sender):
    """The real sender, until then."""

    at = -1

    def __init__(self, find: Any, metadata: Any, bucket_bytes: int, *args: Any, **more: Any) -> None:
        super().__init__(find, metadata, BUCKET, *args, **more)
        self.tensors = len(metadata)

    def send(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        super().send(self._half(weights) if self.version == self.at else weights)

    def _half(self, weights: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for number, pair in enumerate(weights):
            if number == self.tensors // 2:
                os.kill(os.getpid(), signal.SIGKILL)
            yield pair


if __name__ == "__main__":
    Dying.at = int(sys.argv[1])
    remote_sampler.Sender = Dying  # type: ignore[misc]
    sys.exit(main(sys.argv[2:]))
