"""vLLM's model in a worker, in the trainer's process or another: new weights into it, and checksums of what it
computes with.

Facts are of vllm 0.32.0, ``model_executor/model_loader/reload``: each module's tensors are collected until all of them
are there, then loaded into new memory, processed (fused, quantised, packed) and copied over the old ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from megarl.weights.checksums import checksum

if TYPE_CHECKING:
    from vllm.config import VllmConfig

HEAD = "lm_head.weight"
_STACKED = re.compile(r"(.*\.mlp\.experts)\.((?:gate_up|down)_proj(?:_bias)?)")
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def begin_reload(model: torch.nn.Module) -> None:
    """Make the model ready for new weights in Hugging Face's names and shapes, in as many calls as one likes."""
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

    _forget_prepacked_experts(model)
    sinks = [(name, parameter) for name, parameter in model.named_parameters() if name.endswith(".sinks")]
    initialize_layerwise_reload(model)
    for name, parameter in sinks:  # gpt-oss' loader copies them into the parameter itself, which now has no memory
        model.get_submodule(name.removesuffix(".sinks")).register_parameter("sinks", parameter)


def load(model: Any, config: VllmConfig, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    """Load some weights. Returns the names of vLLM's parameters that they went into."""
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(config):
        return set(model.load_weights(_expert_by_expert(weights)))


def _expert_by_expert(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Experts that gpt-oss stacks in one tensor, one at a time.

    vLLM's loader (`GptOssModel._load_weights_other`) copies a stack into the parameter itself, which in a reload has
    no memory: it would go on with the old experts, without a word. Single experts go the way that a reload sees.
    """
    for name, tensor in weights:
        match = _STACKED.fullmatch(name)
        if match is None:
            yield name, tensor
        else:
            yield from ((f"{match[1]}.{e}.{match[2]}", expert) for e, expert in enumerate(tensor))


def end_reload(model: torch.nn.Module, config: VllmConfig) -> None:
    """Process what is left. After a load that broke off, it keeps the next one from counting its tensors as its own."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    with set_current_vllm_config(config):
        finalize_layerwise_reload(model, config.model_config)
        _pack_output_layer(model)


def head_is_tied(model: torch.nn.Module) -> bool:
    """What vLLM made of it, which also looks at whether the checkpoint holds an output layer of its own."""
    return HEAD not in dict(model.named_parameters())  # a shared parameter is listed once, as the embedding


@torch.no_grad()
def checksums(model: torch.nn.Module) -> dict[str, int]:
    """A number for every tensor that the model computes with. Any one element that differs gives another number.

    On a CPU, vLLM keeps a linear layer's weight only in a form packed for its kernel: the sum is of the matrix that the
    kernel multiplies with, read out with unit vectors.
    """
    sums = {name: checksum(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    for name, module in model.named_modules():
        if hasattr(module, "cpu_linear"):
            sums[f"{name}.cpu_linear"] = checksum(_matrix_of(module))
    return sums


@torch.no_grad()
def spoil(model: torch.nn.Module) -> None:
    """Flip every bit of every parameter: what the next load does not bring keeps another checksum.

    But for a rank's part of a vocabulary that is all padding, which vLLM never reads and no load brings anything for.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    modules = [
        module
        for module in model.modules()
        if not (isinstance(module, VocabParallelEmbedding) and module.shard_indices.num_org_elements == 0)
    ]
    # Tied layers share one.
    for parameter in {parameter for module in modules for parameter in module.parameters(recurse=False)}:
        if parameter.numel():
            parameter.data.view(_BITS[parameter.element_size()]).bitwise_not_()
    for module in modules:
        vars(module).pop("cpu_linear", None)  # the packed copy of the weight


def _matrix_of(module: Any) -> torch.Tensor:
    """``[in, out]`` of a linear layer whose weight is packed."""
    known = vars(module)  # of a row-parallel layer, of any other linear layer, and of an embedding
    inputs = next(known[n] for n in ("input_size_per_partition", "input_size", "embedding_dim") if n in known)
    unit = torch.eye(inputs, dtype=module.weight.dtype)
    return torch.cat([module.cpu_linear(rows, module.weight, None) for rows in unit.split(256)])


def _forget_prepacked_experts(model: torch.nn.Module) -> None:
    """Make a reload pack experts for the CPU kernel again.

    vLLM takes a second load for an update in place and skips the packing (`UnquantizedFusedMoEMethod._setup_kernel`:
    `is_weight_update = self.moe_kernel is not None`), so the same weights give other log-probs, by 0.02 to 0.16.
    """
    if next(model.parameters()).device.type != "cpu":
        return
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)  # only vLLM's own layers have one
        if hasattr(method, "moe_kernel"):
            method.moe_kernel = None


def _pack_output_layer(model: torch.nn.Module) -> None:
    """Make the output layer follow a reload of tied embeddings.

    It gets no weight of its own then, so vLLM leaves alone the copy that it packed for the CPU kernel at the first
    load: log-probs would come from the first weights for ever.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    if next(model.parameters()).device.type != "cpu":
        return
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)
