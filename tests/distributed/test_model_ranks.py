"""The gates of model and engine, on real ranks: equal to transformers, and equal to one rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megarl.model.family import read_spec
from megarl.weights.shard import local_shape
from tests.distributed import model_cases, moe_cases
from tests.marks import by_default

TOLERANCE = 5e-6  # of logits, whose standard deviation is about 0.6
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "seed_oss": {"head_dim": 32},
}
ROPE = {"rope_theta": 1e4, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LAYOUTS = {
    "1 rank": (1, 1, 1, 1),
    "TP2": (2, 2, 1, 0),
    "TP2 SP": (2, 2, 1, 1),
    "TP4 SP": (4, 4, 1, 1),  # more ranks than the two KV heads
    "PP2": (2, 1, 2, 0),
    "TP2 SP PP2": (4, 2, 2, 1),
    "DP2": (2, 1, 1, 0),
    "DP2 PP2": (4, 1, 2, 0),
    "DP2 TP2 SP": (4, 2, 1, 1),
}
VARIANTS = {
    "uneven PP2": (
        "PP2",
        ["parallel.num_layers_in_first_pipeline_stage=1", "parallel.num_layers_in_last_pipeline_stage=3"],
    ),
    "full recomputation": (
        "TP2 SP",
        ["model.recompute_granularity=full", "model.recompute_method=uniform", "model.recompute_num_layers=1"],
    ),
    "selective recomputation": (
        "1 rank",
        ["model.recompute_granularity=selective", "model.recompute_modules=[core_attn]"],
    ),
    "overlapped reduction": ("DP2", ["optimizer.overlap_grad_reduce=true", "optimizer.use_distributed_optimizer=true"]),
}


def layout(name: str) -> tuple[int, list[str]]:
    world, tp, pp, sp = LAYOUTS[name]
    return world, [
        f"cluster.gpus_per_node={world}",
        f"parallel.tensor_model_parallel_size={tp}",
        f"parallel.pipeline_model_parallel_size={pp}",
        f"parallel.sequence_parallel={bool(sp and tp > 1)}",
    ]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "data.jsonl").write_text("")
    path = folder / "recipe.yaml"
    path.write_text(
        "algorithm: grpo\n"
        "cluster: {device: cpu}\n"
        "model: {dtype: fp32}\n"
        f"data: {{path: {folder / 'data.jsonl'}, max_prompt_length: 8}}\n"
        "rollout: {max_response_length: 32, num_prompts_per_step: 1, num_generations_per_prompt: 4}\n"
        "train: {train_global_batch_size: 4}\n"
        "loss: {entropy_coef: 0.1}\n"  # so that the entropy has a gradient
        # The update must not amplify noise: Adam divides by sqrt(v), which eps 1 keeps away from 0.
        "optimizer: {lr: 0.1, clip_grad: 0.0, adam_eps: 1.0, use_distributed_optimizer: false}\n"
    )
    return str(path)


def random_samples(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randint(0, 131, (n,), generator=generator).tolist() for n in lengths]
    return [
        {"prompt_id": f"p{i}", "index": 0, "tokens": tokens, "prompt_length": 1 + i % 3}
        for i, tokens in enumerate(draw)
    ]


def hf_logits(path, tokens):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


@pytest.mark.parametrize("family", by_default("llama", "qwen3", of=FAMILIES))
def test_logits_equal_transformers(ranks, tiny_hf, recipe, family):
    path = str(tiny_hf(family, **FAMILIES[family]))
    tokens = random_samples([40])[0]["tokens"]
    expected = hf_logits(path, tokens[:-1])
    for name in ("1 rank", "TP2", "TP4 SP", "PP2", "TP2 SP PP2"):
        world, overrides = layout(name)
        for rank, got in enumerate(
            ranks.run(model_cases.logits, world, recipe=recipe, model=path, overrides=overrides, tokens=tokens)
        ):
            np.testing.assert_allclose(got, expected, atol=TOLERANCE, rtol=0, err_msg=f"{family}, {name}, rank {rank}")


@pytest.mark.parametrize(
    "family, changes",
    [
        ("llama", {"tie_word_embeddings": True, "vocab_size": 129}),
        ("llama", {"rope_parameters": ROPE | {"original_max_position_embeddings": 16}}),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}}),
        ("qwen2", {"tie_word_embeddings": False, "num_key_value_heads": 1}),
        ("qwen3", {"head_dim": 32, "tie_word_embeddings": True, "vocab_size": 7}),  # whole ranks of padding
    ],
)
def test_logits_equal_transformers_on_odd_shapes(ranks, tiny_hf, recipe, family, changes):
    path = str(tiny_hf(family, **changes))
    tokens = [t % changes.get("vocab_size", 131) for t in random_samples([40])[0]["tokens"]]
    expected = hf_logits(path, tokens[:-1])
    for name in ("TP2 SP", "TP2 SP PP2"):
        world, overrides = layout(name)
        got = ranks.run(model_cases.logits, world, recipe=recipe, model=path, overrides=overrides, tokens=tokens)
        np.testing.assert_allclose(got[0], expected, atol=TOLERANCE, rtol=0, err_msg=name)


def check_export(folder, original, max_file_bytes):
    """Several files, none too large, that hold the original bit for bit, and a manifest that says so."""
    from safetensors.torch import load_file

    from megarl.convert.sources import open_source
    from megarl.convert.verify import check_manifest

    written = {}
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(x.nbytes for x in tensors.values()) <= max_file_bytes, file
        assert not written.keys() & tensors.keys()
        written |= tensors
    assert len(files) > 2 and written.keys() == original.keys()
    assert all(torch.equal(written[key].view(torch.int32), original[key].view(torch.int32)) for key in original)
    source = open_source(folder)
    assert source.manifest.tensors.keys() == original.keys() and check_manifest(source) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_rules_are_the_models_parameters(ranks, tiny_hf, recipe, family):
    """Names and shapes of every parameter and persistent buffer that megatron built."""
    path = tiny_hf(family, **FAMILIES[family])
    rules = {tensor.name: tensor for tensor in read_spec(path).tensors()}
    for name in ("1 rank", "TP2", "PP2"):
        world, overrides = layout(name)
        built = ranks.run(moe_cases.parameters, world, recipe=recipe, model=str(path), overrides=overrides)
        assert set().union(*built) == rules.keys()
        for parameter, (shape, _) in (item for rank in built for item in rank.items()):
            assert shape == local_shape(rules[parameter], LAYOUTS[name][1]), parameter


def test_nothing_is_left_at_random_initialisation(ranks, tiny_hf, recipe):
    """A parameter and a persistent buffer without a rule are errors; what no checkpoint keeps is not."""
    arguments = {"recipe": recipe, "model": str(tiny_hf("llama")), "overrides": layout("1 rank")[1]}
    (said,) = ranks.run(model_cases.stray, 1, **arguments)
    assert said.splitlines() == [
        "the model is not one of family llama:",
        "  no rule fills decoder.layers.1.mlp.gate (3, 2)",
        "  no rule fills buffer decoder.scale (5,)",
    ]


def test_parameters_that_are_kept_rounded_are_filled_whole(ranks, tiny_hf, recipe):
    """Their blocks come from several tensors; what they were rounded from makes the optimizer's weights, where they
    still have it."""
    arguments = {"recipe": recipe, "model": str(tiny_hf("llama")), "overrides": layout("1 rank")[1]}
    (found,) = ranks.run(model_cases.fills_rounded, 1, **arguments)
    assert found == {"qkv": [True, True], "gate and up": [True]}


@pytest.mark.parametrize("family", by_default("llama", "qwen2", of=FAMILIES))
def test_weights_come_back_bit_for_bit(ranks, tiny_hf, recipe, tmp_path, family):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    path = tiny_hf(family, **FAMILIES[family])
    original = load_file(path / "model.safetensors")
    for name in ("TP2", "TP4 SP", "PP2", "TP2 SP PP2"):
        world, overrides = layout(name)
        out = tmp_path / name
        arguments = {"recipe": recipe, "model": str(path), "overrides": overrides, "save_to": str(out)}
        arguments["max_file_bytes"] = 60_000
        for streamed in ranks.run(model_cases.streamed, world, bucket_bytes=20_000, **arguments):
            assert streamed.keys() == original.keys()
            assert all(np.array_equal(streamed[key], original[key].numpy()) for key in original), name
        check_export(out, original, 60_000)
        written = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()
        assert all(torch.equal(written[key], original[key]) for key in original)


def test_a_rank_reads_its_own_bytes_only(ranks, tiny_hf, recipe):
    path = str(tiny_hf("llama", vocab_size=128))  # no vocabulary padding
    world, overrides = layout("TP4 SP")
    for read, held in ranks.run(model_cases.bytes_read, world, recipe=recipe, model=path, overrides=overrides):
        assert read == held


@pytest.mark.parametrize("temperature", [pytest.param(1.0, marks=pytest.mark.slow), 0.7])
def test_packed_logps_equal_one_by_one(ranks, tiny_hf, recipe, temperature):
    path = str(tiny_hf("qwen2", tie_word_embeddings=True))
    samples = random_samples([30, 5, 17, 2, 40, 23, 9])
    expected = []
    for sample in samples:
        tokens, start = sample["tokens"], sample["prompt_length"]
        logps = torch.log_softmax(torch.from_numpy(hf_logits(path, tokens[:-1])) / temperature, -1)
        expected.append(logps[torch.arange(len(tokens) - 1), tokens[1:]][start - 1 :].numpy())
    for name in ("1 rank", "TP2 SP", "PP2"):
        for budget in (64, 200):
            world, overrides = layout(name)
            overrides = [*overrides, f"train.logprob_mb_tokens={budget}", "model.logprob_chunk_size=16"]
            arguments = {"recipe": recipe, "model": path, "overrides": overrides, "samples": samples}
            for got in ranks.run(model_cases.logps, world, temperature=temperature, **arguments):
                for a, b in zip(got, expected, strict=True):
                    np.testing.assert_allclose(a, b, atol=1e-5, rtol=0, err_msg=f"{name}, {budget}")


SOME = ("DP2", "DP2 PP2", "DP2 TP2 SP")


@pytest.mark.parametrize(
    "mode, layouts",
    [
        ("token-mean", LAYOUTS),
        pytest.param("seq-mean-token-mean", SOME, marks=pytest.mark.slow),
        pytest.param("seq-mean-token-sum", SOME, marks=pytest.mark.slow),
        pytest.param("seq-mean-token-sum-norm", SOME, marks=pytest.mark.slow),
    ],
)
def test_gradients_do_not_depend_on_the_layout(ranks, tiny_hf, recipe, mode, layouts):
    """Loss, gradient norm, every gradient and every updated weight, against one rank with everything in one
    microbatch."""
    path = str(tiny_hf("qwen2", tie_word_embeddings=True))
    arguments = {
        "recipe": recipe,
        "model": path,
        "samples": random_samples([30, 5, 17, 2, 40, 23, 9, 33]),
        "mode": mode,
    }
    world, overrides = layout("1 rank")
    alone = [*overrides, "train.train_mb_tokens=400"]
    truth, gradients, weights = ranks.run(model_cases.one_step, 1, overrides=alone, **arguments)[0]
    for name in layouts:
        world, overrides = layout(name)
        for budget, sharded in ((64, False), (100, True)):
            changed = [*overrides, f"train.train_mb_tokens={budget}", f"optimizer.use_distributed_optimizer={sharded}"]
            for metrics, grads, after in ranks.run(model_cases.one_step, world, overrides=changed, **arguments):
                where = f"{name}, microbatches of {budget}"
                for key in truth:
                    np.testing.assert_allclose(
                        metrics[key], truth[key], rtol=1e-5, atol=1e-6, err_msg=f"{where}: {key}"
                    )
                for key in grads:
                    scale = np.abs(gradients[key]).max()
                    np.testing.assert_allclose(
                        grads[key], gradients[key], rtol=0, atol=1e-5 * scale, err_msg=f"{where}: {key}"
                    )
                for key in weights:
                    np.testing.assert_allclose(after[key], weights[key], rtol=0, atol=1e-6, err_msg=f"{where}: {key}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_switches_that_save_time_or_memory_change_no_number(ranks, tiny_hf, recipe, variant):
    path = str(tiny_hf("qwen2", tie_word_embeddings=True))
    arguments = {"recipe": recipe, "model": path, "samples": random_samples([30, 5, 17, 23]), "mode": "token-mean"}
    truth, _, weights = ranks.run(model_cases.one_step, 1, overrides=layout("1 rank")[1], **arguments)[0]
    name, changes = VARIANTS[variant]
    world, overrides = layout(name)
    for metrics, _, after in ranks.run(model_cases.one_step, world, overrides=[*overrides, *changes], **arguments):
        assert metrics == pytest.approx(truth, rel=1e-5)
        for key in weights:
            np.testing.assert_allclose(after[key], weights[key], rtol=0, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", ["1 rank", "TP2 SP", "PP2"])
def test_bf16_rounds_and_does_nothing_else(ranks, tiny_hf, recipe, name):
    """Log-probabilities of a bf16 model are those of the fp32 model, to what 8 bits of mantissa leave of them."""
    path = str(tiny_hf("qwen2", tie_word_embeddings=True, initializer_range=0.02))
    samples = random_samples([30, 17])
    arguments = {"recipe": recipe, "model": path, "samples": samples, "temperature": 1.0}
    exact = np.concatenate(ranks.run(model_cases.logps, 1, overrides=layout("1 rank")[1], **arguments)[0])
    world, overrides = layout(name)
    rounded = np.concatenate(
        ranks.run(model_cases.logps, world, overrides=[*overrides, "model.dtype=bf16"], **arguments)[0]
    )
    error = np.abs(rounded - exact)
    assert 0 < error.mean() < 1e-2 and error.max() < 5e-2


def test_a_replica_without_samples_takes_part(ranks, tiny_hf, recipe):
    """An update smaller than data parallelism, with KL, importance sampling and entropy in the loss."""
    path, samples = str(tiny_hf("qwen2", tie_word_embeddings=True)), random_samples([9, 14])
    terms = ["loss.kl_loss_coef=0.1", "loss.truncated_importance_sampling_type=tis"]
    arguments = {"recipe": recipe, "model": path, "samples": samples}
    alone = ranks.run(model_cases.one_replica_has_nothing, 1, overrides=[*layout("1 rank")[1], *terms], **arguments)[0]
    for metrics in ranks.run(
        model_cases.one_replica_has_nothing, 2, overrides=[*layout("DP2")[1], *terms], **arguments
    ):
        assert metrics == pytest.approx(alone, rel=1e-5)


@pytest.fixture(scope="module")
def far_apart(tiny_hf, tmp_path_factory):
    """A model whose logits are thousands apart."""
    from transformers import AutoModelForCausalLM

    path = tmp_path_factory.mktemp("far-apart")
    model = AutoModelForCausalLM.from_pretrained(tiny_hf("llama"), dtype=torch.float32)
    model.lm_head.weight.data.mul_(1e4)
    model.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("name", ["1 rank", "TP2 SP", "DP2", "PP2"])
def test_probabilities_under_what_bf16_can_hold_are_a_finite_update(ranks, recipe, far_apart, name):
    """Log-probs of -1000 and less, which are no probability even in fp32, against a rollout and a reference of -3: one
    response of one token, one of 13, and on two replicas one that has neither. The same numbers on all ranks, finite
    weights, and the one measure that multiplies probabilities says that they are infinitely far apart."""
    world, overrides = layout(name)
    terms = ["loss.kl_loss_coef=0.1", "loss.truncated_importance_sampling_type=tis", "model.dtype=bf16"]
    arguments = {"recipe": recipe, "model": far_apart, "samples": random_samples([2, 15])}
    outcomes = ranks.run(model_cases.one_replica_underflows, world, overrides=[*overrides, *terms], **arguments)
    for metrics, lowest, finite in outcomes:
        assert finite and lowest < -1000
        assert metrics == outcomes[0][0]
        assert [n for n, value in metrics.items() if not np.isfinite(value)] == ["token_mult_prob_error"], metrics
    assert outcomes[0][0]["grad_norm"] > 0


def test_poison_on_one_replica_stops_all_before_the_optimizer(ranks, tiny_hf, recipe):
    path = str(tiny_hf("qwen2", tie_word_embeddings=True))
    arguments = {"recipe": recipe, "model": path, "overrides": layout("DP2")[1], "samples": random_samples([9, 14])}
    for outcome in ranks.run(model_cases.poisoned_step, 2, **arguments):
        assert "loss nan" in outcome["said"] and "prompt p0, sample 0" in outcome["said"] and outcome["kept"]


def test_learning_rate_of_every_update(ranks, tiny_hf, recipe):
    """10 updates, 2 of them warm-up: lr/2, lr, then a straight line that would reach 0 at update 11."""
    path = str(tiny_hf("llama"))
    schedule = ["optimizer.lr_warmup_iters=2", "optimizer.lr_decay_style=linear"]
    arguments = {"recipe": recipe, "model": path, "samples": random_samples([5])}
    rates = ranks.run(model_cases.learning_rates, 1, overrides=[*layout("1 rank")[1], *schedule], **arguments)[0]
    assert rates == pytest.approx([0.05, 0.1, *(0.1 * (11 - k) / 9 for k in range(3, 11))])


def test_samples_reach_the_rank_they_are_sent_to(ranks, tiny_hf, recipe):
    arguments = {"recipe": recipe, "model": str(tiny_hf("llama")), "overrides": ["cluster.gpus_per_node=3"]}
    for rank, arrived in enumerate(ranks.run(model_cases.exchanged, 3, **arguments)):
        rows = [row for row in range(5) if row % 3 == rank]
        expected = [
            (f"from {sender}", row, [100 * sender + row] * (row + 2), [-float(row)] * (row + 1))
            for sender in (0, 2)
            for row in rows
        ]
        assert arrived == expected


@pytest.mark.parametrize("name", ["1 rank", "TP2 SP", "PP2"])
def test_holding_the_reference_leaves_no_trace(ranks, tiny_hf, recipe, name):
    world, overrides = layout(name)
    path = str(tiny_hf("qwen2", tie_word_embeddings=True))
    arguments = {"recipe": recipe, "model": path, "overrides": overrides, "samples": random_samples([12, 7])}
    for outcome in ranks.run(model_cases.reference_swap, world, **arguments):
        assert outcome == {"reference_is_the_start": True, "policy_moved": True, "training_undisturbed": True}
