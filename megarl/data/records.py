"""What is trained on: a `Sample` is one sequence, a `MicroBatch` is several of them laid end to end.

Shapes: T tokens of a microbatch, n its sequences. A sequence of L tokens contributes L - 1 positions: tokens are
shifted once, when they are packed, so position t always means "predict targets[t] from tokens up to t". ``logps``,
``rollout_logps`` and the like of a sample are of its response tokens, in order. A response may have holes, tokens that
the policy did not write (a tool's output): ``loss_mask`` leaves them out of every loss and count, and what other
tensors hold there does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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
    loss_mask: Tensor | None = None  # [response] bool: tokens that the policy wrote; None: all of them
    advantage: float = 0.0
    advantages: Tensor | None = None  # [response]: one a token, in place of ``advantage``
    values: Tensor | None = None  # [response]: the critic's before this step's updates
    returns: Tensor | None = None  # [response]: what the critic learns
    score: float | None = None  # of preference data: what a reward model or an annotator gave the response
    desirable: bool | None = None  # of unpaired preference data
    versions: Tensor | None = None  # [response] int32: the push of weights that sampled each, where they may differ
    staleness: Tensor | None = None  # [response] int32: how many updates those are behind; None: none
    finish_reason: str = ""  # of a rollout's: "stop", "length", or what its environment says
    measures: dict[str, float] = field(default_factory=dict)  # what its environment says of it
    routed_experts: Tensor | None = None  # [tokens - 1, layers with experts, top-k]: where vLLM sent each position
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
    cu_seqlens: list[int]  # n + 1 boundaries, the padding behind sequences included
    tokens: Tensor  # [T]
    targets: Tensor  # [T]
    positions: Tensor  # [T], each token's place in its own sequence
    loss_mask: Tensor  # [T] bool: targets that are response tokens and not in a hole
    sequence: Tensor  # [T], which of the n sequences a token is in
    weights: Tensor  # [T], how a token's loss counts in the sum (0 outside loss_mask)
    count: int  # what the step's sum is divided by, this microbatch's part of it
    advantages: Tensor  # [T]
    fresh: Tensor  # [T] bool: sampled with the weights that the step trains, of which the engines can be measured
    rollout_logps: Tensor | None = None  # [T]
    old_logps: Tensor | None = None  # [T]
    ref_logps: Tensor | None = None  # [T]
    old_values: Tensor | None = None  # [T]
    returns: Tensor | None = None  # [T]
    padding: Tensor | None = None  # [T] bool: positions of no sample, or of one without a response
    routed_experts: Tensor | None = None  # [T, layers with experts, top-k]: where vLLM sent each token
    context_size: int = 1  # ranks that share it: each computes a part of T, and a loss sees the whole on all of them
    entropy: Tensor | None = None  # [T], of the current policy; the engine sets it before a loss sees the batch

    @property
    def num_positions(self) -> int:
        """Without padding."""
        return sum(len(sample.tokens) - 1 for sample in self.samples if sample.response_length)

    @property
    def lengths(self) -> Tensor:
        """[n]: response tokens that count."""
        return self.per_sequence(torch.ones_like(self.weights))

    def per_sequence(self, x: Tensor) -> Tensor:
        """Sum over each sequence's response tokens that count: [T] -> [n]."""
        out = x.new_zeros(len(self.samples))
        return out.index_add(0, self.sequence, torch.where(self.loss_mask, x, 0))

    def per_token(self, x: Tensor) -> Tensor:
        """Give every token its sequence's value: [n] -> [T]."""
        return x[self.sequence]

    def response_of(self, x: Tensor) -> list[Tensor]:
        """[T] -> one [response] tensor a sample, holes included."""
        starts = [at + sample.prompt_length - 1 for at, sample in zip(self.cu_seqlens[:-1], self.samples, strict=True)]
        return [x[at : at + sample.response_length] for at, sample in zip(starts, self.samples, strict=True)]
