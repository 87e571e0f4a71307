"""Core attention and RMSNorm for megatron's local layers: what serves where Transformer Engine is not installed.

megatron's own local versions take no packed sequences (attention) and refuse sequence parallelism (norm).

Shapes: T packed tokens, h this rank's query heads, g its key/value heads, d the head size, v that of values.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor

from megarl.model.router import Routing
from megarl.parallel.context import ContextShare

# Where keys come from other ranks, elements [queries, keys] of the mask that exists at once (torch makes floats of it).
_MASK = 1 << 24


@dataclass
class PackedLayout(PackedSeqParams):
    """megatron's description of packed sequences, with the plan `PackedAttention` follows, made once a microbatch.

    Sequences of similar length form a rectangle ``[n, m]`` of token indices (short ones repeat their last token), so
    that a handful of causal attention calls serves hundreds of sequences and at most half of a rectangle is padding.
    ``restore [T]`` finds every token in the rectangles laid end to end; None where one rectangle is the pack as it is.
    """

    rectangles: list[Tensor] = field(default_factory=list)
    restore: Tensor | None = None
    positions: Tensor | None = None  # [T], of every token in its sequence; see `packed_layout` for those of a share
    share: ContextShare | None = None  # the tokens that are here, where context parallelism divides them
    cu_seqlens: list[int] = field(default_factory=list)  # on the host
    routing: Routing | None = None  # what layers with experts tell their routers

    def as_one_sequence(self) -> PackedLayout:
        """The same for megatron's unfused rotary embedding, which loops over sequences in Python: only it reads the
        padded lengths of this one. Its angles must then be given for every token, not for every position."""
        assert self.cu_seqlens_q is not None, "a layout has its sequences' ends"
        whole = self.cu_seqlens_q[[0, -1]]
        return dataclasses.replace(self, cu_seqlens_q_padded=whole, cu_seqlens_kv_padded=whole)


def packed_layout(
    cu_seqlens: list[int],
    device: torch.device,
    *,
    transformer_engine: bool,
    share: ContextShare | None = None,
    routing: Routing | None = None,
    cp_group: dist.ProcessGroup | None = None,
) -> PackedLayout:
    """Describe sequences ``cu_seqlens[i]:cu_seqlens[i+1]`` of one pack to megatron.

    Of a ``share``, megatron's unfused rotary embedding takes the angles of the whole pack and picks two stretches,
    where a single sequence would have this rank's two chunks: there ``positions`` has those of the tokens that are
    here. ``cp_group``: the ranks that share the pack, where they are not always the same ones.
    """
    lengths = [b - a for a, b in pairwise(cu_seqlens)]
    # Rounded up: megatron caches one rotary table per value.
    longest = -(-max(lengths) // 64) * 64
    cu = torch.tensor(cu_seqlens, dtype=torch.int32, device=device)
    none_needed = transformer_engine or share is not None
    rectangles, restore = ([], None) if none_needed else _rectangles(cu_seqlens, lengths, device)
    positions = torch.cat([torch.arange(n) for n in lengths]).to(device)
    layout = PackedLayout(
        qkv_format="thd",
        cu_seqlens_q=cu,
        cu_seqlens_kv=cu,
        cu_seqlens_q_padded=cu,
        cu_seqlens_kv_padded=cu,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        rectangles=rectangles,
        restore=restore,
        positions=positions if share is None else _where_megatron_looks(positions, share),
        share=share,
        cu_seqlens=cu_seqlens,
        routing=routing,
        cp_group=cp_group,
    )
    return layout if transformer_engine else layout.as_one_sequence()


def _where_megatron_looks(positions: Tensor, share: ContextShare) -> Tensor:
    """[T]: a share's positions at the two chunks that the rank has of a single sequence of T tokens."""
    half = len(share.mine) // 2
    out = torch.zeros_like(positions)
    first, second = positions[share.mine].split(half)
    out[share.rank * half : (share.rank + 1) * half] = first
    end = len(positions) - share.rank * half
    out[end - half : end] = second
    return out


