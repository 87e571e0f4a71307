"""FLOPs of a model, from its sizes: what utilisation is measured by, and what a sequence costs.

FLOPs are those the model needs, not those the hardware does: recomputation is not counted. A multiply-add is 2 FLOPs,
causal attention is counted as the half it is, of a mixture only the experts that a token goes to, and training is 3x
the forward pass. This module needs neither torch nor megatron.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megarl.model.family import ModelSpec


@dataclass(frozen=True)
class ModelFlops:
    """A forward pass costs ``2 x matmul_parameters`` a token, and attention by the pairs of tokens that see another."""

    matmul_parameters: int  # that a token is multiplied with: all but embedding look-ups, biases and norms
    full_attention: int  # FLOPs of a query-key pair, over all layers that see every key
    windowed_attention: int = 0  # ... over the layers with a sliding window
    window: int = 1  # keys that a query sees there, itself included

    @classmethod
    def of(cls, spec: ModelSpec) -> ModelFlops:
        attention, pair = attention_parameters(spec), _pair(spec)
        layers = range(spec.num_layers)
        mlp = sum(_mlp(spec, i) for i in layers)
        head = spec.hidden_size * (1 if spec.scalar_head else spec.vocab_size)
        windowed = sum(_is_windowed(spec, i) for i in layers)
        return cls(
            matmul_parameters=spec.num_layers * attention + mlp + head,
            full_attention=(spec.num_layers - windowed) * pair,
            windowed_attention=windowed * pair,
            window=spec.sliding_window or 1,
        )

    def forward(self, lengths: Sequence[int]) -> float:
        """FLOPs of one forward pass over sequences of these lengths."""
        return sum(self.cost(length) for length in lengths)

    def train(self, lengths: Sequence[int]) -> float:
        """FLOPs of one forward and backward pass over sequences of these lengths."""
        return 3.0 * self.forward(lengths)

    def cost(self, length: int) -> float:
        """FLOPs of one forward pass over a sequence."""
        square = length * length / 2  # half of the s x s square
        near = square if length <= self.window else self.window * length - self.window * self.window / 2
        attention = self.full_attention * square + self.windowed_attention * near
        return 2.0 * self.matmul_parameters * length + attention


def attention_parameters(spec: ModelSpec) -> int:
    """Of a layer: the projections of queries, keys, values and of the output."""
    hidden, heads = spec.hidden_size, spec.num_attention_heads
    if spec.mla is None:
        return hidden * spec.kv_channels * (2 * heads + 2 * spec.num_query_groups)
    mla = spec.mla
    key = mla.qk_head_dim + mla.qk_pos_emb_head_dim
    inputs = hidden if mla.q_lora_rank is None else mla.q_lora_rank
    query = (0 if mla.q_lora_rank is None else hidden * mla.q_lora_rank) + inputs * heads * key
    down = hidden * (mla.kv_lora_rank + mla.qk_pos_emb_head_dim)
    up = mla.kv_lora_rank * heads * (mla.qk_head_dim + mla.v_head_dim)
    return query + down + up + heads * mla.v_head_dim * hidden


def _pair(spec: ModelSpec) -> int:
    """FLOPs of a layer for each pair of a query and a key: its score, and its value's part of the sum."""
    if spec.mla is None:
        key = value = spec.kv_channels
    else:
        key, value = spec.mla.qk_head_dim + spec.mla.qk_pos_emb_head_dim, spec.mla.v_head_dim
    return 2 * spec.num_attention_heads * (key + value)


def _mlp(spec: ModelSpec, i: int) -> int:
    """Parameters of a layer's gated MLP, or of its router and the experts that a token goes to."""
    if not spec.is_moe(i):
        return 3 * spec.hidden_size * spec.ffn_hidden_size
    moe = spec.moe
    assert moe is not None, "a layer with experts"
    columns = moe.topk * moe.ffn_hidden_size + moe.shared_ffn_hidden_size
    return spec.hidden_size * (moe.num_experts + 3 * columns)


def _is_windowed(spec: ModelSpec, i: int) -> bool:
    """As megatron counts layers, from 1: every ``full_attention_period``-th sees all keys."""
    if spec.sliding_window is None:
        return False
    return spec.full_attention_period is None or (i + 1) % spec.full_attention_period != 0
