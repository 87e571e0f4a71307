"""Packing: which rank trains on which sample, which samples share a microbatch, and the microbatch's tensors.

Plans are pure functions of the lengths, so every rank makes the same plan without talking.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megarl.data.records import MicroBatch, Sample

LOSS_AGG_MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


@dataclass(frozen=True)
class Pack:
    """Items that share a microbatch, and the ranks of a context-parallel group that share them."""

    items: list[int]
    size: int
    first: int  # the first of ``size`` neighbours

    def is_on(self, rank: int) -> bool:
        return self.first <= rank < self.first + self.size


def packs_of(
    positions: Sequence[Sequence[int]], budget: int, costs: Sequence[float], ranks: int, dynamic: bool = False
) -> list[Pack]:
    """The microbatches of a context-parallel group of ``ranks``, in the order in which each rank works on its own.

    All ranks share every pack, unless ``dynamic``: then an item goes to as few of them (1, 2, 4, ...) as hold it within
    ``budget`` positions each, and as keep its part of the work from being more than a rank's fair share. Packs that
    many share come first, so that they meet all of them at the same number of packs.

    Args:
        positions: of the sequences of each item, which stays whole.
        costs: of each item, in any unit.
        ranks: a power of two, if ``dynamic``.
    """
    sizes = [1 << k for k in range(ranks.bit_length())] if dynamic else [ranks]
    fair = sum(costs) / ranks
    padded = {size: [_padded(item, size) for item in positions] for size in sizes}
    room = {size: _padded([budget * size], size) for size in sizes}

    def size_of(i: int) -> int:
        fit = (size for size in sizes if padded[size][i] <= room[size] and costs[i] / size <= fair * (1 + 1e-9))
        return next(fit, ranks)

    wanted = [size_of(i) for i in range(len(positions))]
    packs, loads = [], [0.0] * ranks
    for size in reversed(sizes):
        members = [i for i, want in enumerate(wanted) if want == size]
        firsts = range(0, ranks, size)
        dealt = balance([costs[i] / size for i in members], len(firsts), [loads[first] for first in firsts])
        for first, group in zip(firsts, dealt, strict=True):
            items = [members[at] for at in group]
            mine = [costs[i] for i in items]
            found = microbatches_of([padded[size][i] for i in items], room[size], mine)
            packs += [Pack([items[at] for at in pack], size, first) for pack in found]
            loads[first : first + size] = [loads[first] + sum(mine) / size] * size
    return packs


def _padded(positions: Sequence[int], size: int) -> int:
    """What sequences take where ``size`` ranks share each: a multiple of 2 x ``size`` (`megarl.parallel.context`)."""
    each = 2 * size if size > 1 else 1
    return sum(-(-n // each) * each for n in positions)


def balance(costs: Sequence[float], parts: int, loads: Sequence[float] | None = None) -> list[list[int]]:
    """Deal items into ``parts`` groups of nearly equal total cost: dearest first, each to the cheapest group.
    ``loads``: what the groups have to do already.

    Graham's longest-processing-time rule: at most 4/3 of the best possible maximum. Items come back in their own order.
    What a sequence costs grows faster than its length: attention goes by the square (`megarl.model.flops`).
    """
    heap = [(load, part) for part, load in enumerate(loads or [0.0] * parts)]
    heapq.heapify(heap)
    groups: list[list[int]] = [[] for _ in range(parts)]
    for i in sorted(range(len(costs)), key=costs.__getitem__, reverse=True):
        total, part = heap[0]
        groups[part].append(i)
        heapq.heapreplace(heap, (total + costs[i], part))
    return [sorted(group) for group in groups]


def microbatches_of(lengths: Sequence[int], budget: int, costs: Sequence[float] | None = None) -> list[list[int]]:
    """Group items so that each group's total is at most ``budget``: in as few groups as best-fit decreasing manages
    (11/9 of the fewest possible at most; within 1 % of them on thousands of items), of equal cost where those fit, or
    else of equal length.

    Equal groups beat full ones: a short last microbatch would leave a pipeline idle as long as a full one.
    Raises ValueError for an item longer than the budget.
    """
    if not lengths:
        return []
    if max(lengths) > budget:
        raise ValueError(f"a sequence of {max(lengths)} tokens does not fit a microbatch of {budget} tokens")
    full = _best_fit(lengths, budget)
    for weights in (costs, lengths):
        equal = balance(weights, len(full)) if weights else full
        if weights and all(sum(lengths[i] for i in group) <= budget for group in equal):
            return [group for group in equal if group]
    return full


def _best_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Longest first, each to the fullest group that has room for it."""
    groups: list[list[int]] = []
    n = len(lengths)
    room: list[int] = []  # what a group has left x n + the group, ascending
    for i in sorted(range(n), key=lengths.__getitem__, reverse=True):
        at = bisect_left(room, lengths[i] * n)
        if at < len(room):
            left, group = divmod(room.pop(at), n)
        else:
            left, group = budget, len(groups)
            groups.append([])
        groups[group].append(i)
        insort(room, (left - lengths[i]) * n + group)
    return [sorted(group) for group in groups]


def positions_of(sample: Sample) -> int:
    """Positions a sample takes in a pack: one less than its tokens, since the last is only ever a target."""
    return len(sample.tokens) - 1


