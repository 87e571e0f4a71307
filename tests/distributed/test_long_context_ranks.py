"""Long sequences: a step at CP 4 is that of one rank, and takes about a quarter of its memory on each."""

from __future__ import annotations

import numpy as np
import pytest

from tests.distributed import long_cases

RECIPE = """
algorithm: sft
cluster: {{device: cpu}}
run: {{root: {root}, deadline_s: 3000}}
model: {{path: {root}, dtype: fp32}}
data: {{path: {root}/data.jsonl, max_prompt_length: 16}}
train: {{train_global_batch_size: 4, train_mb_tokens: {length}, logprob_mb_tokens: {length}}}
rollout: {{max_response_length: 16}}
optimizer: {{lr: 0.0, use_distributed_optimizer: false}}
"""
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 64,
}


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("length", [32 * 1024 + 1, pytest.param(128 * 1024 + 1)])
def test_a_long_sequence_at_cp4(ranks, tiny_hf, tmp_path, monkeypatch, length):
    monkeypatch.setattr("tests.distributed.ranks.CASE_TIMEOUT_S", 2500)
    (tmp_path / "data.jsonl").touch()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(root=tmp_path, length=length))
    model = str(tiny_hf("qwen3", **SIZES, max_position_embeddings=length))
    arguments = {"recipe": str(recipe), "model": model, "length": length}
    (alone,) = ranks.run(long_cases.one_step, 1, overrides=[], **arguments)
    cp4 = ["cluster.gpus_per_node=4", "parallel.context_parallel_size=4"]
    shared = ranks.run(long_cases.one_step, 4, overrides=cp4, **arguments)
    largest, kept = (max(rank[what] for rank in shared) for what in ("extra", "kept"))
    print(f"{length - 1} tokens: peak {alone['extra'] >> 20} MiB on one rank, at most {largest >> 20} on each of four;")
    print(f"kept for backward {alone['kept'] >> 20} MiB and {kept >> 20}, {kept / alone['kept']:.3f} of it")
    for rank in shared:
        assert rank["metrics"]["loss"] == pytest.approx(alone["metrics"]["loss"], rel=1e-5)
        for name, expected in alone["gradients"].items():
            np.testing.assert_allclose(
                rank["gradients"][name], expected, atol=1e-5 * np.abs(expected).max(), err_msg=name
            )
    assert largest < alone["extra"] / 2
    # A quarter of everything, and keys and values whole: 2 x 16 of some 1,000 numbers a token and layer.
    assert alone["kept"] / 4 <= kept <= alone["kept"] * (1 / 4 + 0.05)
