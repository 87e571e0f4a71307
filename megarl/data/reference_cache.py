"""A reference model's log-probabilities of a data set, in a file.

Contract: the first line is a `Stamp`, which says what the numbers are of: the model's weights, the number format that
it computed in, and the tokens of every sample. `read` refuses a file with another one. Each further line is one
response's log-probabilities added up: {"id", "index", "logps"}. `write` puts the file in place whole, or not at all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megarl.data.reading import DataError, RecordError, read_jsonl
from megarl.data.records import Sample

Key = tuple[str, int]  # prompt id, index

_PLACES = 64  # of a file of weights, at which it is read for its hash
_BYTES = 4096  # at each of them


@dataclass(frozen=True)
class Stamp:
    """What a file's numbers are of."""

    model: str  # hash of config.json, and of parts of every file of weights
    dtype: str
    data: str  # hash of every sample's id and tokens, in order

    @staticmethod
    def of(model: str | Path, dtype: str, samples: Iterable[Sample]) -> Stamp:
        """Args: model: a Hugging Face directory."""
        data = hashlib.sha256()
        for sample in samples:
            data.update(json.dumps([sample.prompt_id, sample.index, sample.prompt_length, sample.tokens]).encode())
        return Stamp(_model_hash(Path(model)), dtype, data.hexdigest())


def _model_hash(folder: Path) -> str:
    """Other weights of the same shapes differ at some of the places, without reading all of them."""
    found = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        found.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for k in range(_PLACES):
                file.seek(max(size - _BYTES, 0) * k // (_PLACES - 1))
                found.update(file.read(_BYTES))
    return found.hexdigest()


def write(path: Path, stamp: Stamp, sums: Mapping[Key, float]) -> None:
    """Write a file that `read` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"id": key[0], "index": key[1], "logps": total} for key, total in sums.items()]
    new = path.with_name(path.name + ".tmp")
    new.write_text("".join(json.dumps(row) + "\n" for row in [dataclasses.asdict(stamp), *rows]), encoding="utf-8")
    new.rename(path)


def read(path: Path, stamp: Stamp) -> dict[Key, float]:
    """The numbers of a file. Raises DataError if they are not of what ``stamp`` says, or not readable."""
    rows = []
    for where, row in read_jsonl(path):
        if isinstance(row, RecordError):
            raise DataError(f"{path}{where}: {row}")
        rows.append(row)
    expected = dataclasses.asdict(stamp)
    first = rows[0] if rows else {}
    if other := [name for name, value in expected.items() if first.get(name) != value]:
        raise DataError(
            f"preference.ref_log_probs_path = {path} is of another {' and '.join(other)} than this run's: "
            "delete it, or name another file"
        )
    try:
        return {(row["id"], row["index"]): float(row["logps"]) for row in rows[1:]}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: a line without id, index or logps ({error}): delete the file") from error
