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


@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
        ["parallel.pipeline_model_parallel_size=2"],
        ["parallel.expert_model_parallel_size=2"],
    ],
    ids=["TP2", "PP2", "EP2"],
)
def test_both_transports_bring_the_same(ranks, tiny_hf, tmp_path, layout):
    (tmp_path / "data.jsonl").touch()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(root=tmp_path, model=tiny_hf("qwen3_moe")))
    found = ranks.run(transport_cases.both_ways, 2, recipe=str(recipe), overrides=layout)
    for rank in found:
        assert rank["shared"]
        assert rank["differing"] == []
        assert rank["files"] == []  # shared memory has no name that could stay when a rank is killed
        # All parameters were raised by one, then multiplied by three: stale bytes would give other sums.
        first, raised, tripled = rank["sums"]
        assert raised == pytest.approx(first + rank["elements"], rel=1e-5)
        assert tripled == pytest.approx(3 * raised, rel=1e-5)
