"""Interleaved pipelines: stages that hold several chunks of layers compute what one rank computes."""

from __future__ import annotations

import numpy as np
import pytest

from tests.distributed import model_cases
from tests.distributed.test_model_ranks import hf_logits, random_samples, recipe  # noqa: F401

PP2_VPP2 = ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"]
LAYOUTS = {
    "PP2 VPP2": (2, PP2_VPP2),
    "PP2 VPP2 TP2 SP": (4, [*PP2_VPP2, "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]),
    "PP2 VPP2 CP2": (4, [*PP2_VPP2, "parallel.context_parallel_size=2"]),
    "PP2 VPP2 DP2": (4, PP2_VPP2),
    "PP4 VPP2": (
        4,
        ["parallel.pipeline_model_parallel_size=4", "parallel.virtual_pipeline_model_parallel_size=2"],
    ),
    "PP2 VPP2 uneven": (
        2,
        [
            *PP2_VPP2,
            "parallel.num_layers_in_first_pipeline_stage=2",
            "parallel.num_layers_in_last_pipeline_stage=6",
        ],
    ),
}


def same_step(ranks, path, recipe, name):  # noqa: F811
    samples = random_samples([30, 5, 17, 2, 40, 23, 9])
    arguments = {"recipe": recipe, "model": path, "samples": samples, "mode": "token-mean"}
    few = ["train.train_mb_tokens=64", "train.logprob_mb_tokens=64"]
    (truth,) = ranks.run(model_cases.one_step, 1, overrides=few, **arguments)
    world, overrides = LAYOUTS[name]
    overrides = [*overrides, *few, f"cluster.gpus_per_node={world}"]
    for metrics, grads, weights in ranks.run(model_cases.one_step, world, overrides=overrides, **arguments):
        for key in ("loss", "value", "grad_norm", "tokens"):
            assert metrics[key] == pytest.approx(truth[0][key], rel=1e-5), key
        assert grads.keys() == truth[1].keys()
        for tensor, expected in truth[1].items():
            np.testing.assert_allclose(grads[tensor], expected, atol=1e-5 * np.abs(expected).max(), err_msg=tensor)
        assert all(np.allclose(weights[k], truth[2][k], atol=1e-6) for k in weights)


def test_logits_and_weights_of_two_chunks_a_stage(ranks, tiny_hf, recipe, tmp_path):  # noqa: F811
    from safetensors.torch import load_file

    path = tiny_hf("qwen2", tie_word_embeddings=True)
    tokens = random_samples([40])[0]["tokens"]
    world, overrides = LAYOUTS["PP2 VPP2"]
    arguments = {"recipe": recipe, "model": str(path), "overrides": [*overrides, f"cluster.gpus_per_node={world}"]}
    for got in ranks.run(model_cases.logits, world, tokens=tokens, **arguments):
        np.testing.assert_allclose(got, hf_logits(path, tokens[:-1]), atol=1e-5, rtol=0)
    original = load_file(path / "model.safetensors")
    for streamed in ranks.run(
        model_cases.streamed, world, bucket_bytes=20_000, save_to=str(tmp_path / "out"), **arguments
    ):
        assert streamed.keys() == original.keys()
        assert all(np.array_equal(streamed[key], original[key].numpy()) for key in original)


def test_the_step_of_two_chunks_a_stage(ranks, tiny_hf, recipe):  # noqa: F811
    same_step(ranks, str(tiny_hf("qwen2", tie_word_embeddings=True)), recipe, "PP2 VPP2")


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "deepseek_v3"])
def test_every_layout(ranks, tiny_hf, recipe, family, name):  # noqa: F811
    same_step(ranks, str(tiny_hf(family, num_hidden_layers=8)), recipe, name)
