"""Pairs of responses to one prompt, taken out of a packed microbatch and put back into it.

Contract: a microbatch of pairs holds them in turn, [chosen, rejected, chosen, rejected, ...], never half of one; both
responses of a pair have a token that counts, or neither has, and then the pair does not count. Its ``loss_agg_mode`` is
``seq-mean-token-mean``: each token of both responses carries its pair's loss, so that the engine's mean over sequences
is the mean over pairs. Shapes: P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megarl.data.records import MicroBatch, Sample


@dataclass(frozen=True)
class Pairs:
    """Log-probabilities [P] of both responses, summed over their tokens. Without a reference its log-probs are 0."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_length: Tensor  # response tokens
    rejected_length: Tensor
    reward_gap: Tensor | None = None  # [P] chosen minus rejected, of a reward model's scores
    whole_nll: Tensor | None = None  # [P] mean over chosen prompt *and* response, for longpo

    @property
    def chosen_ratio(self) -> Tensor:
        """D_w."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """D_l."""
        return self.rejected - self.ref_rejected

    @property
    def chosen_average(self) -> Tensor:
        return self.chosen / self.chosen_length.clamp(min=1)

    @property
    def rejected_average(self) -> Tensor:
        return self.rejected / self.rejected_length.clamp(min=1)


def pairs_of(logps: Tensor, batch: MicroBatch, whole_nll: Tensor | None = None) -> Pairs:
    """The batch's pairs under ``logps`` [T], and under ``batch.ref_logps`` where there are any.

    Raises ValueError where the samples are not pairs in turn.
    """
    _check(batch)
    sums, lengths = batch.per_sequence(logps), batch.lengths
    ref = torch.zeros_like(sums) if batch.ref_logps is None else batch.per_sequence(batch.ref_logps)
    return Pairs(
        chosen=sums[::2],
        rejected=sums[1::2],
        ref_chosen=ref[::2],
        ref_rejected=ref[1::2],
        chosen_length=lengths[::2],
        rejected_length=lengths[1::2],
        reward_gap=_reward_gap(batch, sums),
        whole_nll=whole_nll,
    )


def per_token(values: Tensor, batch: MicroBatch) -> Tensor:
    """[P] -> [T]: every token's pair's value."""
    return batch.per_token(values.repeat_interleave(2))


def _check(batch: MicroBatch) -> None:
    samples = batch.samples
    if len(samples) % 2:
        raise ValueError(f"{len(samples)} responses in a microbatch of pairs, the last of {samples[-1].name}")
    for chosen, rejected in zip(samples[::2], samples[1::2], strict=True):
        if chosen.prompt_id != rejected.prompt_id:
            raise ValueError(f"a pair of different prompts: chosen of {chosen.name}, rejected of {rejected.name}")
        if _counts(chosen) != _counts(rejected):  # it would be half a pair in the mean over pairs
            empty = rejected if _counts(chosen) else chosen
            raise ValueError(f"a pair of which one response has no token that counts: {empty.name}")


def _counts(sample: Sample) -> bool:
    """Whether any token of the response is learnt."""
    return sample.response_length > 0 if sample.loss_mask is None else bool(sample.loss_mask.any())


def _reward_gap(batch: MicroBatch, like: Tensor) -> Tensor | None:
    scores = [sample.score for sample in batch.samples]
    known = [score for score in scores if score is not None]
    if len(known) < len(scores):
        return None
    all_scores = torch.tensor(known, dtype=like.dtype, device=like.device)
    return all_scores[::2] - all_scores[1::2]
