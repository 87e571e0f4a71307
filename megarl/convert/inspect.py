"""What a checkpoint of either format is, without reading its weights."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from megarl.convert.files import PROGRESS
from megarl.convert.manifest import dtype_name
from megarl.convert.progress import readable
from megarl.convert.sources import HFSource, MegatronSource, open_source
from megarl.convert.torch_dist_names import master_keys, model_keys, of_part, parts
from megarl.convert.torch_dist_reader import COMMON_OBJECT
from megarl.model.family import ModelSpec
from megarl.weights.durable import INCOMPLETE


def describe_checkpoint(path: Path, config_from: Path | None = None) -> dict[str, Any]:
    """Facts by name, in the order to be shown. Raises CheckpointError where there is no readable checkpoint."""
    # A run killed right after it gave its folder the final name leaves the record of what was done, but all is done.
    if (path / PROGRESS).is_file() and path.name.endswith(INCOMPLETE):
        done = [json.loads(line)["unit"] for line in (path / PROGRESS).read_text().splitlines()[1:] if line[-1] == "}"]
        return {"path": str(path), "finished": False, "interrupted after": done}
    source = open_source(path, config_from)
    facts: dict[str, Any] = {"path": str(source.path)}
    if isinstance(source, HFSource):
        facts |= {"format": "Hugging Face safetensors", "finished": True}
        facts |= _sizes(source.spec) | _hf_tensors(source)
    else:
        facts |= {"format": "Megatron torch_dist", "finished": True}  # it would not have opened
        facts |= _sizes(source.spec) | _megatron_tensors(source)
    facts["manifest"] = source.manifest.tool if source.manifest else "none"
    facts["problems"] = source.problems() or "none"
    source.close()
    return facts


def _sizes(spec: ModelSpec) -> dict[str, Any]:
    parameters = sum(math.prod(tensor.shape) for tensor in spec.tensors())
    facts: dict[str, Any] = {"family": spec.family.name, "parameters": parameters, "layers": spec.num_layers}
    facts |= {"hidden size": spec.hidden_size, "vocabulary": spec.vocab_size, "tied embeddings": spec.tied}
    if spec.moe:
        facts["experts"] = f"{spec.moe.num_experts} in {sum(spec.moe.layers)} of {spec.num_layers} layers"
    facts["MTP layers"] = spec.mtp_num_layers
    return facts


def _hf_tensors(source: HFSource) -> dict[str, Any]:
    stored = [part for name in source.checkpoint.names() for part in source.checkpoint.stored(name)]
    dtypes = Counter(dtype_name(part.dtype) for part in stored)
    files = {part.file.name for part in stored}
    return {
        "tensors": len(stored),
        "dtypes": dict(dtypes.most_common()),
        "size": f"{readable(sum(part.nbytes for part in stored))} in {len(files)} files",
    }


def _megatron_tensors(source: MegatronSource) -> dict[str, Any]:
    keys = source.reader.keys()
    own = {key: keys[key] for key in of_part(model_keys(keys), source.names.prefix)}
    others = [part.removesuffix(".") for part in parts(keys) if part != source.names.prefix]
    dtypes = Counter(dtype_name(dtype) for _, dtype in own.values())
    total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in own.values())
    vocab = next(shape[0] for key, (shape, _) in own.items() if key.endswith("word_embeddings.weight"))
    objects = source.reader.objects()
    optimizer = [key for key in keys if "optimizer." in key]
    return {
        "iteration": source.reader.iteration,
        "tensors": len(own),
        "dtypes": dict(dtypes.most_common()),
        "size": f"{readable(total)} in {len(list(source.path.glob('*.distcp')))} files",
        "padded vocabulary": vocab,
        "layer keys": "stacked" if source.names.stacked else "per layer",
        "names": source.names.flavour,
        "common state": "common_state" if COMMON_OBJECT in objects else "common.pt",
        "other parts": ", ".join(others) or "none",
        "_extra_state": sum("_extra_state" in key for key in objects),
        "optimizer state": f"{len(optimizer)} tensors, {len(master_keys(keys))} fp32 masters" if optimizer else "none",
    }
