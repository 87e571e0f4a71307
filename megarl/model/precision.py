"""FP8: what its rounding does to the inputs of each layer's matrices, and FP8 parameters as plain ones.

Transformer Engine keeps no account of the values that it rounds, but for delayed scaling's history. The same numbers
are taken here from the inputs themselves, before they are rounded, by the recipe's rule for a scale: the largest value
of its block is put on the format's largest, 448. What is then below half of the smallest step becomes 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import Tensor

from megarl.config import FP8Config

LARGEST, SMALLEST = 448.0, 2.0**-9  # of e4m3, which is every recipe's format of inputs; the smallest is a subnormal
BLOCK = {"tensorwise": None, "delayed": None, "blockwise": 128, "mxfp8": 32}  # neighbours that share a scale


def as_plain(parameter: Tensor) -> Tensor:
    """A parameter for those who read its numbers: a Transformer Engine FP8 one in its own 16-bit format."""
    return dequantize_fp8_tensor(parameter) if is_float8tensor(parameter) else parameter.detach()


def underflow(x: Tensor, block: int | None) -> Tensor:
    """[]: share of the numbers in ``x`` [..., n] that are not 0 and are rounded to it; ``block`` neighbours of a row
    share a scale, or (None) all of them."""
    magnitude = x.detach().abs().float()
    if block is None:
        scale = LARGEST / magnitude.amax().clamp(min=1e-30)
    else:
        rows = magnitude.flatten(0, -2)
        padded = F.pad(rows, (0, -rows.shape[-1] % block)).unflatten(-1, (-1, block))
        scale = LARGEST / padded.amax(-1, keepdim=True).clamp(min=1e-30)
        if block == 32:  # MXFP8's scales are powers of 2
            scale = scale.log2().floor().exp2()
        magnitude = padded
    scaled = magnitude * scale
    return ((scaled > 0) & (scaled <= SMALLEST / 2)).sum() / max(x.numel(), 1)


class FP8Rounding:
    """Of each layer over an update: the largest input of its matrices, and the largest share that is rounded to 0."""

    def __init__(self, chunks: list[torch.nn.Module], cfg: FP8Config, num_layers: int) -> None:
        self.cfg = cfg
        self.layers = [layer for chunk in chunks for layer in chunk.decoder.layers]
        device = next(chunks[0].parameters()).device
        self.seen = torch.zeros(2, num_layers, device=device)  # amax, underflow

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Look at what comes while it is entered."""
        self.seen.zero_()
        with contextlib.ExitStack() as stack:
            for layer in self.layers:
                for module in layer.modules():
                    if _is_matrix(module):
                        look = partial(self._look, layer.layer_number - 1)
                        stack.callback(module.register_forward_pre_hook(look).remove)
            yield

    def _look(self, layer: int, module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        x = _normed(module, inputs[0].detach())
        if x.numel():  # an expert may have no token
            found = torch.stack([x.abs().amax().float(), underflow(x, BLOCK[self.cfg.fp8_recipe])])
            self.seen[:, layer] = torch.maximum(self.seen[:, layer], found)

    def metrics(self) -> dict[str, float]:
        """The same on every rank. A collective over all of them."""
        dist.all_reduce(self.seen, op=dist.ReduceOp.MAX)
        amax, share = self.seen.tolist()
        out = {f"fp8/amax/layer_{i}": x for i, x in enumerate(amax)}
        return out | {f"fp8/underflow/layer_{i}": x for i, x in enumerate(share)}


def _normed(module: torch.nn.Module, x: Tensor) -> Tensor:
    """Transformer Engine's linear layers with a norm inside multiply what this gives."""
    weight = getattr(module, "layer_norm_weight", None)
    return x if weight is None else F.rms_norm(x, weight.shape, weight, module.eps)


def _is_matrix(module: torch.nn.Module) -> bool:
    """A linear layer of megatron's or Transformer Engine's, or the experts' together; the router is another class."""
    return type(module).__name__.endswith("Linear")
