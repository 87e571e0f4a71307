"""Checks of memory levers, and of how long a sequence may be where context parallelism shares it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megarl.config import load
from megarl.config.machine import check_windows
from megarl.config.sizes import longest_in_microbatch
from megarl.model.family import read_spec
from tests.test_config import no_launcher, overrides, problems, recipe

__all__ = ["no_launcher", "recipe"]  # fixtures

SELECTIVE = {"model.recompute_granularity": "selective"}
PRECISION = {
    "optimizer.use_precision_aware_optimizer": True,
    "checkpoint.save_contents": "[hf]",
    "checkpoint.resume_mode": "disable",
}
CP, DYNAMIC_CP = "parallel.context_parallel_size", "parallel.dynamic_context_parallel"
TP, GPUS = "parallel.tensor_model_parallel_size", "cluster.gpus_per_node"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (SELECTIVE | {"model.recompute_modules": "[moe, shared_experts]"}, "['shared_experts'] included: leave them"),
        ({"optimizer.optimizer_offload_fraction": 0}, "optimizer_offload_fraction = 0.0 is outside (0, 1]"),
        ({"optimizer.optimizer_offload_fraction": 0.5}, "optimizer_offload_fraction = 0.5 would do nothing"),
        (PRECISION | {"optimizer.use_distributed_optimizer": False}, "needs optimizer.use_distributed_optimizer"),
        (PRECISION | {"model.dtype": "fp32"}, "of a bf16 model, but model.dtype = fp32"),
        (PRECISION | {"optimizer.optimizer_cpu_offload": True}, "megarl's: leave one out"),
        (PRECISION | {"checkpoint.save_contents": "[model, hf, optimizer]"}, "checkpoints cannot hold its state"),
    ],
)
def test_levers_that_do_not_fit(recipe: Callable[..., Path], settings: dict[str, Any], said: str) -> None:
    found = problems(recipe(), *overrides(settings), check_model=False)
    assert len(found) == 1, found
    assert said in found[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({DYNAMIC_CP: True}, f"{CP} = 1 is no power of two above 1"),
        ({DYNAMIC_CP: True, GPUS: 6, CP: 6}, f"{CP} = 6 is no power of two above 1"),
        (
            {DYNAMIC_CP: True, GPUS: 2, CP: 2, "parallel.moe_token_dispatcher_type": "allgather"},
            f"{DYNAMIC_CP} = true does not go with it: parallel.moe_token_dispatcher_type = allgather takes packs",
        ),
        (
            {DYNAMIC_CP: True, GPUS: 2, CP: 2, "model.moe_aux_loss_coeff": 0.01},
            f"{DYNAMIC_CP} = true does not go with it: model.moe_aux_loss_coeff > 0 counts each pack's tokens",
        ),
        (
            {
                DYNAMIC_CP: True,
                GPUS: 2,
                CP: 2,
                "model.recompute_granularity": "selective",
                "model.recompute_modules": "[mla_up_proj]",
            },
            f"{DYNAMIC_CP} = true does not go with it: model.recompute_modules mla_up_proj rotates again",
        ),
    ],
)
def test_what_does_not_go_with_ranks_that_change(
    recipe: Callable[..., Path], settings: dict[str, Any], said: str
) -> None:
    found = problems(recipe(), *overrides(settings), check_model=False)
    assert any(said in problem for problem in found), found


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("moe", "the model has no moe to compute again"),
        ("shared_experts", "the model has no shared_experts to compute again"),
        ("mla_up_proj", "the model has no mla_up_proj to compute again"),
    ],
)
def test_parts_that_a_dense_model_has_not(recipe: Callable[..., Path], part: str, said: str) -> None:
    found = problems(recipe(), *overrides(SELECTIVE | {"model.recompute_modules": f"[{part}]"}))
    assert any(said in problem for problem in found)
    load([str(recipe()), *overrides(SELECTIVE | {"model.recompute_modules": "[core_attn, mlp]"})])


def test_what_only_transformer_engine_can_is_refused_without_it(recipe: Callable[..., Path]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    [found] = problems(recipe(), *overrides(PRECISION))
    assert "only Transformer Engine's FusedAdam keeps moments in bf16" in found
    load([str(recipe()), *overrides(PRECISION)], check_model=False)  # for another machine


@pytest.mark.parametrize(
    ("budget", "cp", "together", "longest"),
    [
        (100, 1, 1, 100),
        (100, 1, 2, 50),
        (101, 1, 2, 50),
        (100, 2, 1, 200),
        (100, 2, 2, 100),
        (101, 2, 1, 204),  # 202, and sequences are padded to multiples of 4
        (101, 2, 2, 100),  # 204 / 2 = 102, of which 100 is a multiple of 4
        (10, 4, 2, 16),  # 40 / 2 = 20: two of 16, since one of 20 would be padded to 24
    ],
)
def test_the_longest_sequence_of_a_microbatch(
    recipe: Callable[..., Path], budget: int, cp: int, together: int, longest: int
) -> None:
    settings = {"train.train_mb_tokens": budget, "cluster.gpus_per_node": cp, CP: cp, "algorithm": "sft"}
    cfg = load([str(recipe()), *overrides(settings | {"data.max_prompt_length": 1})], check_model=False)
    found = longest_in_microbatch(cfg, together)
    assert found == longest
    each = 2 * cp if cp > 1 else 1
    room = -(-budget * cp // each) * each  # what the engine packs into
    padded = [-(-n // each) * each for n in (found, found + 1)]
    assert together * padded[0] <= room < together * padded[1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        # 2048 positions are 1024 of each rank; a pair is 4096, 2048 of each
        ({"algorithm": "sft", "train.train_mb_tokens": 512}, f"512 x {CP} 2 = 1024 is less than the shortest example"),
        ({"algorithm": "sft", "train.train_mb_tokens": 513}, ""),
        (
            {"algorithm": "preference", "train.train_mb_tokens": 1024},
            f"1024 x {CP} 2 = 2048 is less than the shortest pair with the longest prompt, each padded to a multiple "
            "of 2 x 2: 2 x (data.max_prompt_length 1024 + 1 token of response) = 2050",
        ),
        ({"algorithm": "online_dpo", "train.train_mb_tokens": 2048}, ""),
        (
            {"algorithm": "online_dpo", "train.train_mb_tokens": 2046},
            f"2046 x {CP} 2 = 4092 is less than a pair of the longest, each padded to a multiple of 2 x 2: 2 x (",
        ),
        (
            {"algorithm": "unpaired", "train.train_mb_tokens": 4096, "train.logprob_mb_tokens": 2048},
            f"logprob_mb_tokens = 2048 x {CP} 2 is less than the longest sequence that train.train_mb_tokens = 4096",
        ),
    ],
)
def test_lengths_that_a_context_parallel_group_holds(
    recipe: Callable[..., Path], settings: dict[str, Any], said: str
) -> None:
    layout = {"cluster.gpus_per_node": 2, CP: 2, "train.train_global_batch_size": 64}
    loss = {"preference.loss": "kto"} if settings["algorithm"] == "unpaired" else {}
    argv = [str(recipe()), *overrides(layout | loss | settings)]
    if not said:
        load(argv, check_model=False)
        return
    [found] = problems(*argv, check_model=False)
    assert said in found


WINDOWS = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 16}
SHARED = "2 ranks share the 1 key/value heads of a tensor-parallel rank, and 1 % 2 = 1"


@pytest.mark.parametrize(
    ("sinks", "tp", "cp", "engine", "said"),
    [
        (False, 1, 2, (2, 11), []),
        (False, 2, 1, (2, 8), []),
        (
            False,
            1,
            2,
            (2, 10),
            ["sliding windows and packed sequences over parallel.context_parallel_size = 2 ranks needs"],
        ),
        (False, 2, 2, (2, 11), [SHARED]),
        (False, 2, 2, None, []),
        (
            True,
            1,
            1,
            (2, 12),
            ["attention sinks and packed sequences needs Transformer Engine 2.13 or later, and here is"],
        ),
        (True, 2, 2, (2, 13), [SHARED]),
    ],
)
def test_windows_and_sinks_in_transformer_engines_attention(
    recipe: Callable[..., Path], sinks: bool, tp: int, cp: int, engine: tuple[int, int] | None, said: list[str]
) -> None:
    """Two key/value heads: ranks that exchange heads need one each."""
    path = recipe(num_attention_heads=4, num_key_value_heads=2, **WINDOWS)
    cfg = load([str(path), *overrides({TP: tp, CP: cp, GPUS: tp * cp})], check_model=False)
    spec = dataclasses.replace(read_spec(cfg.model.path), attention_sinks=sinks)
    found = [problem.text for problem in check_windows(cfg, spec, engine)]
    assert len(found) == len(said) and all(words in text for words, text in zip(said, found, strict=True)), found
