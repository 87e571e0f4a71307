"""megarl.parallel.cpu: what megatron-core's calls of CUDA mean on a CPU, and that nothing of it stays."""

from __future__ import annotations

import torch
from torch.utils import _device

from megarl.parallel.cpu import megatron_on_cpu


def test_cuda_means_the_cpu_inside_alone() -> None:
    factories = (torch.zeros, torch.arange, torch.Tensor.type)
    with megatron_on_cpu():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.cuda.current_device() == "cpu"
    assert factories == (torch.zeros, torch.arange, torch.Tensor.type)


def test_a_device_context_that_is_first_used_inside_works_outside() -> None:
    """Torch remembers the factories of its first `with torch.device(...)`. Where these were ours, transformers, which
    loads models that way, left buffers of rotary embeddings as memory happened to be."""
    _device._device_constructors.cache_clear()
    with megatron_on_cpu(), torch.device("meta"):
        assert torch.arange(3).is_meta
    with torch.device("meta"):
        assert torch.arange(3).is_meta
