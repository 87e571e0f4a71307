"""Multi-head latent attention (DeepSeek, 2405.04434) over packed sequences: what megatron's own class leaves open.

megatron computes the rotary embedding of latent attention inside the layer, from the length of the longest sequence;
here every packed token gets its own angle, by the same formulas as the other families (`megarl.model.rope`).

Shapes: T packed tokens, d the rotary part of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor

from megarl.model.attention import PackedLayout, WithPacksRanks
from megarl.model.family import Rope
from megarl.model.rope import attention_factor, inverse_frequencies


class PackedRotary(torch.nn.Module):
    """Stands where latent attention has its rotary embedding, and is called the same two ways."""

    def __init__(self, rope: Rope, size: int, device: torch.device) -> None:
        super().__init__()
        self.scaled = rope.type == "yarn"
        self.factor = attention_factor(rope)
        self.register_buffer("frequencies", inverse_frequencies(rope, size).to(device), persistent=False)

    def get_rotary_seq_len(
        self, inference: Any, block: Any, hidden: Any, config: Any, packed_seq_params: PackedLayout
    ) -> PackedLayout:
        """The "length" that the attention hands to `forward`: the whole layout, for its positions."""
        return packed_seq_params

    def forward(self, layout: PackedLayout, packed_seq: bool = True) -> Tensor | tuple[Tensor, float]:
        """Angles [T, 1, 1, d]; of YaRN also the factor of the embedding's length."""
        angles = torch.outer(layout.positions.float(), self.frequencies)
        angles = torch.cat((angles, angles), dim=-1)[:, None, None]
        return (angles, self.factor) if self.scaled else angles


class LatentAttention(WithPacksRanks, MLASelfAttention):
    """megatron's latent attention. Its rotary embedding is told that the pack is one sequence, else it would loop over
    them in Python: `PackedRotary` has every token's angle already. The attention proper sees them all."""

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        """Build what the layer specification says. Overrides megatron-core 0.19, which would put a norm
        before an uncompressed query's projection too; 0.16 does not ask."""
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: vars(submodules)[name] or IdentityOp for name in names}

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        packed_seq_params: PackedLayout | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        assert packed_seq_params is not None, "LatentAttention takes packed sequences only"
        layout = packed_seq_params.as_one_sequence()
        return super().get_query_key_value_tensors(
            hidden_states, key_value_states, position_ids, layout, *args, **kwargs
        )


class LocalLatentAttention(LatentAttention):
    """The same for megatron's local layers, whose down projections are cut by column.

    The gradient of the key's rotary part, which all heads share, would then be each rank's heads' alone
    (megatron-core 0.16.1 and 0.19.2). Whole ones are what Transformer Engine's layers have.
    """

    def __init__(self, config: MLATransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        hidden, rotary = config.hidden_size, config.qk_pos_emb_head_dim
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = WholeLinear(hidden, config.q_lora_rank, config)
        self.linear_kv_down_proj = WholeLinear(hidden, config.kv_lora_rank + rotary, config)


class WholeLinear(torch.nn.Module):
    """A linear layer that every tensor-parallel rank holds whole. With sequence parallelism each has some of the tokens
    to put through it, and megatron sums the gradients."""

    def __init__(self, inputs: int, outputs: int, config: MLATransformerConfig) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Megatron's linear layers return their bias too."""
        return F.linear(x, self.weight), None
