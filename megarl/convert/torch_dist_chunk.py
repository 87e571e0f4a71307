"""One chunk of a torch_dist checkpoint: a whole ``torch.save`` archive of one tensor, within a .distcp file.

Only the frame around the numbers is written and parsed here, so that the numbers themselves go from a mapped file to
another by one copy. The archive is a zip file with stored (not compressed) entries ``data.pkl``, ``byteorder``,
``data/0`` (the numbers, 64-byte aligned) and ``version``; checksums are left 0 as
``torch.serialization.set_crc32_options(False)`` leaves them. An entry of our own, ``whose``, says which part of which
tensor it is, so that files that changed places are found out. torch reads neither.

Source: torch 2.13, ``caffe2/serialize/inline_container.cc`` and ``torch/serialization.py``; PKWARE's APPNOTE 6.3.
"""

from __future__ import annotations

import functools
import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch

from megarl.convert.inert_pickle import Record, read_pickle

ALIGNMENT = 64
_LOCAL = struct.Struct("<IHHHHHIIIHH")  # local file header
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")  # central directory entry
_END = struct.Struct("<IHHHHIIH")  # end of central directory
_ROOT = "archive/"
_WHOSE = "whose"
_STORAGES = {
    torch.float32: torch.FloatStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
    torch.float64: torch.DoubleStorage,
    torch.uint8: torch.ByteStorage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
}
_DTYPES = {storage.__name__: dtype for dtype, storage in _STORAGES.items()}


@dataclass(frozen=True)
class Frame:
    """The bytes before and after the numbers of a chunk."""

    head: bytes
    tail: bytes


