"""What is trained on: a `Sample` is one sequence, a `MicroBatch` is several of them laid end to end.

Shapes: T tokens of a microbatch, n its sequences. A sequence of L tokens contributes L - 1 positions: tokens are
shifted once, when they are packed, so position t always means "predict targets[t] from tokens up to t". ``logps``,
``rollout_logps`` and the like of a sample are of its response tokens, in order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Sample:
    """One prompt and one response."""

    prompt_id: str  # where the prompt came from: "train.jsonl:17"
    index: int  # which of the prompt's responses
    tokens: list[int]  # prompt, then response (its EOS included)
    prompt_length: int
    rollout_logps: Tensor | None = None  # [response]: what vLLM sampled with
    old_logps: Tensor | None = None  # [response]: the policy's before this step's updates
    ref_logps: Tensor | None = None  # [response]: the reference's
    advantage: float = 0.0
    row: int = -1  # its place in the step's table, where it is one of a rollout's

    @property
    def response_length(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def name(self) -> str:
        return f"prompt {self.prompt_id}, sample {self.index}"


@dataclass
class MicroBatch:
    """Packed samples on the training device."""

    samples: list[Sample]
    cu_seqlens: list[int]  # n + 1 boundaries, the last sequence's padding included
    tokens: Tensor  # [T]
    targets: Tensor  # [T]
    positions: Tensor  # [T], each token's place in its own sequence
    loss_mask: Tensor  # [T] bool: targets that are response tokens
    sequence: Tensor  # [T], which of the n sequences a token is in
    weights: Tensor  # [T], how a token's loss counts in the sum (0 outside loss_mask)
    count: int  # what the step's sum is divided by, this microbatch's part of it
    advantages: Tensor  # [T]
    rollout_logps: Tensor | None = None  # [T]
    old_logps: Tensor | None = None  # [T]
    ref_logps: Tensor | None = None  # [T]
    entropy: Tensor | None = None  # [T], of the current policy; the engine sets it before a loss sees the batch

    def per_sequence(self, x: Tensor) -> Tensor:
        """Sum over each sequence's response tokens: [T] -> [n]."""
        out = x.new_zeros(len(self.samples))
        return out.index_add(0, self.sequence, torch.where(self.loss_mask, x, 0))

    def response_of(self, x: Tensor) -> list[Tensor]:
        """[T] -> one [response] tensor a sample."""
        return list(x[self.loss_mask].split([sample.response_length for sample in self.samples]))