def pack(
    samples: list[Sample],
    device: torch.device,
    *,
    each: int = 1,
    multiple: int = 1,
    loss_agg_mode: str = "token-mean",
    max_response_length: int = 1,
    context_size: int = 1,
) -> MicroBatch:
    """Lay samples end to end, shifted once.

    Args:
        each: every sequence is padded to a multiple of this (context parallelism wants 2 CP).
        multiple: T is lengthened to a multiple of this, itself a multiple of ``each``, by padding behind the last
            sequence (sequence parallelism wants TP).
        loss_agg_mode: see `token_weights`.
        max_response_length: the constant of ``seq-mean-token-sum-norm``.
        context_size: how many ranks share it.
    """
    lengths = [positions_of(sample) for sample in samples]
    paddings = [-length % each for length in lengths]
    paddings[-1] += -(sum(lengths) + sum(paddings)) % multiple
    total = sum(lengths) + sum(paddings)
    tokens, targets, cu_seqlens = [], [], [0]
    response, padded = torch.zeros(total, dtype=torch.bool), torch.ones(total, dtype=torch.bool)
    for sample, length, padding in zip(samples, lengths, paddings, strict=True):
        start = cu_seqlens[-1]
        tokens += sample.tokens[:-1] + [0] * padding
        targets += sample.tokens[1:] + [0] * padding
        response[start + sample.prompt_length - 1 : start + length] = True
        padded[start : start + length] = sample.response_length == 0
        cu_seqlens.append(start + length + padding)
    sizes = torch.tensor(cu_seqlens).diff()
    sequence = torch.repeat_interleave(torch.arange(len(samples)), sizes)
    positions = torch.arange(total) - torch.tensor(cu_seqlens[:-1])[sequence]
    mask = torch.zeros_like(response)
    mask[response] = torch.cat([_loss_mask(sample) for sample in samples])
    counted = torch.zeros(len(samples), dtype=torch.int64).index_add(0, sequence, mask.long())
    weights, count = token_weights(mask, sequence, counted, loss_agg_mode, max_response_length)

    def spread(values: Callable[[Sample], Tensor | None]) -> Tensor | None:
        parts = [values(sample) for sample in samples]
        if parts[0] is None:
            return None
        out = torch.zeros(total, dtype=torch.float32)
        out[response] = torch.cat([part for part in parts if part is not None]).float().cpu()
        return torch.where(mask, out, 0).to(device)

    return MicroBatch(
        samples=samples,
        cu_seqlens=cu_seqlens,
        tokens=torch.tensor(tokens, device=device),
        targets=torch.tensor(targets, device=device),
        positions=positions.to(device),
        loss_mask=mask.to(device),
        sequence=sequence.to(device),
        weights=weights.to(device),
        count=count,
        advantages=spread(_advantages),
        fresh=spread(_fresh).bool(),
        rollout_logps=spread(lambda sample: sample.rollout_logps),
        old_logps=spread(lambda sample: sample.old_logps),
        ref_logps=spread(lambda sample: sample.ref_logps),
        old_values=spread(lambda sample: sample.values),
        returns=spread(lambda sample: sample.returns),
        padding=padded.to(device),
        routed_experts=_routed(samples, cu_seqlens, device),
        context_size=context_size,
    )


def _routed(samples: list[Sample], cu_seqlens: list[int], device: torch.device) -> Tensor | None:
    """[T, layers, top-k] int64, where vLLM reported them. Padding goes to the first experts. Raises ValueError where
    they are missing of some samples only, or not of every position."""
    known = [sample for sample in samples if sample.routed_experts is not None]
    if not known:
        return None
    assert known[0].routed_experts is not None, "just asked"
    layers, topk = known[0].routed_experts.shape[1:]
    out = torch.arange(topk).repeat(cu_seqlens[-1], layers, 1)
    for start, sample in zip(cu_seqlens[:-1], samples, strict=True):
        reported = 0 if sample.routed_experts is None else len(sample.routed_experts)
        if reported != positions_of(sample):
            raise ValueError(
                f"{sample.name}: vLLM reported the experts of {reported} positions, it has {positions_of(sample)}"
            )
        out[start : start + reported] = sample.routed_experts.long().cpu()  # type: ignore[union-attr]
    return out.to(device)


def _loss_mask(sample: Sample) -> Tensor:
    """[response] bool."""
    if sample.loss_mask is None:
        return torch.ones(sample.response_length, dtype=torch.bool)
    return sample.loss_mask.bool().cpu()


def _fresh(sample: Sample) -> Tensor:
    """[response] bool."""
    stale = sample.staleness
    return torch.ones(sample.response_length) if stale is None else stale == 0


def _advantages(sample: Sample) -> Tensor:
    """[response]."""
    if sample.advantages is None:
        return torch.full((sample.response_length,), sample.advantage)
    return sample.advantages


def token_weights(
    mask: Tensor, sequence: Tensor, responses: Tensor, mode: str, max_response_length: int
) -> tuple[Tensor, int]:
    """How each token's loss counts, and this microbatch's part of the step's one denominator.

    =========================  ==================================  =========================================
    token-mean                 sum / tokens of the step            DAPO (2503.14476)
    seq-mean-token-mean        mean over sequences of their mean   GRPO (2402.03300)
    seq-mean-token-sum         mean over sequences of their sum    REINFORCE, RLOO
    seq-mean-token-sum-norm    sum / (sequences x max length)      Dr. GRPO (2503.20783)
    =========================  ==================================  =========================================

    Sequences without response tokens do not count.

    Returns:
        weights [T] fp32, count.
    """
    ones = mask.float()
    sequences = int((responses > 0).sum())
    if mode == "token-mean":
        return ones, int(mask.sum())
    if mode == "seq-mean-token-mean":
        return ones / responses.clamp(min=1)[sequence], sequences
    if mode == "seq-mean-token-sum":
        return ones, sequences
    if mode == "seq-mean-token-sum-norm":
        return ones / max_response_length, sequences
    raise ValueError(f"loss_agg_mode {mode!r} is none of {', '.join(LOSS_AGG_MODES)}")
