"""Heads on the last pipeline stage: token log-probabilities and entropy without ever holding [tokens, vocabulary].

Shapes: N selected tokens, h hidden, v this rank's rows of the head. The vocabulary is cut over tensor parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.config.model import VOCABULARY_BLOCK


@dataclass(frozen=True)
class VocabShard:
    """This rank's rows of the head: token ids ``start <= id < start + size``; padding rows beyond them are never
    computed."""

    start: int
    size: int
    group: dist.ProcessGroup | None  # None: the whole vocabulary is here

    @staticmethod
    def of(vocab_size: int, rows: int, rank: int, group: dist.ProcessGroup) -> VocabShard:
        start = rank * rows
        return VocabShard(start, max(0, min(rows, vocab_size - start)), group if group.size() > 1 else None)


class _TokenLogProbs(torch.autograd.Function):
    """log softmax(hidden @ weight.T / temperature) at the targets, and its entropy; logits exist one tile at a time, of
    a chunk of tokens and a block of the vocabulary.

    Backward computes the tile's logits again. Its gradient of ``hidden`` is this rank's vocabulary's part only: the
    caller's copy/gather region sums it over tensor parallelism.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabShard, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        n = hidden.shape[0]
        logps = hidden.new_empty(n, dtype=torch.float32)
        entropy = torch.empty_like(logps)
        log_z = torch.empty_like(logps)
        tile = _Tile(min(n, chunk), min(shard.size, VOCABULARY_BLOCK), hidden.device)
        for rows in _slices(n, chunk):
            blocks = []
            for ids in _slices(shard.size, VOCABULARY_BLOCK):
                logits, spare = tile.logits(hidden[rows], weight[ids], temperature)
                blocks.append(_Statistics.of(logits, spare, targets[rows], shard.start + ids.start))
            log_z[rows], logps[rows], entropy[rows] = _whole(blocks, log_z[rows], shard.group)
        ctx.save_for_backward(hidden, weight, targets, log_z, entropy)
        ctx.shard, ctx.temperature, ctx.chunk = shard, temperature, chunk
        ctx.set_materialize_grads(False)
        return logps, entropy

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_z, entropy = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        n, shard = len(hidden), ctx.shard
        tile = _Tile(min(n, ctx.chunk), min(shard.size, VOCABULARY_BLOCK), hidden.device)
        for rows, ids in product(_slices(n, ctx.chunk), _slices(shard.size, VOCABULARY_BLOCK)):
            logits, spare = tile.logits(hidden[rows], weight[ids], ctx.temperature)
            grad = _logits_gradient(
                logits.sub_(log_z[rows, None]),
                spare,
                entropy[rows],
                None if grad_logps is None else grad_logps[rows],
                None if grad_entropy is None else grad_entropy[rows],
            )
            if grad_logps is not None:
                here, index = _targets_in(targets[rows], shard.start + ids.start, grad.shape[1])
                grad[here, index] += grad_logps[rows][here]
            grad = grad.div_(ctx.temperature).to(hidden.dtype)
            _add_product(grad_hidden[rows], grad, weight[ids])
            _add_product(grad_weight[ids], grad.t(), hidden[rows])
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), None, None, None, None


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabShard, temperature: float, chunk: int
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of its distribution, fp32.

    Args:
        hidden: [N, h], of the selected tokens.
        weight: [v, h], this rank's rows of the head.
        targets: [N] token ids.
        temperature: what sampling divides logits by.
        chunk: tokens whose logits exist at once, of VOCABULARY_BLOCK ids.

    Returns:
        logps [N], entropy [N], the same on every tensor-parallel rank.
    """
    return _TokenLogProbs.apply(hidden, weight, targets, shard, temperature, chunk)


def _slices(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


class _Tile:
    """The memory of all tiles, one after the other: small tensors that live on between large ones that do not would
    leave a CPU's allocator with holes, each a little too small for the next."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self._logits, self._spare = torch.empty(2, rows * columns, device=device)

    def logits(self, hidden: Tensor, weight: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """In fp32, to be written over; and as much to compute with. Both are what they were only until the next."""
        shape = len(hidden), len(weight)
        logits, spare = (memory[: shape[0] * shape[1]].view(shape) for memory in (self._logits, self._spare))
        if hidden.dtype == logits.dtype:
            torch.mm(hidden, weight.t(), out=logits)
        else:
            logits.copy_(hidden @ weight.t())
        return logits.div_(temperature), spare


def _logits_gradient(
    log_p: Tensor, spare: Tensor, entropy: Tensor, grad_logps: Tensor | None, grad_entropy: Tensor | None
) -> Tensor:
    """What the loss changes by with each logit, [N, size], but for the targets' own share; written over ``log_p``.

    d logp[target] / d logits = onehot - p, and d H / d logits = -p (log p + H).
    """
    if grad_entropy is None:
        assert grad_logps is not None  # else there is no backward
        return log_p.exp_().mul_(-grad_logps[:, None])
    p = torch.exp(log_p, out=spare)
    out = log_p.add_(entropy[:, None]).mul_(-grad_entropy[:, None])
    if grad_logps is not None:
        out.sub_(grad_logps[:, None])
    return out.mul_(p)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in fp32."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _targets_in(targets: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """Which tokens' targets are among these ids of the vocabulary, and at which of them."""
    here = ((targets >= start) & (targets < start + size)).nonzero()[:, 0]
    return here, targets[here] - start


@dataclass(frozen=True)
class _Statistics:
    """Of each token's logits z in one block of the vocabulary, [N] each."""

    highest: Tensor  # max z
    mass: Tensor  # sum of e^(z - highest)
    weighted: Tensor  # sum of e^(z - highest) (z - highest)
    target: Tensor  # z[target] where that is in the block, else 0

    @classmethod
    def of(cls, logits: Tensor, spare: Tensor, targets: Tensor, start: int) -> _Statistics:
        """Of the block that begins with id ``start``; ``logits`` and ``spare`` [N, its size] are written over."""
        highest = logits.amax(dim=-1)
        here, index = _targets_in(targets, start, logits.shape[1])
        target = torch.zeros_like(highest)
        target[here] = logits[here, index]
        shifted = logits.sub_(highest[:, None])
        exp = torch.exp(shifted, out=spare)
        return cls(highest, exp.sum(-1), shifted.mul_(exp).sum(-1), target)


def _whole(blocks: list[_Statistics], empty: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """log-sum-exp, log-probability of the target, entropy: [N] each, over the whole vocabulary.

    Args:
        blocks: this rank's; none where it holds padding rows only.
        empty: [N] fp32, to be written over.
    """
    highest = empty.fill_(-torch.inf)
    for block in blocks:
        highest = torch.maximum(highest, block.highest)
    if group is not None:
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    sums = highest.new_zeros(3, len(highest))
    for block in blocks:
        lower = block.highest - highest
        weighted = block.weighted + lower * block.mass
        sums += torch.stack([lower.exp() * block.mass, lower.exp() * weighted, block.target])
    if group is not None:
        dist.all_reduce(sums, group=group)
    mass, weighted, target = sums
    log_mass = mass.log()
    return highest + log_mass, target - highest - log_mass, log_mass - weighted / mass
