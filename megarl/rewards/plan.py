"""Which rewards a sample gets, and in which calls: the one plan that both ends of a worker's pipe follow.

Contract: a function is called for one sample at a time, unless it has an option `batch_size`: that is how it says that
it takes several (services do), and how many at most. Where rewards are of domains, a sample gets those of its own
domain and those without any.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megarl.rewards import Reward

BATCH_SIZE = "batch_size"


@dataclass(frozen=True)
class Entry:
    """One of reward.functions."""

    name: str
    args: dict[str, Any]
    domains: list[str] = field(default_factory=list)  # none: all of them
    batch_size: int = 1

    def applies(self, domain: str | None) -> bool:
        return not self.domains or domain in self.domains


def options(function: Reward, args: Mapping[str, Any], *, keyword_only: bool = False) -> dict[str, Any]:
    """All options of a reward: those given, and the defaults of the others (or of those behind its `*` alone)."""
    defaults = {
        parameter.name: parameter.default
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is not parameter.empty and (parameter.kind is parameter.KEYWORD_ONLY or not keyword_only)
    }
    return defaults | args


def unit_size(entries: Sequence[Entry]) -> int:
    """So many samples go through all rewards together."""
    return max(entry.batch_size for entry in entries)


def calls_of(entries: Sequence[Entry], samples: Sequence[tuple[int, str | None]]) -> Iterator[tuple[str, list[int]]]:
    """What is called for (key, domain) of each sample, in order: a reward's name and the keys of its samples."""
    size = unit_size(entries)
    for start in range(0, len(samples), size):
        unit = samples[start : start + size]
        for entry in entries:
            keys = [key for key, domain in unit if entry.applies(domain)]
            for at in range(0, len(keys), entry.batch_size):
                yield entry.name, keys[at : at + entry.batch_size]
