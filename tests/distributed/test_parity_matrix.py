"""Every layout of the parity matrix computes what one rank computes, sequence by sequence: loss, log-probabilities (or
values), gradient norm and every gradient within 1e-5."""

from __future__ import annotations

import pytest

from tests.distributed.layouts import LAYOUTS, differences, prepare
from tests.distributed.ranks import RankPool


@pytest.fixture(scope="module")
def eight():
    """More ranks than the shared pool has."""
    pool = RankPool(8)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def truths(ranks, tmp_path_factory):
    """The folder with what one rank computes of a model, made once."""
    made = {}

    def folder(model):
        if model not in made:
            made[model] = tmp_path_factory.mktemp("parity")
            prepare(ranks, model, made[model])
        return made[model]

    return folder


def test_the_matrix_has_every_dimension():
    assert sum(map(len, LAYOUTS.values())) >= 24
    used = [layout.sizes.describe().split() for layouts in LAYOUTS.values() for layout in layouts.values()]
    assert {"TP2", "SP", "PP2", "VPP2", "CP2", "EP2", "ETP2", "DP2"} <= {word for words in used for word in words}


@pytest.mark.slow
@pytest.mark.parametrize("model, name", [(model, name) for model, layouts in LAYOUTS.items() for name in layouts])
def test_a_layout_equals_one_rank(request, ranks, truths, model, name):
    pool = ranks if LAYOUTS[model][name].world_size <= ranks.size else request.getfixturevalue("eight")
    rows = differences(pool, model, name, truths(model))
    assert len(rows) > 30
    assert {row.what: row.difference for row in rows if not row.agrees} == {}