class _Pickler(pickle.Pickler):
    """Pickles a tensor as torch.save does, without there being one."""

    def __init__(self, file: io.BytesIO, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
        super().__init__(file, protocol=2)
        self.dtype, self.sizes = dtype, sizes

    def persistent_id(self, obj: Any) -> Any:
        if obj is _STORAGE:
            return ("storage", _STORAGES[self.dtype], "0", "cpu", math.prod(self.sizes))
        return None

    def reducer_override(self, obj: Any) -> Any:
        if obj is not _TENSOR:
            return NotImplemented
        args = (_STORAGE, 0, self.sizes, _row_major(self.sizes), False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, args


class _Token:
    pass


_STORAGE, _TENSOR = _Token(), _Token()


@functools.lru_cache(maxsize=256)
def frame(dtype: torch.dtype, sizes: tuple[int, ...], key: str, offsets: tuple[int, ...]) -> Frame:
    """The frame of a row-major tensor, a part of ``key``. Raises KeyError for a dtype that checkpoints do not hold."""
    pickled = io.BytesIO()
    _Pickler(pickled, dtype, sizes).dump(_TENSOR)
    nbytes = math.prod(sizes) * dtype.itemsize
    head, entries = bytearray(), []
    for name, data in (("data.pkl", pickled.getvalue()), ("byteorder", b"little")):
        entries.append((name, len(head), len(data)))
        head += _local_header(name, len(data)) + data
    entries.append(("data/0", len(head), nbytes))
    padding = -(len(head) + _LOCAL.size + len(_ROOT) + len("data/0") + 4) % ALIGNMENT
    head += _local_header("data/0", nbytes, struct.pack("<2sH", b"FB", padding) + bytes(padding))
    assert len(head) % ALIGNMENT == 0
    tail = bytearray()
    for name, data in (("version", b"3\n"), (_WHOSE, whose(key, offsets))):
        entries.append((name, len(head) + nbytes + len(tail), len(data)))
        tail += _local_header(name, len(data)) + data
    directory = len(head) + nbytes + len(tail)
    central = b"".join(_central_header(*entry) for entry in entries)
    tail += central + _END.pack(0x06054B50, 0, 0, len(entries), len(entries), len(central), directory, 0)
    return Frame(bytes(head), bytes(tail))


def whose(key: str, offsets: tuple[int, ...]) -> bytes:
    """What a frame says of the chunk it is around."""
    return f"{key} {list(offsets)}".encode()


def _local_header(name: str, nbytes: int, extra: bytes = b"") -> bytes:
    encoded = (_ROOT + name).encode()
    return _LOCAL.pack(0x04034B50, 0, 0, 0, 0, 0, 0, nbytes, nbytes, len(encoded), len(extra)) + encoded + extra


def _central_header(name: str, at: int, nbytes: int) -> bytes:
    encoded = (_ROOT + name).encode()
    fields = (0x02014B50, 0, 0, 0, 0, 0, 0, 0, nbytes, nbytes, len(encoded), 0, 0, 0, 0, 0, at)
    return _CENTRAL.pack(*fields) + encoded


@dataclass(frozen=True)
class Numbers:
    """Where in its archive a chunk's numbers are; row-major. ``crc`` is 0 where none was written, ``whose`` empty."""

    start: int
    dtype: torch.dtype
    sizes: tuple[int, ...]
    crc: int
    whose: bytes

    @property
    def count(self) -> int:
        return math.prod(self.sizes)


def parse(archive: io.RawIOBase) -> Numbers:
    """Find the numbers of a chunk that torch.save or `frame` wrote.

    Raises ValueError where anything is damaged or contradicts itself, so that a changed frame cannot mean other
    numbers.
    """
    try:
        with zipfile.ZipFile(archive) as entries:
            infos = {info.filename.partition("/")[2]: info for info in entries.infolist()}
            dtype, file, sizes = _header(_content(archive, infos, "data.pkl"))
            if "byteorder" in infos and _content(archive, infos, "byteorder") != b"little":
                raise ValueError("numbers in big-endian order")
            data = _entry(infos, f"data/{file}")
            start, nbytes = _start(archive, data), math.prod(sizes) * dtype.itemsize
            if data.file_size != nbytes:
                raise ValueError(f"{data.file_size} bytes of numbers for shape {sizes} of {dtype}")
            following = [info.header_offset for info in entries.infolist() if info.header_offset > data.header_offset]
            gap = min([*following, entries.start_dir]) - (start + nbytes)
            if start % ALIGNMENT or not 0 <= gap < ALIGNMENT:  # together these leave only one place they can be at
                raise ValueError("its numbers are not where they belong")
            said = _content(archive, infos, _WHOSE) if _WHOSE in infos else b""
            return Numbers(start, dtype, sizes, data.CRC, said)
    except (zipfile.BadZipFile, struct.error, EOFError, NotImplementedError, UnicodeDecodeError) as reason:
        raise ValueError(str(reason)) from reason


def _entry(infos: dict[str, zipfile.ZipInfo], name: str) -> zipfile.ZipInfo:
    if name not in infos or infos[name].compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"its {name} is missing or compressed")
    return infos[name]


def _start(archive: io.RawIOBase, info: zipfile.ZipInfo) -> int:
    """Where an entry's content begins."""
    archive.seek(info.header_offset)
    signature, *_, name_length, extra_length = _LOCAL.unpack(archive.read(_LOCAL.size))
    if signature != 0x04034B50 or archive.read(name_length) != info.orig_filename.encode():
        raise ValueError(f"no entry where {info.filename} should begin")
    return info.header_offset + _LOCAL.size + name_length + extra_length


def _content(archive: io.RawIOBase, infos: dict[str, zipfile.ZipInfo], name: str) -> bytes:
    info = _entry(infos, name)
    archive.seek(_start(archive, info))
    return archive.read(info.file_size)


def _header(pickled: bytes) -> tuple[torch.dtype, str, tuple[int, ...]]:
    """Dtype, file and shape of a pickled tensor."""
    tensor = read_pickle(pickled)
    if isinstance(tensor, Record) and tensor.kind == "torch._utils._rebuild_parameter" and tensor.args:
        tensor = tensor.args[0]
    if not isinstance(tensor, Record) or tensor.kind != "torch._utils._rebuild_tensor_v2":
        raise ValueError("no plain tensor in it")
    try:
        (_, storage, file, _, elements), first, sizes, strides = tensor.args[:4]
        kind = storage.name.rpartition(".")[2]
        sizes, strides = tuple(map(int, sizes)), tuple(map(int, strides))
    except (TypeError, ValueError, AttributeError) as reason:
        raise ValueError(f"damaged tensor header ({reason})") from reason
    if kind not in _DTYPES:
        raise ValueError(f"numbers of type {kind} are not read")
    rows = zip(sizes, strides, _row_major(sizes), strict=True) if len(sizes) == len(strides) else ()
    plain = len(sizes) == len(strides) and all(size == 1 or stride == wanted for size, stride, wanted in rows)
    if not plain or first != 0 or elements != math.prod(sizes) or min(sizes, default=1) < 1:
        raise ValueError(f"a tensor of shape {sizes} and strides {strides}, which is not all of its storage in order")
    return _DTYPES[kind], str(file), sizes


def _row_major(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[i + 1 :]) for i in range(len(sizes)))
