"""Memory levers: none changes a number, and each frees the bytes that it says."""

from __future__ import annotations

import numpy as np
import pytest

from tests.distributed import memory_cases
from tests.distributed.test_model_ranks import random_samples, recipe

__all__ = ["recipe"]  # the fixture

LAYOUTS = {
    "1 rank": (1, []),
    "DP2": (2, ["optimizer.use_distributed_optimizer=true"]),
    "TP2 SP": (2, ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]),
}
ALL = ["offload.params=true", "offload.grads=true", "offload.optimizer=true"]


def three_steps(ranks, tiny_hf, recipe, layout, *levers, dtype="fp32"):
    world, overrides = LAYOUTS[layout]
    overrides = [*overrides, f"cluster.gpus_per_node={world}", f"model.dtype={dtype}", *levers]
    kwargs = {"recipe": recipe, "model": str(tiny_hf("qwen2")), "samples": random_samples([9, 30, 17, 24])}
    return ranks.run(memory_cases.three_steps, world, overrides=overrides, **kwargs)


@pytest.mark.parametrize("layout, dtype", [("1 rank", "bf16"), ("DP2", "fp32"), ("DP2", "bf16"), ("TP2 SP", "fp32")])
def test_three_steps_are_the_same_bits_with_everything_offloaded(ranks, tiny_hf, recipe, layout, dtype):
    """And between the verbs nothing of the model is left on the device."""
    plain = three_steps(ranks, tiny_hf, recipe, layout, dtype=dtype)
    levers = three_steps(ranks, tiny_hf, recipe, layout, *ALL, "optimizer.optimizer_cpu_offload=true", dtype=dtype)
    for a, b in zip(plain, levers, strict=True):
        for x, y in zip(a["numbers"], b["numbers"], strict=True):
            np.testing.assert_array_equal(x, y)
        for name, weight in a["weights"].items():
            np.testing.assert_array_equal(weight, b["weights"][name], err_msg=name)
        assert b["between"] == {"params": 0, "grads": 0, "optimizer": 0}
        assert a["between"] == a["during"] and min(a["during"][part] for part in ("params", "grads")) > 0
        assert {part: b["during"][part] for part in ("params", "grads")} == {
            part: a["during"][part] for part in ("params", "grads")
        }


def test_each_lever_frees_its_own_bytes(ranks, tiny_hf, recipe):
    """A bf16 model of n parameters over two replicas: 2n bytes of weights, 4n of gradients, and 4 + 4 + 4 bytes of
    state for the n / 2 that a rank updates."""
    [plain, _] = three_steps(ranks, tiny_hf, recipe, "DP2", dtype="bf16")
    whole = plain["during"]
    n = whole["params"] // 2
    assert whole["grads"] == 4 * n
    assert plain["between"]["optimizer"] == pytest.approx(6 * n, rel=0.01)
    for part in ("params", "grads", "optimizer"):
        [found, _] = three_steps(ranks, tiny_hf, recipe, "DP2", f"offload.{part}=true", dtype="bf16")
        assert found["between"] == plain["between"] | {part: 0}


def test_moments_in_host_memory(ranks, tiny_hf, recipe):
    """Of 12 bytes of state an element the 4 of the fp32 weight stay on the device; with a fraction of 0.5 also the 8
    bytes of moments of about half of them (tensors are not divided)."""
    [plain, _] = three_steps(ranks, tiny_hf, recipe, "DP2", dtype="bf16")
    offload = "optimizer.optimizer_cpu_offload=true"
    [most, _] = three_steps(ranks, tiny_hf, recipe, "DP2", offload, dtype="bf16")
    assert most["between"]["optimizer"] * 3 == plain["between"]["optimizer"]
    half = "optimizer.optimizer_offload_fraction=0.5"
    [some, _] = three_steps(ranks, tiny_hf, recipe, "DP2", offload, half, dtype="bf16")
    share = (some["between"]["optimizer"] - most["between"]["optimizer"]) / plain["between"]["optimizer"] * 3 / 2
    assert 0.35 < share <= 0.5
    for name, weight in plain["weights"].items():
        np.testing.assert_array_equal(weight, some["weights"][name], err_msg=name)


def test_what_fp8_would_round_is_the_same_on_every_layout(ranks, tiny_hf, recipe):
    """Of each of 4 layers, on all ranks, also of layers that are elsewhere."""
    kwargs = {"recipe": recipe, "model": str(tiny_hf("qwen2")), "samples": random_samples([9, 30, 17, 24])}
    [truth] = ranks.run(memory_cases.rounding, 1, overrides=[], **kwargs)
    assert set(truth) == {f"fp8/{what}/layer_{i}" for what in ("amax", "underflow") for i in range(4)}
    assert all(value > 0 for name, value in truth.items() if "amax" in name)
    stages = ["cluster.gpus_per_node=2", "parallel.pipeline_model_parallel_size=2"]
    for found in ranks.run(memory_cases.rounding, 2, overrides=stages, **kwargs):
        assert found == pytest.approx(truth, rel=1e-5)


FULL = ["model.recompute_granularity=full", "model.recompute_method=uniform", "model.recompute_num_layers=1"]


def selective(*modules):
    return ["model.recompute_granularity=selective", f"model.recompute_modules=[{','.join(modules)}]"]


@pytest.mark.parametrize(
    "family, parts",
    [("llama", ["core_attn", "mlp"]), ("mixtral", ["moe"]), ("deepseek_v3", ["core_attn", "shared_experts", "moe"])],
)
def test_recomputed_parts_keep_less_and_change_nothing(ranks, tiny_hf, recipe, family, parts):
    """Each part keeps fewer bytes for backward than none, and whole layers only their inputs: 4 bytes x 80 tokens x 64
    dimensions of each but the first, whose input is the embedding's output, and what lies behind the last."""
    kwargs = {"recipe": recipe, "model": str(tiny_hf(family)), "samples": random_samples([21] * 4)}
    [plain] = ranks.run(memory_cases.activations, 1, overrides=[], **kwargs)
    found = {}
    for name in (*parts, "full"):
        lever = FULL if name == "full" else selective(name)
        [found[name]] = ranks.run(memory_cases.activations, 1, overrides=lever, **kwargs)
        for key, weight in plain["weights"].items():
            np.testing.assert_array_equal(weight, found[name]["weights"][key], err_msg=f"{name}: {key}")
    kept = {name: sum(one["saved"]) for name, one in found.items()}
    assert all(0 < kept["full"] < kept[name] < sum(plain["saved"]) for name in parts), (kept, plain["saved"])
    layer_input = 4 * 80 * 64
    assert 4 * layer_input <= kept["full"] <= 6.5 * layer_input
