"""Names of live megatron-core parameters and the canonical (torch_dist) names the rules use.

The canonical names are those of Transformer Engine's layers, which fuse a norm into the linear layer behind it, with
every expert by itself. Megatron's local layers keep the norms apart; their experts, and Transformer Engine's grouped
ones, are numbered within the rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from megarl.model.family import EMBEDDING, OUTPUT_LAYER, ModelSpec

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_GROUPED_EXPERT = re.compile(r"mlp\.experts\.(linear_fc[12])\.(weight|bias)(\d+)")
_LOCAL_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.(weight|bias)")
_EXPERT_BIAS = "mlp.router.expert_bias"


def canonical_suffix(name: str, *, mla: bool, moe: bool, first_expert: int = 0) -> str:
    """The canonical form of a parameter's name within its layer, from either kind of layers.

    Args:
        mla, moe: whether the layer has latent attention, and experts.
        first_expert: number of the expert that this rank counts as 0.
    """
    if match := _GROUPED_EXPERT.fullmatch(name):
        return f"mlp.experts.experts.{first_expert + int(match[3])}.{match[1]}.{match[2]}"
    if match := _LOCAL_EXPERT.fullmatch(name):
        return f"mlp.experts.experts.{first_expert + int(match[1])}.{match[2]}.{match[3]}"
    if name == "input_layernorm.weight" and not mla:
        return "self_attention.linear_qkv.layer_norm_weight"
    if name == "pre_mlp_layernorm.weight" and not moe:
        return "mlp.linear_fc1.layer_norm_weight"
    if mla and name in ("self_attention.q_layernorm.weight", "self_attention.kv_layernorm.weight"):
        which = name.removeprefix("self_attention.").partition("_")[0]
        return f"self_attention.linear_{which}_up_proj.layer_norm_weight"
    return name


def canonical_parameters(
    model: torch.nn.Module, spec: ModelSpec, first_expert: int = 0
) -> Iterator[tuple[str, torch.Tensor]]:
    """(canonical name, parameter) of every parameter of a GPTModel, or of a list of chunks of one, with the layer's
    number in the whole model, and of the routers' expert biases, which are buffers.

    With tied embeddings and several pipeline stages the last stage holds a copy of the embedding: it comes under the
    embedding's name. ``first_expert`` is the number of the first of this rank's experts.
    """
    if isinstance(model, torch.nn.ModuleList):
        for chunk in model:
            yield from canonical_parameters(chunk, spec, first_expert)
        return
    biases = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith(_EXPERT_BIAS)]
    for name, tensor in [*model.named_parameters(), *biases]:
        match = _LAYER.fullmatch(name)
        if match:
            layer = model.decoder.layers[int(match[1])].layer_number - 1
            moe = spec.is_moe(layer)
            suffix = canonical_suffix(match[2], mla=spec.mla is not None, moe=moe, first_expert=first_expert)
            yield f"decoder.layers.{layer}.{suffix}", tensor
        elif name == OUTPUT_LAYER and spec.tied:
            yield EMBEDDING, tensor
        else:
            yield name, tensor
