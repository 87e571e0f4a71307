"""Search by words: Okapi BM25 (Robertson and Zaragoza, "The Probabilistic Relevance Framework", 2009) over an inverted
index in memory.

A corpus is a JSONL file of {"text": ..., "title": ... (optional)}. A word is a run of letters and digits, in lower
case. A query costs the postings of its words: on a million documents, milliseconds.
"""

from __future__ import annotations

import heapq
import json
import math
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

K1, B = 1.5, 0.75
WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Document:
    """Where it comes from, and what it says: its title first."""

    id: str
    text: str


class Index:
    """Documents, and in which of them a word is how often."""

    def __init__(self, documents: Iterable[Document]) -> None:
        self.documents = list(documents)
        if not self.documents:
            raise ValueError("a search needs at least one document")
        self._postings: dict[str, tuple[array, array]] = defaultdict(lambda: (array("L"), array("L")))
        lengths = []
        for at, document in enumerate(self.documents):
            words = Counter(words_of(document.text))
            lengths.append(words.total())
            for word, count in words.items():
                where, often = self._postings[word]
                where.append(at)
                often.append(count)
        mean = max(sum(lengths) / len(lengths), 1)
        self._norms = [K1 * (1 - B + B * length / mean) for length in lengths]

    @staticmethod
    def read(path: str) -> Index:
        """The index of a JSONL file. Raises ValueError with file:line and the reason for a line that is no document."""
        return Index(read_documents(Path(path)))

    def best(self, query: str, count: int) -> list[Document]:
        """The `count` best documents that have a word of the query, best first; those of equal score in file order."""
        scores: dict[int, float] = defaultdict(float)
        for word in dict.fromkeys(words_of(query)):
            if word not in self._postings:
                continue
            where, often = self._postings[word]
            rarity = math.log(1 + (len(self.documents) - len(where) + 0.5) / (len(where) + 0.5))
            for at, count_here in zip(where, often, strict=True):
                scores[at] += rarity * count_here * (K1 + 1) / (count_here + self._norms[at])
        top = heapq.nsmallest(count, scores, key=lambda at: (-scores[at], at))
        return [self.documents[at] for at in top]


def words_of(text: str) -> list[str]:
    return WORD.findall(text.lower())


def read_documents(path: Path) -> Iterator[Document]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record: Any = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: not JSON: {error}") from error
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise ValueError(f"{path}:{number}: a document is an object with a text, found {line.strip()[:80]!r}")
            title = record.get("title")
            yield Document(f"{path.name}:{number}", f"{title}: {record['text']}" if title else record["text"])
