"""Weights that ranks of one host read from each other's memory are those that a collective brings, bit for bit."""

from __future__ import annotations

import pytest

from tests.distributed import transport_cases

RECIPE = """
cluster: {{gpus_per_node: 2, device: cpu}}
algorithm: sft
run: {{root: {root}}}
model: {{path: {model}, dtype: fp32}}
data: {{path: {root}/data.jsonl, max_prompt_length: 8}}
train: {{train_global_batch_size: 2}}
rollout: {{max_response_length: 8}}
"""


LAYOUTS = {
    "TP2": ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
    "PP2": ["parallel.pipeline_model_parallel_size=2"],
    "EP2": ["parallel.expert_model_parallel_size=2"],
}


@pytest.fixture
def recipe(tiny_hf, tmp_path):
    (tmp_path / "data.jsonl").touch()
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(root=tmp_path, model=tiny_hf("qwen3_moe")))
    return str(path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_transports_bring_the_same(ranks, recipe, layout):
    found = ranks.run(transport_cases.both_ways, 2, recipe=recipe, overrides=LAYOUTS[layout])
    for rank in found:
        assert rank["shared"]
        assert rank["differing"] == []
        assert rank["files"] == []  # shared memory has no name that could stay when a rank is killed
        # All parameters were raised by one, then multiplied by three: stale bytes would give other sums.
        first, raised, tripled = rank["sums"]
        assert raised == pytest.approx(first + rank["elements"], rel=1e-5)
        assert tripled == pytest.approx(3 * raised, rel=1e-5)


@pytest.mark.parametrize("layout, vllm_tp", [("TP2", 1), ("PP2", 2), ("EP2", 2)])
def test_sums_of_both_sides_agree_until_something_is_wrong(ranks, recipe, layout, vllm_tp):
    """A flipped bit on the way, and a wrong plan, which gives the same wrong weights every time."""
    arguments = {"recipe": recipe, "overrides": LAYOUTS[layout], "vllm_tp": vllm_tp}
    for rank, (shared, collective, plan) in enumerate(ranks.run(transport_cases.both_sides, 2, **arguments)):
        assert [shared["transport"], collective["transport"]] == ["SharedMemory", "Collective"]
        for found in (shared, collective):
            assert found["tensors"] > 50 and found["right"] == []
            assert found["objects"] == 0  # names, shapes and sizes are settled before
            assert found["found"] == ([found["flipped"]] if rank == 1 else [])
        assert plan["swapped"] and plan["found"] == plan["swapped"]
