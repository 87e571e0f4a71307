"""Context parallelism: ranks that share each sequence's tokens compute what one rank computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megarl.parallel.context import held_by, multiple_of
from tests.distributed import model_cases
from tests.distributed.test_model_ranks import hf_logits, random_samples, recipe  # noqa: F401

FAMILIES = {
    "qwen2": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 8},
    "gpt_oss": {},
    "qwen3_moe": {},
    "deepseek_v3": {},
}
LAYOUTS = {  # TP, CP, PP, EP, ranks
    "CP2": (1, 2, 1, 1, 2),
    "CP2 TP2 SP": (2, 2, 1, 1, 4),
    "CP4": (1, 4, 1, 1, 4),
    "CP2 PP2": (1, 2, 2, 1, 4),
    "CP2 DP2": (1, 2, 1, 1, 4),
    "CP2 EP2": (1, 2, 1, 2, 2),
}


def layout(name):
    tp, cp, pp, ep, world = LAYOUTS[name]
    return world, [
        f"cluster.gpus_per_node={world}",
        f"parallel.tensor_model_parallel_size={tp}",
        f"parallel.sequence_parallel={tp > 1}",
        f"parallel.context_parallel_size={cp}",
        f"parallel.pipeline_model_parallel_size={pp}",
        f"parallel.expert_model_parallel_size={ep}",
    ]


def test_every_token_is_held_once_and_work_is_even():
    """Of sequences of 8 and 4 positions two ranks hold the outer and the inner quarters; the causal pairs of keys and
    queries are 18 + 5 for both."""
    held = [held_by([0, 8, 12], 2, rank).tolist() for rank in (0, 1)]
    assert held == [[0, 1, 6, 7, 8, 11], [2, 3, 4, 5, 9, 10]]
    starts = [0] * 8 + [8] * 4
    assert [sum(t - starts[t] + 1 for t in mine) for mine in held] == [18 + 5, 18 + 5]
    assert multiple_of(1, 4) == (1, 4) and multiple_of(2, 4) == (4, 8) and multiple_of(4, 3) == (8, 24)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(ranks, tiny_hf, recipe, family):  # noqa: F811
    path = str(tiny_hf(family, **FAMILIES[family]))
    tokens = random_samples([40])[0]["tokens"]
    expected = hf_logits(path, tokens[:-1])
    for name in ("CP2", "CP2 TP2 SP") if family in ("qwen2", "deepseek_v3") else ("CP2",):
        world, overrides = layout(name)
        for got in ranks.run(model_cases.logits, world, recipe=recipe, model=path, overrides=overrides, tokens=tokens):
            np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0, err_msg=f"{family}, {name}")


def budget(tokens):
    return [f"train.train_mb_tokens={tokens}", f"train.logprob_mb_tokens={tokens}"]


def same_step(ranks, path, recipe, names, lengths, family, divided=()):  # noqa: F811
    """``divided``: settings of the layouts that one rank does not have."""
    arguments = {"recipe": recipe, "model": path, "samples": random_samples(lengths), "mode": "seq-mean-token-mean"}
    few = budget(64)  # several microbatches
    (truth,) = ranks.run(model_cases.one_step, 1, overrides=few, **arguments)
    for name in names:
        world, overrides = layout(name)
        if family == "gpt_oss":  # its experts have biases, which tensor parallelism does not divide
            overrides = [*overrides, "parallel.expert_tensor_parallel_size=1"]
        for metrics, grads, weights in ranks.run(
            model_cases.one_step, world, overrides=[*overrides, *few, *divided], **arguments
        ):
            for key in ("loss", "value", "grad_norm", "tokens"):
                assert metrics[key] == pytest.approx(truth[0][key], rel=1e-5), (name, key)
            for tensor, expected in truth[1].items():
                largest = np.abs(expected).max()
                np.testing.assert_allclose(grads[tensor], expected, atol=1e-5 * largest, err_msg=f"{name}, {tensor}")
            assert all(np.allclose(weights[k], truth[2][k], atol=1e-6) for k in weights), name


@pytest.mark.parametrize("name", ["CP2", "CP2 TP2 SP", "CP2 PP2"])
def test_gradients_equal_those_of_one_rank(ranks, tiny_hf, recipe, name):  # noqa: F811
    path = str(tiny_hf("qwen2", tie_word_embeddings=True))
    same_step(ranks, path, recipe, [name], [30, 5, 17, 2, 40, 23, 9], "qwen2")


DYNAMIC = ["parallel.dynamic_context_parallel=true"]
MIXED = [60, 5, 17, 2, 40, 23, 9, 31]  # beside 64 positions a group: packs of one, of two and (CP4) of four ranks


@pytest.mark.parametrize(
    "name",
    ["CP2", "CP4", *(pytest.param(name, marks=pytest.mark.slow) for name in ("CP2 TP2 SP", "CP2 PP2", "CP2 DP2"))],
)
def test_ranks_may_share_as_many_as_a_sequence_needs(ranks, tiny_hf, recipe, name):  # noqa: F811
    path = str(tiny_hf("qwen2", tie_word_embeddings=True))
    same_step(ranks, path, recipe, [name], MIXED, "qwen2", [*DYNAMIC, *budget(64 // LAYOUTS[name][1])])


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen2"])
def test_ranks_may_share_as_many_in_every_family(ranks, tiny_hf, recipe, family):  # noqa: F811
    path = str(tiny_hf(family, **FAMILIES[family]))
    for name in ("CP4", "CP2 EP2") if family in ("qwen3_moe", "deepseek_v3") else ("CP4",):
        same_step(ranks, path, recipe, [name], MIXED, family, [*DYNAMIC, *budget(64 // LAYOUTS[name][1])])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_every_family(ranks, tiny_hf, recipe, family):  # noqa: F811
    names = [name for name in LAYOUTS if "EP" not in name or family in ("qwen3_moe", "deepseek_v3", "gpt_oss")]
    same_step(ranks, str(tiny_hf(family, **FAMILIES[family])), recipe, names, [30, 5, 17, 2, 40, 23, 9], family)


def test_logps_of_each_response(ranks, tiny_hf, recipe):  # noqa: F811
    path = str(tiny_hf("qwen2", tie_word_embeddings=True))
    arguments = {"recipe": recipe, "model": path, "samples": random_samples([30, 5, 17, 2, 40]), "temperature": 0.7}
    (expected,) = ranks.run(model_cases.logps, 1, overrides=[], **arguments)
    world, overrides = layout("CP2")
    for more in ([], [*DYNAMIC, *budget(20)]):
        for rank in ranks.run(model_cases.logps, world, overrides=[*overrides, *more], **arguments):
            for got, alone in zip(rank, expected, strict=True):
                torch.testing.assert_close(torch.from_numpy(got), torch.from_numpy(alone), atol=2e-6, rtol=0)
