"""Pickles read as data: nothing of what they name is imported or called.

torch_dist checkpoints keep their metadata, their common state and the headers of tensors as pickles, which can run any
code when unpickled. Here every class or function a pickle names becomes an inert `Record` of the arguments and state
it was given, but for a few plain types (`_PLAIN`). So classes of other megatron-core versions need not exist either,
and tensors of a common state are not read.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from typing import Any

import torch


class Record:
    """What a pickle says of one object: the name of its class or function, its arguments and its state."""

    name = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Record:
        record = super().__new__(cls)
        record.__dict__.update(args=args, kwargs=kwargs, state=None, items=[])
        return record

    def __setstate__(self, state: Any) -> None:
        self.__dict__["state"] = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.__dict__["items"].append((key, value))

    def append(self, value: Any) -> None:
        self.__dict__["items"].append(value)

    def extend(self, values: Any) -> None:
        self.__dict__["items"].extend(values)

    def fields(self) -> dict[str, Any]:
        """State that is a dict of attributes, as of dataclasses and Namespaces; {} where it is something else."""
        state = self.__dict__["state"]
        return state if isinstance(state, dict) else {}

    @property
    def kind(self) -> str:
        """Dotted name of its class, or of the function that was to be called."""
        return type(self).name

    def __repr__(self) -> str:
        return f"<{self.kind}>"


# Immutable or without behaviour: built for real. OrderedDict keeps the hooks of a tensor, and parts of states.
_PLAIN = {("torch", "Size"): tuple, ("collections", "OrderedDict"): dict, ("builtins", "set"): set}


class _Inert(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        return type("Record", (Record,), {"name": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        return pid  # of a tensor in torch.save's format: ("storage", its type, its file, device, elements)


def read_pickle(data: bytes) -> Any:
    """The pickle as data. Raises ValueError where it is no whole pickle."""
    try:
        return _Inert(io.BytesIO(data)).load()
    except Exception as reason:  # damaged pickles raise nearly anything: EOFError, IndexError, TypeError, ...
        raise ValueError(f"damaged pickle ({type(reason).__name__}: {reason})") from reason


def read_torch_save(file: Any) -> Any:
    """What ``torch.save`` wrote to ``file`` (a path or a seekable file), as data; tensors are Records.

    Raises ValueError where it is damaged.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(names) != 1:
                raise ValueError("not in torch.save's format: no data.pkl")
            return read_pickle(archive.read(names[0]))
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError) as reason:
        raise ValueError(f"damaged ({reason})") from reason
