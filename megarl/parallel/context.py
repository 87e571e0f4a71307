"""Context parallelism: which tokens of a pack each rank of the group holds, and how their results come together again.

Every sequence is padded to a multiple of 2 x size and cut into as many equal chunks; rank r holds chunks r and
2 x size - 1 - r of each, so that causal attention costs all ranks the same (Megatron's and Transformer Engine's
layout; the "zigzag" of ring attention). Shapes: T tokens of the pack, the padding included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor


@dataclass(frozen=True)
class ContextShare:
    """One rank's part of a pack."""

    size: int
    rank: int
    mine: Tensor  # [T / size]: the tokens that are here, in the order in which they are
    order: Tensor  # [T]: where each token is among those of all ranks laid end to end
    group: dist.ProcessGroup

    def gather(self, x: Tensor) -> Tensor:
        """[T / size, ...] of every rank -> [T, ...], in the order of the pack. What every rank then does with it is its
        own: gradients are summed over ranks."""
        return gather_from_sequence_parallel_region(x.contiguous(), True, self.group).index_select(0, self.order)

    def join(self, x: Tensor) -> Tensor:
        """The same, for what every rank then does alike: each keeps its own tokens' gradient."""
        return gather_from_sequence_parallel_region(x.contiguous(), False, self.group).index_select(0, self.order)


def multiple_of(context_size: int, shards: int, tokens: int = 1) -> tuple[int, int]:
    """(multiple that each sequence, multiple that the whole pack is padded to), where sequence parallelism cuts each
    rank's part into ``shards``, of which each is to be a multiple of ``tokens`` (FP8's matrices)."""
    each = 2 * context_size if context_size > 1 else 1
    return each, math.lcm(each, context_size * shards * tokens)


def share_of(cu_seqlens: Sequence[int], group: dist.ProcessGroup, device: torch.device) -> ContextShare:
    """This rank's part of a pack of sequences ``cu_seqlens[i]:cu_seqlens[i + 1]``."""
    size = group.size()
    held = [held_by(cu_seqlens, size, rank) for rank in range(size)]
    order = torch.argsort(torch.cat(held))
    return ContextShare(size, group.rank(), held[group.rank()].to(device), order.to(device), group)


def held_by(cu_seqlens: Sequence[int], size: int, rank: int) -> Tensor:
    """[T / size]: the tokens that a rank holds. Raises ValueError for a sequence that cannot be cut."""
    parts = []
    for start, stop in pairwise(cu_seqlens):
        chunk, rest = divmod(stop - start, 2 * size)
        if rest:
            raise ValueError(f"a sequence of {stop - start} positions cannot be cut into 2 x {size} equal chunks")
        for k in (rank, 2 * size - 1 - rank):
            parts.append(torch.arange(start + k * chunk, start + (k + 1) * chunk))
    return torch.cat(parts)
