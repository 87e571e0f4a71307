"""Context parallelism on GPUs, by Transformer Engine's attention where it is installed, else by megarl's: a step is one
GPU's. Needs two GPUs, and four for the second layout."""

from __future__ import annotations

import numpy as np
import pytest

from tests.distributed import model_cases
from tests.distributed.test_model_ranks import random_samples, recipe

__all__ = ["recipe"]  # the fixture

LAYOUTS = {
    "CP2": (2, ["parallel.context_parallel_size=2"]),
    "CP2 TP2 SP": (
        4,
        [
            "parallel.context_parallel_size=2",
            "parallel.tensor_model_parallel_size=2",
            "parallel.sequence_parallel=true",
        ],
    ),
}


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-4), ("bf16", 0.05)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_at_cp2_is_one_gpus(ranks, tiny_hf, recipe, name, dtype, tolerance):
    import torch

    world, overrides = LAYOUTS[name]
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs")
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}  # heads of 32
    here = ["cluster.device=cuda", f"model.dtype={dtype}"]
    arguments = {"recipe": recipe, "model": str(tiny_hf("llama", **sizes)), "mode": "token-mean"}
    arguments["samples"] = random_samples([120, 33, 250, 64, 9])
    truth, gradients, _ = ranks.run(model_cases.one_step, 1, overrides=here, **arguments)[0]
    shared = [*here, f"cluster.gpus_per_node={world}", *overrides]
    for metrics, grads, _ in ranks.run(model_cases.one_step, world, overrides=shared, **arguments):
        assert metrics["loss"] == pytest.approx(truth["loss"], rel=tolerance)
        assert metrics["grad_norm"] == pytest.approx(truth["grad_norm"], rel=tolerance)
        for key, expected in gradients.items():
            np.testing.assert_allclose(grads[key], expected, atol=tolerance * np.abs(expected).max(), err_msg=key)
