"""What of each Hugging Face tensor a rank of a vLLM engine keeps, so that the rest of it need not be sent there.

Pure arithmetic on sizes, of vLLM 0.32's loaders (``model_executor/layers/{linear,vocab_parallel_embedding}.py`` and
``fused_moe/``). Where vLLM's cut is not known here, or does not divide, a rank gets the whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable

from megarl.model.family import EMBEDDING, OUTPUT_LAYER, ModelSpec
from megarl.weights.plan import EVERYTHING, Box
from megarl.weights.rules import CanonTensor, Shard

_VOCAB_MULTIPLE = 64  # vLLM pads the vocabulary to a multiple of this
_BY_ROW = ("linear_q_proj.weight", "linear_q_up_proj.weight", "linear_kv_up_proj.weight")  # latent attention, by head


def kept_by(spec: ModelSpec, tp_size: int) -> Callable[[int, CanonTensor, str], Box]:
    """``kept(tp_rank, tensor, name)``: the box of the HF tensor ``name`` that this rank of an engine keeps."""

    def kept(tp_rank: int, tensor: CanonTensor, name: str) -> Box:
        module = tensor.name.rpartition("self_attention.")[2]
        if tp_size == 1 or tensor.stacked is not None:
            return EVERYTHING
        if tensor.name in (EMBEDDING, OUTPUT_LAYER):
            return _vocabulary(tensor.shape[0], tp_size, tp_rank)
        if module in ("linear_qkv.weight", "linear_qkv.bias"):
            is_query = name == tensor.runs[0].hf
            return _heads(spec, is_query, tp_size, tp_rank)
        if tensor.shard is Shard.ROW:
            return _share(tensor.shape[1], tp_size, tp_rank, columns=True)
        if tensor.stride == 2:
            return _share(tensor.shape[0] // 2, tp_size, tp_rank)
        if module in _BY_ROW:
            return _share(tensor.shape[0], tp_size, tp_rank)
        return EVERYTHING

    return kept


def _share(total: int, tp_size: int, tp_rank: int, columns: bool = False) -> Box:
    if total % tp_size:
        return EVERYTHING
    start, stop = tp_rank * total // tp_size, (tp_rank + 1) * total // tp_size
    return Box(left=start, right=stop) if columns else Box(start, stop)


def _heads(spec: ModelSpec, is_query: bool, tp_size: int, tp_rank: int) -> Box:
    """Query heads are dealt out; key and value heads too, or repeated where ranks are more than heads."""
    heads = spec.num_attention_heads if is_query else spec.num_query_groups
    if not is_query and tp_size > heads and tp_size % heads == 0:
        return _share(heads * spec.kv_channels, heads, tp_rank // (tp_size // heads))
    return _share(heads * spec.kv_channels, tp_size, tp_rank) if heads % tp_size == 0 else EVERYTHING


def _vocabulary(rows: int, tp_size: int, tp_rank: int) -> Box:
    padded = -(-rows // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
    if padded % tp_size:
        return EVERYTHING
    share = padded // tp_size
    # A rank of which all is padding keeps nothing, but vLLM waits for every tensor: one row tells it.
    top = min(rows - 1, tp_rank * share)
    return Box(top, max(top + 1, min(rows, (tp_rank + 1) * share)))
