"""Names of live megatron-core parameters and the canonical (torch_dist) names the rules use.

Transformer Engine fuses a layer's norms into the linear layers behind them; the local layers keep them apart. Their
checkpoints share one set of names, which are Transformer Engine's: ``sharded_state_dict_keys_map`` in megatron-core's
``gpt_layer_specs.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from megarl.model.family import EMBEDDING, OUTPUT_LAYER

_LOCAL_TO_CANON = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


def canonical_parameters(model: torch.nn.Module, tied: bool) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(canonical name, parameter) of every parameter of a GPTModel, with the layer's number in the whole model.

    With tied embeddings and several pipeline stages the last stage holds a copy of the embedding: it comes under the
    embedding's name.
    """
    for name, parameter in model.named_parameters():
        match = _LAYER.fullmatch(name)
        if match:
            layer = model.decoder.layers[int(match[1])].layer_number - 1
            yield f"decoder.layers.{layer}.{_LOCAL_TO_CANON.get(match[2], match[2])}", parameter
        elif name == OUTPUT_LAYER and tied:
            yield EMBEDDING, parameter
        else:
            yield name, parameter
