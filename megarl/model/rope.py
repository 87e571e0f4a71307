"""Rotary frequencies from a model's config.json, in fp32, by the formulas of transformers'
``modeling_rope_utils.py``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megarl.model.family import Rope


def inverse_frequencies(rope: Rope, head_size: int) -> Tensor:
    """[head_size / 2]: the angle per position of every pair of dimensions."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.int64).float() / head_size
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.type == "linear":
        return frequencies / rope.factor
    if rope.type == "llama3":
        return _llama3(frequencies, rope)
    return frequencies


def _llama3(frequencies: Tensor, rope: Rope) -> Tensor:
    """Llama 3.1: long wavelengths are slowed by ``factor``, short ones kept, those between blended."""
    wavelength = 2 * math.pi / frequencies
    longest = rope.original_max_position_embeddings / rope.low_freq_factor
    shortest = rope.original_max_position_embeddings / rope.high_freq_factor
    slowed = torch.where(wavelength > longest, frequencies / rope.factor, frequencies)
    blend = (rope.original_max_position_embeddings / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - blend) * slowed / rope.factor + blend * slowed
    between = (wavelength >= shortest) & (wavelength <= longest)
    return torch.where(between, blended, slowed)
