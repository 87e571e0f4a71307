"""Rows of a data set, read one by one from JSONL, JSON, Parquet or a `datasets` name.

Contract: `read_rows` never stops at a bad row. It yields `(where, record)` for every row: `where` is `:17` (line,
from 1) for JSONL and `[17]` (index, from 0) for the rest, and `record` is the row's dict, or the `RecordError` that
says what is wrong with it. What makes the whole source unreadable (no such file, a broken Parquet footer) raises
`DataError`. `collect` turns rows into items and applies what the config says about bad and over-long ones.

JSON is read strictly: UTF-8 only (a BOM is skipped), no NUL, no NaN or Infinity literals, no key twice in one object.
A line of more than 16 MiB is a bad row and is never whole in memory.
Compressed files are refused by name or by their first bytes, before anything is unpacked.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

import datasets
import pyarrow
import pyarrow.parquet

from megarl.config import DataConfig

T = TypeVar("T")

UTF8_BOM = b"\xef\xbb\xbf"
MAX_LINE_BYTES = 16 << 20
_PIECE_BYTES = 1 << 20
# How files begin that are not text in UTF-8.
OTHER_FILES = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"\xfd7zXZ\0": "xz",
    b"BZh": "bzip2",
    b"PAR1": "Parquet",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
MAX_LISTED = 10
JSON_TYPES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}


class DataError(Exception):
    """The data set cannot be used; the message says where and why."""


class RecordError(ValueError):
    """One record cannot be used; the message is `field: reason`, and whoever knows the record's place adds it."""


class OverlongError(RecordError):
    """The prompt has more tokens than data.max_prompt_length."""


@dataclass(frozen=True)
class Loaded(Sequence[T], Generic[T]):
    """The usable items of a data set in file order, and how many records were dropped for each reason."""

    items: list[T]
    dropped: dict[str, int]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # int -> T, slice -> list[T], as a list has it
        return self.items[index]


@dataclass
class Refusals:
    """Counts refused records and keeps the first few to show."""

    count: int = 0
    lines: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        """Count one refused record."""
        self.count += 1
        if len(self.lines) < MAX_LISTED:
            self.lines.append(line)


def collect(
    data: DataConfig, source: str, split: str, build: Callable[[str, dict[str, Any]], T], limit: int | None
) -> Loaded[T]:
    """Build an item from each of the first `limit` rows; drop or refuse the bad and the over-long as `data` says."""
    items: list[T] = []
    dropped = {"bad_record": 0, "overlong": 0}
    refusals = Refusals()
    name = Path(source).name
    for where, record in islice(read_rows(source, data.subset, split), limit):
        try:
            if isinstance(record, RecordError):
                raise record
            items.append(build(name + where, record))
        except RecordError as error:
            overlong = isinstance(error, OverlongError)
            if (data.overlong_prompts if overlong else data.bad_records) == "drop":
                dropped["overlong" if overlong else "bad_record"] += 1
            else:
                refusals.add(f"{source}{where}: {error}")
    if refusals.count:
        raise DataError(refused_message(source, refusals))
    if not items:
        raise DataError(empty_message(source, dropped))
    return Loaded(items, dropped)


def refused_message(source: str, refusals: Refusals) -> str:
    """The first refused records, how many there are, and which keys would drop them instead."""
    unlisted = refusals.count - len(refusals.lines)
    more = [f"... and {unlisted} more"] if unlisted else []
    advice = "Mend the data, or set data.bad_records=drop (data.overlong_prompts=drop for prompts that are too long)."
    return "\n".join([f"{refusals.count} unusable records in {source}:", *refusals.lines, *more, advice])


def empty_message(source: str, dropped: dict[str, int]) -> str:
    """Why nothing is left to train on."""
    if not any(dropped.values()):
        return f"{source}: the data set is empty"
    return (
        f"{source}: no usable record is left: {dropped['bad_record']} bad records and {dropped['overlong']} over-long "
        "prompts were dropped; data.bad_records=refuse and data.overlong_prompts=refuse show which and why"
    )


def read_rows(source: str, subset: str | None, split: str) -> Iterator[tuple[str, dict[str, Any] | RecordError]]:
    """Rows of a .jsonl, .json or .parquet file, or of a directory or hub name that `datasets` knows."""
    readers = {".jsonl": read_jsonl, ".json": read_json, ".parquet": read_parquet}
    path = Path(source)
    if path.suffix in readers:
        if not path.is_file():
            raise DataError(f"{source}: no such file (looked in {Path.cwd()})")
        return readers[path.suffix](path)
    if path.is_file():
        kinds = f"expected {', '.join(readers)} or the name of a data set"
        raise DataError(f"{source}: unknown kind of file; {kinds}; compressed files have to be unpacked first")
    return read_named(source, subset, split)


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any] | RecordError]]:
    """One object per line; blank lines are skipped but counted."""
    with path.open("rb") as file:
        refuse_other_files(path, file.peek(8))
        for number, line in enumerate(lines_of(file), start=1):
            if isinstance(line, RecordError):
                yield f":{number}", line
                continue
            line = line.removeprefix(UTF8_BOM) if number == 1 else line
            if line.strip():
                try:
                    yield f":{number}", as_record(parse_json(line.rstrip(b"\r\n")))
                except RecordError as error:
                    yield f":{number}", error


