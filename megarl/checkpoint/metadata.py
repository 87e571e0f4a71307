"""torch_dist's ``.metadata`` is a pickle: read only when everything it names is plain data of torch's checkpoints.

``.metadata`` of a checkpoint is unpickled by torch itself, which would run whatever it names. `refuse_code` reads it
before, with a reader that gives out a fixed set of classes and nothing else. torch also unpickles every item that the
metadata calls an object instead of a tensor: those it refuses too, but for the ones that are never asked for.
"""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

from megarl.checkpoint.folder import Broken

# Dataclasses and enumerations that describe tensors, and what a dtype, a layout, a size or a path is made of.
_PLAIN = {
    "torch.distributed.checkpoint.metadata": None,
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size", "memory_format", "device"},
    "torch.serialization": {"_get_layout"},
    "torch._utils": {"_get_layout"},
    "collections": {"OrderedDict"},
    "builtins": {"set", "frozenset", "complex"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
}
_NEVER_READ = re.compile(r".*\b_extra_state\d*(/shard_[\d._]+)?")
_DESCRIBED = {
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
}


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        names = _PLAIN.get(module, set())
        if name in (_DESCRIBED if names is None else names) or (module == "torch" and name in _dtypes()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no description of tensors")


def _dtypes() -> set[str]:
    import torch

    return {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


def refuse_code(path: Path) -> None:
    """Raise Broken unless the pickle in ``path`` names nothing but descriptions, and these describe tensors."""
    try:
        entries = _Restricted(io.BytesIO(path.read_bytes())).load().state_dict_metadata.items()
        objects = [key for key, entry in entries if type(entry).__name__ != "TensorStorageMetadata"]
    except Exception as reason:  # damaged pickles raise nearly anything: EOFError, IndexError, TypeError, ...
        raise Broken(f"{path}: {type(reason).__name__}: {reason}") from reason
    if strange := [key for key in objects if not _NEVER_READ.fullmatch(key)]:
        raise Broken(f"{path}: {strange[0]!r} is to be unpickled; a checkpoint of megarl has tensors there")