def _rectangles(cu_seqlens: list[int], lengths: list[int], device: torch.device) -> tuple[list[Tensor], Tensor | None]:
    by_size: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        by_size.setdefault(max(length, 1).bit_length(), []).append(i)
    rectangles, slots, before = [], torch.empty(cu_seqlens[-1], dtype=torch.int64), 0
    for members in by_size.values():
        start = torch.tensor([cu_seqlens[i] for i in members])
        length = torch.tensor([lengths[i] for i in members])
        across = torch.arange(int(length.max()))
        index = start[:, None] + torch.minimum(across, length[:, None] - 1)
        real = across < length[:, None]
        slots[index[real]] = before + torch.arange(index.numel()).view_as(index)[real]
        before += index.numel()
        rectangles.append(index.to(device))
    if len(rectangles) == 1 and rectangles[0].numel() == cu_seqlens[-1]:
        return rectangles, None
    return rectangles, slots.to(device)


class WithPacksRanks:
    """Before megatron's self-attention: its rotary embedding asks the layer which ranks share a sequence, and with
    dynamic context parallelism the pack says it."""

    pg_collection: ProcessGroupCollection

    def forward(self, *args: Any, packed_seq_params: PackedLayout, **kwargs: Any) -> Any:
        if packed_seq_params.cp_group is not None:
            self.pg_collection = copy.copy(self.pg_collection)
            self.pg_collection.cp = packed_seq_params.cp_group
        return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)  # type: ignore[misc]


class PackedSelfAttention(WithPacksRanks, SelfAttention):
    """megatron's, for a pack whose ranks may change."""


