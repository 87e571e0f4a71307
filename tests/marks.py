"""Which parameters of a test the default selection has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def by_default(*kept: str, of: Iterable[str]) -> list[Any]:
    """All names ``of`` a test, of which those not ``kept`` are slow: they differ from these in less than they share."""
    names = list(of)
    assert set(kept) <= set(names), f"{sorted(set(kept) - set(names))}: not among {names}"
    return [name if name in kept else pytest.param(name, marks=pytest.mark.slow) for name in names]
