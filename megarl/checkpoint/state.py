"""What a checkpoint holds of this rank: model and optimizer as sharded tensors, and all else as a tree of plain values.

Sharded state. Every parameter goes under megatron-core's own key, and its optimizer state under
``optimizer.state.{exp_avg,exp_avg_sq,fp32_param}.<key>`` with the shape of the whole parameter. A rank of the
distributed optimizer owns a flat range of a parameter; here the range becomes at most three rectangles for a matrix
(part of a row, whole rows, part of a row), which lie where the optimizer keeps them: saving gathers and reshapes
nothing, loading writes in place, and any other layout finds the elements by their place in the parameter.
``fp32_param`` is there only where the model itself is not fp32. Keys of another engine than the policy begin with its
name.

Trees. `split` turns nested dicts and lists into JSON and named tensors, `join` turns them back: nothing is pickled.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding, extract_sharded_tensors_and_factories
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

from megarl.model.engine import Engine
from megarl.model.optimizer import FusedAdamW, parts_of

Rectangle = tuple[tuple[int, ...], tuple[int, ...], int, int]  # offset, size, first flat element, one past the last


def sharded_state(engine: Engine, *, prefix: str = "", optimizer: bool = True) -> dict[str, Any]:
    """The engine's state as megatron's sharded tensors, whose data are the live tensors themselves."""
    state: dict[str, Any] = {}
    for at, chunk in enumerate(model_chunks(engine)):
        with engine.mesh.platform():
            weights = chunk.sharded_state_dict(prefix="")
        part: dict[str, Any] = {"model": weights}
        if optimizer:
            part["optimizer"] = _optimizer_state(engine.optimizer, weights)
        add_prefix_for_sharding(part, prefix)
        state[f"{prefix}{at}"] = part
    return state


def tensors_of(state: dict[str, Any]) -> dict[str, Any]:
    """Of `sharded_state` what is tensors. The rest are objects that modules of Transformer Engine keep beside their
    weights (the history of delayed FP8 scaling): they are saved for Megatron, and not read back."""
    tensors, _ = extract_sharded_tensors_and_factories(state)
    return dict(tensors)


def model_chunks(engine: Engine) -> list[torch.nn.Module]:
    """The parts of the model on this rank, as megatron's modules."""
    return [chunk.module for chunk in engine.chunks]


def _optimizer_state(optimizer: MegatronOptimizer, weights: dict[str, Any]) -> dict[str, Any]:
    """Adam's moments, and fp32 weights where the model's are not, of the parameters in ``weights``."""
    sharded, _ = extract_sharded_tensors_and_factories(weights)
    places = {id(base.data): base for base in nested_values(sharded)}
    out: dict[str, Any] = {}
    for parameter, tensors, start, alone in owned(optimizer):
        base = places.get(id(parameter))
        if base is None:  # of another chunk of the model
            continue
        for name, tensor in tensors.items():
            pieces = _pieces(base, parameter, tensor, start, f"optimizer.state.{name}.", alone)
            out |= {f"{len(out) + number}": piece for number, piece in enumerate(pieces)}
    return out


def owned(optimizer: MegatronOptimizer) -> Iterator[tuple[torch.nn.Parameter, dict[str, Tensor], int, bool]]:
    """Every parameter that this rank's optimizer updates a part of: (parameter, flat tensors of that part by name, its
    first flat element, whether no data-parallel peer has the same part)."""
    for part in parts_of(optimizer):
        if isinstance(part, DistributedOptimizer):
            for parameter in part.model_param_group_index_map:
                here = part._get_model_param_range_map(parameter)["param"]
                tensors = _with_moments(part, part._get_main_param_and_optimizer_states(parameter))
                yield parameter, _kept(parameter, tensors), here.start, True
            continue
        for group in part.optimizer.param_groups:
            mains = {id(main): main for main in group["params"]}
            for parameter in _models_parameters(part, mains):
                main = getattr(parameter, "main_param", parameter)
                tensors = _with_moments(part, {"param": main, **part.optimizer.state[main]})
                yield parameter, _kept(parameter, tensors), 0, False


def _models_parameters(part: MegatronOptimizer, mains: dict[int, Tensor]) -> Iterator[torch.nn.Parameter]:
    """The model's parameters behind the ones that an undistributed optimizer updates: themselves, or what they are the
    fp32 copies of."""
    copied = [p for group in getattr(part, "float16_groups", []) for p in group if id(p.main_param) in mains]
    behind = {id(p.main_param) for p in copied}
    yield from copied
    yield from (main for key, main in mains.items() if key not in behind)


def _with_moments(part: MegatronOptimizer, tensors: dict[str, Any]) -> dict[str, Tensor]:
    """Adam makes its moments with the first update; a checkpoint before or into it needs them."""
    main = tensors["param"]
    adam = part.optimizer
    state = adam.moments(main) if isinstance(adam, FusedAdamW) else adam.state[main]
    for name in ("exp_avg", "exp_avg_sq"):
        if name not in state:
            state[name] = torch.zeros_like(main)
        tensors[name] = state[name]
    return tensors


