"""The gates of families with experts, latent attention and attention sinks, on real ranks: equal to transformers, and
equal to one rank."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.torch import load_file

from megarl.model.family import read_spec
from megarl.weights.shard import columns_of, local_shape, rows_of
from tests.distributed import model_cases, moe_cases
from tests.distributed.test_model_ranks import TOLERANCE, check_export, hf_logits, random_samples
from tests.distributed.test_model_ranks import recipe as recipe
from tests.marks import by_default

YARN = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
FAMILIES = {
    "qwen3_moe": {},
    "mixtral": {},
    "deepseek_v2": {},
    "deepseek_v3": {"num_mtp_layers": 1},  # in config.json only: transformers writes no such layers
    "gpt_oss": {},
}
# V2's groups of experts are scored by their best one: so does megatron where topk / topk_group is 1.
GROUPS_BY_BEST = {
    "topk_method": "group_limited_greedy",
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 2,
}
# (ranks, TP, PP, EP, ETP)
LAYOUTS = {
    "1 rank": (1, 1, 1, 1, 1),
    "TP2": (2, 2, 1, 1, 2),
    "EP2": (2, 1, 1, 2, 1),
    "EP4": (4, 1, 1, 4, 1),
    "PP2 EP2": (4, 1, 2, 2, 1),
    "TP2 EP2 ETP1": (2, 2, 1, 2, 1),
    "TP2 EP2 ETP2": (4, 2, 1, 2, 2),
    "TP2 EP1 ETP1": (2, 2, 1, 1, 1),
    "TP1 EP1 ETP2": (2, 1, 1, 1, 2),
    "TP4": (4, 4, 1, 1, 4),  # more ranks than two KV heads
    "TP2 EP4 ETP1": (4, 2, 1, 4, 1),
    "TP4 EP2 ETP1": (4, 4, 1, 2, 1),
}


FEW = ("1 rank", "PP2 EP2", "TP2 EP2 ETP1", "TP2 EP2 ETP2", "TP1 EP1 ETP2")


def layout(name):
    world, tp, pp, ep, etp = LAYOUTS[name]
    return world, [
        f"cluster.gpus_per_node={world}",
        f"parallel.tensor_model_parallel_size={tp}",
        f"parallel.pipeline_model_parallel_size={pp}",
        f"parallel.expert_model_parallel_size={ep}",
        f"parallel.expert_tensor_parallel_size={etp}",
        f"parallel.sequence_parallel={tp > 1}",  # megatron trains experts with tensor parallelism no other way
    ]


def layouts(family, *names):
    """Those that megatron has for the family: it does not divide experts with biases."""
    return [name for name in names if family != "gpt_oss" or LAYOUTS[name][4] == 1]


@pytest.mark.parametrize("names", [FEW, pytest.param([n for n in LAYOUTS if n not in FEW], marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", by_default("qwen3_moe", "deepseek_v3", of=FAMILIES))
def test_logits_equal_transformers(ranks, tiny_hf, recipe, family, names):
    path = str(tiny_hf(family, **FAMILIES[family]))
    tokens = random_samples([40])[0]["tokens"]
    expected = hf_logits(path, tokens[:-1])
    for name in layouts(family, *names):
        world, overrides = layout(name)
        results = ranks.run(model_cases.logits, world, recipe=recipe, model=path, overrides=overrides, tokens=tokens)
        for rank, got in enumerate(results):
            np.testing.assert_allclose(got, expected, atol=TOLERANCE, rtol=0, err_msg=f"{family}, {name}, rank {rank}")


@pytest.mark.parametrize(
    "family, changes",
    [
        ("qwen3_moe", {"norm_topk_prob": False, "mlp_only_layers": [], "decoder_sparse_step": 2}),
        ("qwen3_moe", {"tie_word_embeddings": True, "num_key_value_heads": 1, "vocab_size": 129}),
        ("mixtral", {"sliding_window": 8, "num_experts_per_tok": 4}),
        ("deepseek_v2", {"q_lora_rank": 24, "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}}),
        ("deepseek_v2", GROUPS_BY_BEST),
        ("deepseek_v3", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 4.0}}),
        ("deepseek_v3", {"rope_parameters": YARN, "first_k_dense_replace": 4}),  # no experts
        ("deepseek_v3", {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 3}),
        ("gpt_oss", {"rope_parameters": YARN | {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}}),
        (
            "gpt_oss",
            {"rope_parameters": YARN | {"attention_factor": 1.2}, "sliding_window": 3, "num_key_value_heads": 4},
        ),
    ],
)
def test_logits_equal_transformers_on_odd_shapes(ranks, tiny_hf, recipe, family, changes):
    path = str(tiny_hf(family, **changes))
    tokens = [t % changes.get("vocab_size", 131) for t in random_samples([40])[0]["tokens"]]
    expected = hf_logits(path, tokens[:-1])
    moe = read_spec(path).moe
    for name in ("1 rank", "TP2 EP2 ETP1") if any(moe.layers) else ("1 rank", "TP2"):
        world, overrides = layout(name)
        got = ranks.run(model_cases.logits, world, recipe=recipe, model=path, overrides=overrides, tokens=tokens)
        np.testing.assert_allclose(got[0], expected, atol=TOLERANCE, rtol=0, err_msg=name)


def held_by_rank(tensor, place):
    """(parallel size, rank) that cut a tensor."""
    return (place["tp"], place["tp_rank"]) if tensor.expert is None else (place["etp"], place["etp_rank"])


@pytest.mark.parametrize("family", by_default("qwen3_moe", "deepseek_v3", of=FAMILIES))
def test_rules_are_the_models_parameters(ranks, tiny_hf, recipe, family):
    """Names and shapes, of every parameter and persistent buffer that megatron built."""
    path = tiny_hf(family, **FAMILIES[family])
    spec = read_spec(path).without_mtp()
    rules = {tensor.name: tensor for tensor in spec.tensors()}
    for name in layouts(family, "1 rank", "PP2 EP2", "TP2 EP2 ETP1", "TP2 EP2 ETP2"):
        world, overrides = layout(name)
        _, tp, _, _, etp = LAYOUTS[name]
        built = ranks.run(moe_cases.parameters, world, recipe=recipe, model=str(path), overrides=overrides)
        assert set().union(*built) == rules.keys()
        for parameter, (shape, _) in (item for rank in built for item in rank.items()):
            tensor = rules[parameter]
            assert shape == local_shape(tensor, tp if tensor.expert is None else etp), parameter
    bf16 = [*layout("1 rank")[1], "model.dtype=bf16"]
    (built,) = ranks.run(moe_cases.parameters, 1, recipe=recipe, model=str(path), overrides=bf16)
    for parameter, (_, dtype) in built.items():
        assert dtype == ("torch.float32" if rules[parameter].keep_fp32 else "torch.bfloat16"), parameter


def test_rules_are_the_parameters_of_multi_token_prediction(ranks, tiny_hf, recipe):
    path = tiny_hf("deepseek_v3", **FAMILIES["deepseek_v3"])
    rules = {t.name: t for t in read_spec(path).tensors() if t.name.startswith("mtp.")}
    for name in ("1 rank",):  # megatron-core's local norms of these layers refuse sequence parallelism, and so TP
        world, overrides = layout(name)
        _, tp, _, _, etp = LAYOUTS[name]
        arguments = {"recipe": recipe, "model": str(path), "overrides": overrides}
        built = ranks.run(moe_cases.multi_token_prediction, world, **arguments)
        assert set().union(*built) == rules.keys()
        for parameter, shape in (item for rank in built for item in rank.items()):
            tensor = rules[parameter]
            assert shape == local_shape(tensor, tp if tensor.expert is None else etp), parameter


@pytest.mark.parametrize(
    "family",
    by_default("qwen3_moe", of=FAMILIES),
)
def test_exports_of_several_writers_hold_the_model_bit_for_bit(ranks, tiny_hf, recipe, tmp_path, family):
    path = tiny_hf(family)
    original = load_file(path / "model.safetensors")
    for name in layouts(family, "EP2", "TP2 EP2 ETP2", "PP2 EP2"):
        world, overrides = layout(name)
        out = tmp_path / name
        arguments = {"recipe": recipe, "model": str(path), "overrides": overrides, "save_to": str(out)}
        for got in ranks.run(model_cases.streamed, world, bucket_bytes=20_000, max_file_bytes=60_000, **arguments):
            assert got.keys() == original.keys()
            assert all(np.array_equal(got[key], original[key].numpy()) for key in original), name
        check_export(out, original, 60_000)


def share(tensor, whole, place):
    """What a rank holds of a tensor that one rank has whole, less the padding of the vocabulary."""
    size, rank = held_by_rank(tensor, place)
    rows = [whole[a : min(b, tensor.shape[0])] for a, b in rows_of(tensor, size, rank)]
    columns = columns_of(tensor, size, rank)
    return np.concatenate(rows)[:, columns] if columns else np.concatenate(rows)


GRADIENT_LAYOUTS = ("EP2", "PP2 EP2", "TP2", "TP2 EP2 ETP1", "TP2 EP2 ETP2", "TP2 EP1 ETP1", "TP2 EP4 ETP1")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_do_not_depend_on_the_layout(ranks, tiny_hf, recipe, family):
    """Loss, gradient norm, every gradient and every updated weight, against one rank. Replicas have different numbers
    of microbatches to begin with."""
    path = tiny_hf(family, **FAMILIES[family])
    rules = {tensor.name: tensor for tensor in read_spec(path).without_mtp().tensors()}
    arguments = {"recipe": recipe, "model": str(path), "samples": random_samples([30, 5, 17, 2, 40, 23, 9])}
    alone = [*layout("1 rank")[1], "train.train_mb_tokens=400"]
    truth, gradients, weights, _ = ranks.run(moe_cases.one_step, 1, overrides=alone, **arguments)[0]
    for name in layouts(family, *GRADIENT_LAYOUTS):
        world, overrides = layout(name)
        for sharded in (False, True) if name in ("EP2", "TP2 EP2 ETP1") else (False,):
            changed = [*overrides, "train.train_mb_tokens=64", f"optimizer.use_distributed_optimizer={sharded}"]
            for metrics, grads, after, place in ranks.run(moe_cases.one_step, world, overrides=changed, **arguments):
                for key in truth:
                    np.testing.assert_allclose(metrics[key], truth[key], rtol=1e-5, err_msg=f"{name}: {key}")
                for key, got in grads.items():
                    expected = share(rules[key], gradients[key], place)
                    scale = np.abs(gradients[key]).max()
                    np.testing.assert_allclose(
                        got[: len(expected)], expected, rtol=0, atol=1e-5 * scale, err_msg=f"{name}: {key}"
                    )
                for key, got in after.items():
                    expected = share(rules[key], weights[key], place)
                    np.testing.assert_allclose(
                        got[: len(expected)], expected, rtol=0, atol=2e-6, err_msg=f"{name}: {key}"
                    )


def test_the_mesh_says_who_holds_a_model_together(ranks, tiny_hf, recipe):
    arguments = {"recipe": recipe, "model": str(tiny_hf("qwen3_moe", **FAMILIES["qwen3_moe"]))}
    expected = {
        "EP2": [((2, rank), (1, 0), [0, 1]) for rank in range(2)],
        "TP2 EP2 ETP2": [((2, rank // 2), (2, rank % 2), [0, 1, 2, 3]) for rank in range(4)],
        "PP2 EP2": [((2, rank % 2), (1, 0), [0, 1, 2, 3]) for rank in range(4)],
        "TP4 EP2 ETP1": [((2, rank % 2), (1, 0), [0, 1, 2, 3]) for rank in range(4)],
    }
    for name, places in expected.items():
        world, overrides = layout(name)
        got = ranks.run(moe_cases.replicas, world, overrides=overrides, **arguments)
        assert [(place["ep"], place["etp"], place["replica"]) for place in got] == places, name