class PackedAttention(MegatronModule):
    """Causal attention over packed sequences by torch's scaled_dot_product_attention, with grouped queries, values of
    another size than keys, a sliding window (in some layers), and attention sinks: a learnt logit of each head that
    takes its share of the softmax and attends to nothing."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if windowed else None  # keys a query sees, itself included
        self.softmax_offset = None
        if config.softmax_type == "learnable":
            assert pg_collection is not None, "megatron tells its attention the process groups"
            heads = config.num_attention_heads // pg_collection.tp.size()
            self.softmax_offset = torch.nn.Parameter(torch.empty(heads, dtype=config.params_dtype))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The sinks, cut by heads, for megatron's checkpoints."""
        own = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(own, prefix, {"softmax_offset": 0}, sharded_offsets)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedLayout | None = None,
    ) -> Tensor:
        """query [T, h, d], key [T, g, d], value [T, g, v] -> [T, h * v]."""
        assert packed_seq_params is not None, "PackedAttention takes packed sequences only"
        if packed_seq_params.share is not None:
            return self._attend_share(query, key, value, packed_seq_params)
        if packed_seq_params.restore is None:
            (shape,) = (rectangle.shape for rectangle in packed_seq_params.rectangles)
            return self._attend(*(x.unflatten(0, shape) for x in (query, key, value)))
        out = [
            self._attend(*(_rows(x, rectangle) for x in (query, key, value)))
            for rectangle in packed_seq_params.rectangles
        ]
        return torch.cat(out).index_select(0, packed_seq_params.restore)

    def _attend_share(self, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
        """The queries that are here over the keys and values of all ranks, which are gathered: [T / CP, h * v]."""
        assert layout.share is not None, "called with a share only"
        share, sizes = layout.share, [k.shape[-1], v.shape[-1]]
        k, v = share.gather(torch.cat((k, v), dim=-1)).split(sizes, dim=-1)
        blocks = _blocks(layout.cu_seqlens, share)
        return _BlockByBlock.apply(self._attend_block, blocks, q, k, v, self.softmax_offset)

    def _attend_block(self, q: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
        """Queries ``[m, h, d]`` at positions ``first`` and on, over the keys up to the last of them: [m, h * v]."""
        low = 0 if self.window is None else max(0, first - self.window + 1)
        k, v = k[low:], v[low:]
        query = torch.arange(first, first + len(q), device=q.device)[:, None]
        key = torch.arange(low, low + len(k), device=q.device)
        seen = key <= query  # compared, not subtracted: 8 bytes an element would be more than all else
        if self.window is not None:
            seen &= key > query - self.window
        mask: Tensor = seen
        if self.softmax_offset is not None:
            mask = self._sinks_beside(seen, q)
            k, v = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.softmax_scale, enable_gqa=True)
        return out[0].transpose(0, 1).flatten(1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[n, m, h or g, d or v] -> [n * m, h * v]. Padding comes after every real token, so the causal mask hides
        it."""
        n, m = q.shape[:2]
        mask = self._mask(m, q.device)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if self.softmax_offset is not None:
            mask = self._with_sinks(mask, m, q)
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))  # a key of zeros, whose logit is in the mask
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale, enable_gqa=True
        )
        return out.transpose(1, 2).reshape(n * m, -1)

    def _mask(self, m: int, device: torch.device) -> Tensor | None:
        """[m, m]: the keys that a query sees; None for all up to itself."""
        if self.window is None or m <= self.window:
            return None
        distance = torch.arange(m, device=device)[:, None] - torch.arange(m, device=device)
        return (distance >= 0) & (distance < self.window)

    def _with_sinks(self, mask: Tensor | None, m: int, q: Tensor) -> Tensor:
        """[h, m, m + 1]: what is added to the logits, with a column for the sink."""
        seen = torch.ones(m, m, dtype=torch.bool, device=q.device).tril() if mask is None else mask
        return self._sinks_beside(seen, q)

    def _sinks_beside(self, seen: Tensor, q: Tensor) -> Tensor:
        """What is added to the logits of queries that see ``seen`` [m, n] keys: [h, m, n + 1]."""
        assert self.softmax_offset is not None, "called with sinks only"
        hidden = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, -torch.inf)
        h, m = self.softmax_offset.shape[0], seen.shape[0]
        sinks = self.softmax_offset.to(q.dtype)[:, None, None].expand(h, m, 1)
        return torch.cat((hidden.expand(h, *seen.shape), sinks), dim=-1)


@dataclass(frozen=True)
class _Block:
    """Queries that attend at once."""

    queries: slice  # of those that are here
    keys: slice  # of all: its sequence, up to the last of its queries
    first: int  # where its queries begin in their sequence


def _blocks(cu_seqlens: list[int], share: ContextShare) -> list[_Block]:
    """A share's queries, in order: of every sequence two chunks."""
    blocks, at = [], 0
    for start, stop in pairwise(cu_seqlens):
        chunk = (stop - start) // (2 * share.size)
        most = max(16, min(1024, _MASK // (stop - start)))
        for number in (share.rank, 2 * share.size - 1 - share.rank):
            for first in range(number * chunk, (number + 1) * chunk, most):
                last = min(first + most, (number + 1) * chunk)
                blocks.append(_Block(slice(at, at + last - first), slice(start, start + last), first))
                at += last - first
    return blocks


class _BlockByBlock(torch.autograd.Function):
    """Attention of one block after the other, computed again in backward: kept, the masks of all blocks would grow with
    the square of T. Results have their place from the beginning: small tensors that live on between large ones that do
    not would leave the allocator with holes, each a little too small for the next block."""

    @staticmethod
    def forward(
        ctx: Any,
        attend: Callable[..., Tensor],
        blocks: list[_Block],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
    ) -> Tensor:
        out = q.new_empty(len(q), q.shape[1] * v.shape[2])
        for block in blocks:
            out[block.queries] = attend(q[block.queries], k[block.keys], v[block.keys], block.first)
        ctx.save_for_backward(q, k, v)
        ctx.attend, ctx.blocks, ctx.sinks = attend, blocks, sinks
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, sinks = ctx.saved_tensors, [ctx.sinks] if ctx.needs_input_grad[-1] else []
        totals = [torch.zeros_like(x, dtype=torch.float32) for x in (*qkv, *sinks)]
        for block in ctx.blocks:
            at = (block.queries, block.keys, block.keys)
            parts = [x[where].detach().requires_grad_() for x, where in zip(qkv, at, strict=True)]
            with torch.enable_grad():
                out = ctx.attend(*parts, block.first)
            grads = torch.autograd.grad(out, [*parts, *sinks], grad[block.queries])
            everywhere = [...] * len(sinks)
            for total, where, part in zip(totals, (*at, *everywhere), grads, strict=True):
                total[where] += part
        dq, dk, dv, *of_sinks = (total.to(x.dtype) for total, x in zip(totals, (*qkv, *sinks), strict=True))
        return None, None, dq, dk, dv, (of_sinks[0] if sinks else None)


def _rows(x: Tensor, rectangle: Tensor) -> Tensor:
    """[T, ...] -> [n, m, ...]. By index_select: its backward is several times faster than that of x[rectangle]."""
    return x.index_select(0, rectangle.flatten()).unflatten(0, rectangle.shape)


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm whose weight tells megarl's and megatron's reductions that sequence parallelism splits its
    input."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
