"""torch_dist's ``.metadata`` is a pickle: read only when everything it names is plain data of torch's checkpoints.

``.metadata`` of a checkpoint is unpickled by torch itself, which would run whatever it names. `refuse_code` reads it
before, with a reader that gives out a fixed set of classes and nothing else.
"""

from __future__ import annotations

import io
import pickle
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
    """Raise Broken unless the pickle in ``path`` names nothing but descriptions of tensors."""
    try:
        _Restricted(io.BytesIO(path.read_bytes())).load()
    except Exception as reason:  # damaged pickles raise nearly anything: EOFError, IndexError, TypeError, ...
        raise Broken(f"{path}: {type(reason).__name__}: {reason}") from reason
