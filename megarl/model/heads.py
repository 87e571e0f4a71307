"""Heads on the last pipeline stage: token log-probabilities and entropy without ever holding [tokens, vocabulary].

Shapes: N selected tokens, h hidden, v this rank's rows of the head. The vocabulary is cut over tensor parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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
    """log softmax(hidden @ weight.T / temperature) at the targets, and its entropy; logits exist one chunk at a time.

    Backward computes the chunk's logits again. Its gradient of ``hidden`` is this rank's vocabulary's part only: the
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
        for rows in _chunks(n, chunk):
            logits = _logits(hidden[rows], weight, shard, temperature)
            log_z[rows], logps[rows], entropy[rows] = _statistics(logits, targets[rows], shard)
            del logits  # before the next chunk's exist
        ctx.save_for_backward(hidden, weight, targets, log_z, entropy)
        ctx.shard, ctx.temperature, ctx.chunk = shard, temperature, chunk
        ctx.set_materialize_grads(False)
        return logps, entropy

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_z, entropy = ctx.saved_tensors
        shard, size = ctx.shard, ctx.shard.size
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for rows in _chunks(hidden.shape[0], ctx.chunk):
            log_p = _logits(hidden[rows], weight, shard, ctx.temperature).sub_(log_z[rows, None])
            grad = _logits_gradient(
                log_p,
                entropy[rows],
                None if grad_logps is None else grad_logps[rows],
                None if grad_entropy is None else grad_entropy[rows],
            )
            if grad_logps is not None:
                here, index = _local_targets(targets[rows], shard)
                grad[here, index] += grad_logps[rows][here]
            grad = grad.div_(ctx.temperature).to(hidden.dtype)
            grad_hidden[rows] = grad @ weight[:size]
            _add_product(grad_weight[:size], grad.t(), hidden[rows])
            del log_p, grad  # before the next chunk's exist
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabShard, temperature: float, chunk: int
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of its distribution, fp32.

    Args:
        hidden: [N, h], of the selected tokens.
        weight: [v, h], this rank's rows of the head.
        targets: [N] token ids.
        temperature: what sampling divides logits by.
        chunk: tokens whose logits exist at once.

    Returns:
        logps [N], entropy [N], the same on every tensor-parallel rank.
    """
    return _TokenLogProbs.apply(hidden, weight, targets, shard, temperature, chunk)


def _chunks(n: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, n)) for start in range(0, n, chunk)]


def _logits(hidden: Tensor, weight: Tensor, shard: VocabShard, temperature: float) -> Tensor:
    """[N, size] in fp32, to be written over."""
    return (hidden @ weight[: shard.size].t()).float().div_(temperature)


def _logits_gradient(log_p: Tensor, entropy: Tensor, grad_logps: Tensor | None, grad_entropy: Tensor | None) -> Tensor:
    """What the loss changes by with each logit, [N, size], but for the targets' own share; written over ``log_p``.

    d logp[target] / d logits = onehot - p, and d H / d logits = -p (log p + H).
    """
    if grad_entropy is None:
        assert grad_logps is not None  # else there is no backward
        return log_p.exp_().mul_(-grad_logps[:, None])
    p = log_p.exp()
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


def _local_targets(targets: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Which tokens' targets are in this rank's rows, and at which of them."""
    here = ((targets >= shard.start) & (targets < shard.start + shard.size)).nonzero()[:, 0]
    return here, targets[here] - shard.start


def _statistics(logits: Tensor, targets: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor, Tensor]:
    """log-sum-exp, log-probability of the target, entropy: [N] each, over the whole vocabulary."""
    if shard.size:
        highest = logits.amax(dim=-1)
    else:  # this rank holds padding rows only
        highest = logits.new_full((logits.shape[0],), -torch.inf)
    if shard.group is not None:
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=shard.group)
    shifted = logits.sub_(highest[:, None])
    exp = shifted.exp()
    here, index = _local_targets(targets, shard)
    target = torch.zeros_like(highest)
    target[here] = shifted[here, index]
    sums = torch.stack([exp.sum(-1), target, shifted.mul_(exp).sum(-1)])
    if shard.group is not None:
        dist.all_reduce(sums, group=shard.group)
    log_sum = sums[0].log()
    return highest + log_sum, sums[1] - log_sum, log_sum - sums[2] / sums[0]
