"""The keys and shapes that `megarl convert` reads and writes are those of megatron-core's own models."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from megarl.convert.hf2mcore import ToMegatron
from megarl.convert.torch_dist_names import homogeneous
from megarl.model.family import read_spec
from tests.convert_cases import FAMILIES, make_hf
from tests.distributed.core_keys import core_keys
from tests.distributed.ranks import RankPool

_, CORE, *_ = map(int, importlib.metadata.version("megatron-core").split(".")[:2])


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_are_megatrons(ranks: RankPool, family: str, tmp_path: Path) -> None:
    """Of local layers, numbered and, where megatron-core stacks them, stacked; ``_extra_state`` objects too."""
    source = make_hf(tmp_path / "source", family)
    spec = read_spec(source)
    for stacked in (False, True) if homogeneous(spec) else (False,):
        [(shapes, objects)] = ranks.run(core_keys, 1, model=str(source), stacked=stacked)
        job = ToMegatron(source, tmp_path / "m", flavour="local", stacked=stacked, core_version=(0, CORE))
        ours = job.names(spec)
        assert ours.shapes() == shapes
        assert sorted(ours.extra_states()) == sorted(objects)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss"])
def test_the_default_is_what_megarls_own_config_asks_for(ranks: RankPool, family: str, tmp_path: Path) -> None:
    """`moe_layer_freq` is a list there: megatron-core then numbers layers with experts whatever its metadata say."""
    source = make_hf(tmp_path / "source", family)
    [(shapes, _)] = ranks.run(core_keys, 1, model=str(source), stacked=True, list_of_kinds=True)
    job = ToMegatron(source, tmp_path / "m", flavour="local", core_version=(0, CORE))
    assert job.names(read_spec(source)).shapes() == shapes
