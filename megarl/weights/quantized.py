"""Block-scaled weights: FP8 as DeepSeek-V3's repository stores it, and MXFP4 as gpt-oss' does.

FP8: ``X.weight`` ``[rows, columns]`` e4m3 and ``X.weight_scale_inv`` fp32, one scale a block of 128 x 128, blocks at
the far edges cut short. A weight is the product *in fp32*, then rounded to bf16: a product in bf16 is another number in
a quarter of all elements. MXFP4: ``P_blocks`` uint8 ``[..., groups, 16]``, two e2m1 values a byte, the low four bits
first, and ``P_scales`` uint8 ``[..., groups]``, the power of two of 32 values, biased by 127.

Formats: https://huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/README_WEIGHTS.md and the OCP Microscaling
specification, https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

BLOCK = (128, 128)
SCALE_SUFFIX = "_scale_inv"
FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(FP8).max  # 448
# Linear weights that DeepSeek's repository leaves in bf16, and vLLM therefore expects so: routers, embeddings, heads.
_NOT_QUANTISED = ("embed_tokens", "lm_head", "shared_head.head", "eh_proj", "gate", "router", "shared_expert_gate")
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MXFP4_GROUP = 32


def scale_shape(shape: tuple[int, ...], block: tuple[int, int] = BLOCK) -> tuple[int, int]:
    """Shape of the scales of an FP8 weight ``[rows, columns]``."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def _two_byte_table(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """For all pairs of bytes, the first byte at the lower address: both bytes' entries of ``values``, as one ``dtype``.

    Looking two bytes up at once is several times faster than torch's own conversion of each.
    """
    pair = torch.arange(1 << 16)
    return torch.stack([values[pair & 255], values[pair >> 8]], dim=1).view(dtype).flatten()


_FP8_PAIRS = _two_byte_table(torch.arange(256, dtype=torch.uint8).view(FP8).to(torch.bfloat16), torch.int32)


def _look_up(table: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """bf16 entries of ``table`` for a tensor of two-byte numbers, flat."""
    return table.index_select(0, pairs.reshape(-1).int().bitwise_and_(0xFFFF)).view(torch.bfloat16)


def _fp8_as_fp32(q: torch.Tensor) -> torch.Tensor:
    if q.shape[1] % 2 or q.stride(0) % 2 or q.storage_offset() % 2:
        return q.float()
    return _look_up(_FP8_PAIRS, q.view(torch.int16)).view(q.shape).float()  # every e4m3 value is one of bf16


def dequantize_fp8_block(
    q: torch.Tensor, scale_inv: torch.Tensor, block: tuple[int, int], rows: slice, cols: slice
) -> torch.Tensor:
    """bf16 values of ``q[rows, cols]``, where ``q`` and ``scale_inv`` are whole (mapped) tensors.

    Only that block of ``q`` and the scales that cover it are read. Slices have a start and a stop, and no step.
    """
    out = torch.empty((rows.stop - rows.start, cols.stop - cols.start), dtype=torch.bfloat16)
    first = cols.start // block[1]
    skip = cols.start - first * block[1]
    scales = scale_inv[rows.start // block[0] : -(-rows.stop // block[0]), first : -(-cols.stop // block[1])].float()
    at = rows.start
    for scale in scales:  # a row of blocks at a time: what is fp32 stays in the cache
        end = min(rows.stop, (at // block[0] + 1) * block[0])
        columns = scale.repeat_interleave(block[1])[skip : skip + out.shape[1]]
        out[at - rows.start : end - rows.start] = _fp8_as_fp32(q[at:end, cols]).mul_(columns)
        at = end
    return out


def quantize_fp8_block(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 values, fp32 scales) of a weight ``[rows, columns]``; the largest of each block becomes 448.

    Raises ValueError for a weight that is not finite.
    """
    height, width = BLOCK
    q = torch.empty(weight.shape, dtype=FP8)
    scale_inv = torch.empty(scale_shape(tuple(weight.shape)), dtype=torch.float32)
    smallest = torch.finfo(torch.float32).tiny
    for k, scale in enumerate(scale_inv):
        rows = slice(k * height, (k + 1) * height)
        values = weight[rows].float()
        largest = values.abs().amax(dim=0)
        largest = torch.nn.functional.pad(largest, (0, -largest.numel() % width)).view(-1, width).amax(dim=1)
        if not torch.isfinite(largest).all():
            raise ValueError(f"rows {rows.start} to {rows.start + len(values)} hold values that are not finite")
        scale.copy_(torch.where(largest > 0, (largest / _FP8_MAX).clamp_min(smallest), 1.0))  # zeros: any scale will do
        columns = scale.repeat_interleave(width)[: weight.shape[1]]
        q[rows] = values.div_(columns).clamp_(-_FP8_MAX, _FP8_MAX).to(FP8)
    return q, scale_inv


def is_quantised(name: str, shape: tuple[int, ...]) -> bool:
    """Whether an exported FP8 checkpoint has this HF tensor in FP8: every linear weight, but no embedding, head or
    router."""
    *module, last = name.split(".")
    named = ".".join(module)
    kept = any(named == part or named.endswith("." + part) for part in _NOT_QUANTISED)
    return len(shape) == 2 and last == "weight" and not kept and "norm" not in module[-1]


def fp8_config(unquantised: Iterable[str]) -> dict[str, Any]:
    """``quantization_config`` for config.json. ``unquantised``: the names of the 2-D weights that stay as they are."""
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(BLOCK),
        "modules_to_not_convert": sorted(name.removesuffix(".weight") for name in unquantised),
    }


def _fp4_quads() -> torch.Tensor:
    """The four bf16 values of each pair of bytes."""
    values = torch.tensor([*_FP4_VALUES, *(-v for v in _FP4_VALUES)], dtype=torch.bfloat16)
    byte = torch.arange(256)
    twos = torch.stack([values[byte & 15], values[byte >> 4]], dim=1).view(torch.int32).flatten()
    return _two_byte_table(twos, torch.int64)


_FP4_QUADS = _fp4_quads()
# Exact in bf16. The last one is "not a number" in the format, and refused.
_E8M0 = torch.exp2(torch.arange(256, dtype=torch.float64) - 127).to(torch.bfloat16)


def dequantize_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """bf16 values ``[..., groups * 32]`` of blocks ``[..., groups, 16]`` and scales ``[..., groups]``, both uint8.

    Raises ValueError for a scale that is not a number.
    """
    if (scales == 255).any():
        raise ValueError("a scale is 255, which is not a number: the file is damaged")
    values = _look_up(_FP4_QUADS, blocks.contiguous().view(torch.int16)).view(*scales.shape, MXFP4_GROUP)
    return values.mul_(_E8M0[scales.int()].unsqueeze(-1)).flatten(-2)