def refuse_other_files(path: Path, first: bytes) -> None:
    """Raise DataError for what is no text in UTF-8, whatever the file is called."""
    for magic, kind in OTHER_FILES.items():
        if first.startswith(magic):
            raise DataError(f"{path}: begins as a {kind} file does; give it as text in UTF-8, and not compressed")


def lines_of(file: BinaryIO) -> Iterator[bytes | RecordError]:
    """Lines with their ends; in place of one that is too long, an error that says how long it is."""
    pieces: list[bytes] = []
    length = 0
    while piece := file.readline(_PIECE_BYTES):
        length += len(piece)
        if length > MAX_LINE_BYTES:
            pieces.clear()
        else:
            pieces.append(piece)
        if piece.endswith(b"\n"):
            yield whole_line(pieces, length)
            pieces, length = [], 0
    if length:
        yield whole_line(pieces, length)


def whole_line(pieces: list[bytes], length: int) -> bytes | RecordError:
    """The line of these pieces, of which there are none where it is too long."""
    if length > MAX_LINE_BYTES:
        return RecordError(f"the line has {length} bytes, more than {MAX_LINE_BYTES}")
    return b"".join(pieces)


def read_json(path: Path) -> Iterator[tuple[str, dict[str, Any] | RecordError]]:
    """A file that holds one list of objects."""
    content = path.read_bytes()
    refuse_other_files(path, content[:8])
    try:
        rows = parse_json(content.removeprefix(UTF8_BOM))
    except RecordError as error:
        raise DataError(f"{path}: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of objects, found {json_type(rows)}; one object per line is .jsonl")
    yield from indexed(rows)


def read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any] | RecordError]]:
    """Row group by row group, so that a large file is never in memory as Python objects at once."""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from indexed(row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist())
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error


def read_named(name: str, subset: str | None, split: str) -> Iterator[tuple[str, dict[str, Any] | RecordError]]:
    """A split of a data set that `datasets.load_dataset` finds on disk, in its cache or on the hub."""
    try:
        rows = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # loaders raise anything, and the user needs to know what was asked of them
        call = f"datasets.load_dataset({name!r}, {subset!r}, split={split!r})"
        raise DataError(f"{name}: no such file, and {call} failed: {type(error).__name__}: {error}") from error
    yield from indexed(rows)


def indexed(rows: Any) -> Iterator[tuple[str, dict[str, Any] | RecordError]]:
    """Number rows from 0, as indexing the data set would."""
    for number, row in enumerate(rows):
        try:
            yield f"[{number}]", as_record(row)
        except RecordError as error:
            yield f"[{number}]", error


def parse_json(raw: bytes) -> Any:
    """Strict JSON; everything that Python's parser would let through or raise otherwise becomes a RecordError."""
    if b"\0" in raw:
        raise RecordError(f"holds a NUL byte at byte {raw.index(0)}")
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys, parse_constant=refuse_constant)
    except UnicodeDecodeError as error:
        raise RecordError(f"invalid UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise RecordError(f"invalid JSON: {error.msg} at {place}") from error
    except RecursionError as error:
        raise RecordError("invalid JSON: nested too deeply") from error
    except RecordError:
        raise
    except ValueError as error:  # such as an integer of more digits than Python converts
        raise RecordError(f"invalid JSON: {error}") from error


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict; Python's own parser would quietly keep the last of two equal keys."""
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RecordError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
    return record


def refuse_constant(literal: str) -> Any:
    """NaN and Infinity are Python's extension, and no other JSON reader takes them."""
    raise RecordError(f"invalid JSON: {literal} is not JSON")


def as_record(row: Any) -> dict[str, Any]:
    """The row itself, if it is an object."""
    if not isinstance(row, dict):
        raise RecordError(f"expected an object, found {json_type(row)}")
    return row


def json_type(value: Any) -> str:
    """What JSON calls the type of `value`, for error messages."""
    return JSON_TYPES.get(type(value), type(value).__name__)


@contextlib.contextmanager
def in_field(key: str) -> Iterator[None]:
    """Whatever is wrong inside is wrong with this field of the record, and its message says so."""
    try:
        yield
    except RecordError as error:
        raise type(error)(f"{key}: {error}") from error


def check_encodable(text: str) -> None:
    """JSON can spell half of a surrogate pair (\\ud800); no tokenizer takes it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError(f"holds a lone surrogate {text[error.start]!r} at character {error.start}") from error