def _kept(parameter: torch.nn.Parameter, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    kept = {name: tensors[name] for name in ("exp_avg", "exp_avg_sq")}
    if parameter.dtype != torch.float32:
        kept["fp32_param"] = tensors["param"].detach()
    return kept


def _pieces(
    base: ShardedTensor | ShardedTensorFactory,
    parameter: torch.nn.Parameter,
    tensor: Tensor,
    start: int,
    prefix: str,
    alone: bool,
) -> list[ShardedTensor]:
    """``tensor`` holds the elements from ``start`` of the flat parameter: the same as rectangles of the whole."""
    places = nested_values(base.build()) if isinstance(base, ShardedTensorFactory) else [base]
    flat, end, out = tensor.view(-1), start + tensor.numel(), []
    for place in places:
        if not place.data.is_contiguous():
            raise ValueError(f"{place.key}: megatron saves it in parts that are not contiguous; it cannot be resumed")
        first = (place.data.data_ptr() - parameter.data_ptr()) // parameter.element_size()
        low, high = max(start, first) - first, min(end, first + place.data.numel()) - first
        axes = place.prepend_axis_num
        for offset, size, from_, to in rectangles(tuple(place.data.shape), low, high):
            shape = (1,) * axes + size
            data = flat[first + from_ - start : first + to - start].view(shape)
            corner = zip(place.global_offset, (0,) * axes + offset, strict=True)
            out.append(
                ShardedTensor(
                    key=prefix + place.key,
                    data=data,
                    dtype=data.dtype,
                    local_shape=shape,
                    global_shape=place.global_shape,
                    global_offset=tuple(a + b for a, b in corner),
                    axis_fragmentations=None,
                    replica_id=(*place.replica_id[:-1], 0) if alone else place.replica_id,
                    allow_shape_mismatch=place.allow_shape_mismatch,
                )
            )
    return out


def rectangles(shape: tuple[int, ...], low: int, high: int) -> list[Rectangle]:
    """The flat elements [low, high) of a row-major array as the fewest aligned rectangles, in order."""
    if high <= low:
        return []
    if len(shape) == 1:
        return [((low,), (high - low,), low, high)]
    row = math.prod(shape[1:])

    def within(number: int, a: int, b: int) -> list[Rectangle]:
        inner = rectangles(shape[1:], a, b)
        return [((number, *offset), (1, *size), number * row + x, number * row + y) for offset, size, x, y in inner]

    first, last = -(-low // row), high // row  # whole rows [first, last)
    if first > last:
        return within(last, low - last * row, high - last * row)
    out = within(first - 1, low - (first - 1) * row, row) if low < first * row else []
    if first < last:
        zeros = (0,) * (len(shape) - 1)
        out.append(((first, *zeros), (last - first, *shape[1:]), first * row, last * row))
    return out + (within(last, 0, high - last * row) if high > last * row else [])


# ---- what is not sharded ---------------------------------------------------------------------------------------------


def engine_state(engine: Engine) -> dict[str, Any]:
    """Where the learning-rate schedule and Adam's bias correction are."""
    steps = {int(group.get("step", 0)) for group in engine.optimizer.param_groups if group["params"]}
    return {"scheduler_steps": engine.scheduler.num_steps, "adam_steps": max(steps, default=0)}


def load_engine_state(engine: Engine, state: dict[str, Any]) -> None:
    """The inverse of `engine_state`; the schedule itself is the config's."""
    for group in engine.optimizer.param_groups:
        group["step"] = state["adam_steps"]
    engine.scheduler.num_steps = state["scheduler_steps"]
    engine.scheduler.step(0)


def rng_state() -> dict[str, Any]:
    """Every generator of this process that training may draw from."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": {"name": name, "keys": torch.from_numpy(keys.astype(np.int64)), "position": int(position)}
        | {"has_gauss": int(has_gauss), "cached": float(cached)},
        "megatron": {name: state.cpu() for name, state in get_cuda_rng_tracker().get_states().items()},
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def load_rng_state(state: dict[str, Any]) -> None:
    """The inverse of `rng_state`."""
    torch.set_rng_state(state["torch"])
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state((numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    get_cuda_rng_tracker().set_states(dict(state["megatron"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def split(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """(the tree as JSON can hold it, its tensors by the path to them). Raises TypeError for anything but dicts with
    names as keys, lists, tuples (which become lists), tensors, numbers, text, booleans and None."""
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            tensors[path] = value.detach().cpu().contiguous()
            return {"tensor": path}
        if isinstance(value, dict):
            if wrong := [key for key in value if not isinstance(key, str)]:
                raise TypeError(f"{path}: the key {wrong[0]!r} of a state is not text")
            return {"dict": {key: walk(inner, f"{path}.{key}") for key, inner in value.items()}}
        if isinstance(value, list | tuple):
            return [walk(inner, f"{path}.{at}") for at, inner in enumerate(value)]
        if isinstance(value, float) and not math.isfinite(value):
            return {"float": str(value)}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"{path}: a state holds a {type(value).__name__}, which JSON has no form for")

    return walk(tree, "state"), tensors


def join(said: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `split`."""
    if isinstance(said, list):
        return [join(inner, tensors) for inner in said]
    if not isinstance(said, dict):
        return said
    (kind, value), *_ = said.items()
    if kind == "dict":
        return {key: join(inner, tensors) for key, inner in value.items()}
    return tensors[value] if kind == "tensor" else float(value)
