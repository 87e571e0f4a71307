"""Routers in training: auxiliary losses by hand and on every layout, frozen routers, both dispatchers, and experts that
a rollout has chosen."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.conftest import TINY, TINY_OF
from tests.distributed import routing_cases
from tests.distributed.test_model_ranks import random_samples
from tests.distributed.test_model_ranks import recipe as recipe
from tests.distributed.test_moe_ranks import layout

LENGTHS = [30, 5, 17, 2, 40, 23]
ONE_PACK = ["train.train_mb_tokens=400", "train.logprob_mb_tokens=400"]
COEFF = 0.3
AUX = [f"model.moe_aux_loss_coeff={COEFF}"]
PLAIN = ["optimizer.use_distributed_optimizer=false", "optimizer.clip_grad=0.0", "optimizer.lr=0.01"]


def over(name, *more):
    """(ranks, overrides) of a layout of `test_moe_ranks`, or with context parallelism in front."""
    cp = 2 if name.startswith("CP2") else 1
    world, overrides = layout(name.removeprefix("CP2").strip() or "1 rank")
    if cp == 2 and "EP2" not in name:
        world *= 2
    sizes = [f"parallel.context_parallel_size={cp}", f"cluster.gpus_per_node={world}"]
    return world, [*overrides, *sizes, *PLAIN, *ONE_PACK, *more]


def close(got, expected, note=""):
    """Within 1e-5 of the largest element, of all experts of a layer where a tensor is an expert's."""
    assert got.keys() == expected.keys()
    kinds = {name: name.partition(".experts.")[0] for name in expected}
    largest = {}
    for name, gradient in expected.items():
        largest[kinds[name]] = max(largest.get(kinds[name], 0.0), np.abs(gradient).max())
    for name, gradient in expected.items():
        np.testing.assert_allclose(
            got[name], gradient, rtol=0, atol=1e-5 * largest[kinds[name]], err_msg=f"{note} {name}"
        )


def test_the_auxiliary_loss_is_the_formulas(ranks, tiny_hf, recipe):
    """Two packs, whose response tokens, prompts and lengths are not in proportion."""
    arguments = {"recipe": recipe, "model": str(tiny_hf("qwen3_moe"))}
    samples = random_samples(LENGTHS)
    world, overrides = over("1 rank", *AUX, "train.train_mb_tokens=64")
    (found,) = ranks.run(routing_cases.step, world, overrides=overrides, samples=samples, **arguments)
    by_id = {sample["prompt_id"]: sample for sample in samples}
    packs = [[by_id[name] for name in pack] for pack in found["packs"]]
    assert len(packs) > 1
    by_hand = ranks.run(
        routing_cases.balanced_by_hand, 1, overrides=over("1 rank")[1], packs=packs, coeff=COEFF, **arguments
    )
    aux, gradients = by_hand[0]
    assert found["metrics"]["moe_aux_loss"] == pytest.approx(aux, rel=1e-5)
    assert aux > 1.0  # it is 1 where every expert has as many tokens as any other, and as much probability
    close(found["grads"], gradients)
    (without,) = ranks.run(
        routing_cases.step, 1, overrides=over("1 rank", "train.train_mb_tokens=64")[1], samples=samples, **arguments
    )
    gate = "model.layers.0.mlp.gate.weight"
    assert np.abs(without["grads"][gate] - gradients[gate]).max() > 0.01 * np.abs(gradients[gate]).max()
    assert "moe_aux_loss" not in without["metrics"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TP2", "TP2 EP2 ETP1", "CP2", "CP2 EP2", "PP2 EP2"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_the_auxiliary_loss_does_not_depend_on_the_layout(ranks, tiny_hf, recipe, family, name):
    """Of one pack. Replicas have one each: then they are as far apart as their packs, so that all have the same."""
    samples = random_samples(LENGTHS)
    arguments = {"recipe": recipe, "model": str(tiny_hf(family))}
    (alone,) = ranks.run(routing_cases.step, 1, overrides=over("1 rank", *AUX)[1], samples=samples, **arguments)
    world, overrides = over(name, *AUX)
    if name == "PP2 EP2":  # two replicas
        samples = [sample for sample in samples for _ in range(2)]
    for rank in ranks.run(routing_cases.step, world, overrides=overrides, samples=samples, **arguments):
        assert rank["metrics"]["moe_aux_loss"] == pytest.approx(alone["metrics"]["moe_aux_loss"], rel=1e-5)
        close(rank["grads"], alone["grads"], name)


def test_frozen_routers_stay_and_the_rest_learns_as_before(ranks, tiny_hf, recipe):
    arguments = {"recipe": recipe, "model": str(tiny_hf("qwen3_moe")), "samples": random_samples(LENGTHS)}
    (free,) = ranks.run(routing_cases.step, 1, overrides=over("1 rank")[1], **arguments)
    world, overrides = over("TP2 EP2 ETP1", "model.freeze_router=true")
    for rank in ranks.run(routing_cases.step, world, overrides=overrides, **arguments):
        assert rank["moved"] == [False] * 3 and free["moved"] == [True] * 3
        routers = {name for name in free["grads"] if name.endswith("mlp.gate.weight")}
        assert not any(rank["grads"].pop(name).any() for name in routers)
        close(rank["grads"], {name: x for name, x in free["grads"].items() if name not in routers})


@pytest.mark.parametrize("name", ["EP2", "TP2 EP2 ETP1", "TP2 EP2 ETP2", "CP2 EP2"])
def test_tokens_gathered_from_all_ranks_are_those_exchanged(ranks, tiny_hf, recipe, name):
    """Replicas have packs of different lengths, and different numbers of packs, which allgather does not take."""
    arguments = {"recipe": recipe, "model": str(tiny_hf("qwen3_moe")), "samples": random_samples(LENGTHS)}
    (alone,) = ranks.run(routing_cases.step, 1, overrides=over("1 rank")[1], **arguments)
    world, overrides = over(name, "parallel.moe_token_dispatcher_type=allgather", "train.train_mb_tokens=64")
    for rank in ranks.run(routing_cases.step, world, overrides=overrides, **arguments):
        for got, expected in zip(rank["logps"], alone["logps"], strict=True):
            np.testing.assert_allclose(got, expected, atol=5e-6)
        close(rank["grads"], alone["grads"], name)


# ---- router replay ----


class ForcedRouters:
    """Of a transformers model: its choices, or the log-probabilities of a sample whose tokens go to given experts."""

    def __init__(self, path):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.forced, self.chosen = None, []
        gates = [module for name, module in self.model.named_modules() if name.endswith(".mlp.gate")]
        for place, gate in enumerate(gates):
            gate.register_forward_hook(lambda module, args, out, place=place: self._route(place, out))

    def _route(self, place, out):
        logits, weights, experts = out
        self.chosen.append(experts)
        if self.forced is None:
            return out
        experts = self.forced[:, place]
        weights = logits.float().softmax(-1).gather(-1, experts)
        return logits, weights / weights.sum(-1, keepdim=True), experts

    @torch.no_grad()
    def choices(self, tokens):
        self.forced, self.chosen = None, []
        self.model(torch.tensor([tokens[:-1]]))
        return torch.stack(self.chosen, dim=1)

    @torch.no_grad()
    def logps(self, tokens, prompt_length, forced):
        self.forced = forced
        logps = self.model(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)
        return logps.gather(-1, torch.tensor(tokens[1:])[:, None])[prompt_length - 1 :, 0].numpy()


@pytest.fixture(scope="module")
def replayed(tiny_hf):
    """A model's path; samples with their routers' own choices; the same with others; and what transformers computes
    with these."""
    path = str(tiny_hf("qwen3_moe"))
    routers, generator = ForcedRouters(path), torch.Generator().manual_seed(3)
    own, other, expected = [], [], []
    for fields in random_samples(LENGTHS):
        tokens = fields["tokens"]
        choices = routers.choices(tokens)
        forced = torch.rand(len(tokens) - 1, choices.shape[1], 4, generator=generator).topk(2).indices
        own.append(fields | {"routed_experts": choices.to(torch.uint8).flip(-1)})  # their order means nothing
        other.append(fields | {"routed_experts": forced.to(torch.uint8)})
        expected.append(routers.logps(tokens, fields["prompt_length"], forced))
    return path, own, other, expected


def test_replaying_a_models_own_choices_changes_nothing(ranks, replayed, recipe):
    path, own, _, _ = replayed
    arguments = {"recipe": recipe, "model": path, "samples": own, "overrides": over("1 rank")[1]}
    (plain,) = ranks.run(routing_cases.step, 1, **arguments)
    (again,) = ranks.run(routing_cases.step, 1, replay=True, **arguments)
    for a, b in zip(plain["logps"], again["logps"], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    close(again["grads"], plain["grads"])


def test_other_choices_give_what_transformers_gives_with_them(ranks, replayed, recipe):
    path, _, other, expected = replayed
    arguments = {"recipe": recipe, "model": path, "overrides": over("1 rank", "train.logprob_mb_tokens=64")[1]}
    (found,) = ranks.run(routing_cases.step, 1, samples=other, replay=True, **arguments)
    (ignored,) = ranks.run(routing_cases.step, 1, samples=other, **arguments)
    for got, wanted, free in zip(found["logps"], expected, ignored["logps"], strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)
        assert np.abs(free - wanted).max() > 0.01


MEMORY = {
    "none": [],
    "full": ["model.recompute_granularity=full", "model.recompute_method=uniform", "model.recompute_num_layers=1"],
    "moe": ["model.recompute_granularity=selective", "model.recompute_modules=[moe]"],
}


@pytest.mark.parametrize(
    "name, memory",
    [
        ("TP2", "none"),
        ("CP2", "none"),
        ("PP2 EP2", "moe"),
        pytest.param("TP2 EP2 ETP1", "full", marks=pytest.mark.slow),
        pytest.param("CP2 EP2", "moe", marks=pytest.mark.slow),
        pytest.param("PP2 EP2", "full", marks=pytest.mark.slow),
        pytest.param("PP2 VPP2", "moe", marks=pytest.mark.slow),
    ],
)
def test_replay_does_not_depend_on_the_layout(ranks, replayed, recipe, name, memory):
    """Several packs, so that a stage has seen others before it computes one again."""
    path, _, other, expected = replayed
    arguments = {"recipe": recipe, "model": path, "samples": other, "replay": True}
    (alone,) = ranks.run(routing_cases.step, 1, overrides=over("1 rank")[1], **arguments)
    if name == "PP2 VPP2":
        stages = ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"]
        world, overrides = 2, [*over("1 rank")[1], *stages, "cluster.gpus_per_node=2"]
    else:
        world, overrides = over(name)
    overrides = [*overrides, *MEMORY[memory], "train.train_mb_tokens=64", "train.logprob_mb_tokens=64"]
    for rank in ranks.run(routing_cases.step, world, overrides=overrides, **arguments):
        for got, wanted in zip(rank["logps"], expected, strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-5)
        close(rank["grads"], alone["grads"], name)


@pytest.fixture
def moe_chat_model(tiny_chat_model, tmp_path):
    """Its tokenizer, and experts."""
    vocabulary = json.loads((tiny_chat_model / "config.json").read_text())["vocab_size"]
    sizes = TINY | TINY_OF["qwen3_moe"] | {"vocab_size": vocabulary, "eos_token_id": 1, "num_hidden_layers": 2}
    torch.manual_seed(0)
    path = tmp_path / "model"
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)).float().save_pretrained(path)
    for file in tiny_chat_model.glob("*token*"):
        shutil.copy(file, path)
    return path


ROLLOUT = """
cluster: {{gpus_per_node: 2, device: cpu}}
run: {{root: {root}}}
model: {{path: {model}, dtype: fp32}}
parallel: {{expert_model_parallel_size: 2}}
train: {{train_global_batch_size: 16}}
data: {{path: {root}/train.jsonl, apply_chat_template: false, max_prompt_length: 8}}
rollout: {{num_prompts_per_step: 4, num_generations_per_prompt: 4, max_response_length: 6, kv_cache_gb: 0.02}}
reward: {{workers: 1, functions: [{{name: "tests.fixtures.digits:even"}}]}}
"""


@pytest.mark.slow
def test_experts_of_a_rollout_reach_the_policy(ranks, moe_chat_model, tmp_path):
    """From vLLM's routers to the replica that trains on the sample."""
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(2) for b in range(2)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(ROLLOUT.format(root=tmp_path, model=moe_chat_model))
    routers = ForcedRouters(moe_chat_model)
    found = ranks.run(routing_cases.sampled, 2, recipe=str(recipe), overrides=["rollout.router_replay=true"])
    assert sum(map(len, found)) == 16
    for sample in (sample for rank in found for sample in rank):
        assert torch.equal(sample["experts"].long().sort(-1).values, routers.choices(sample["tokens"]).sort(-1).values)
        np.testing.assert_allclose(sample["replayed"], sample["vllm"], atol=1e-5)
        np.testing.assert_allclose(sample["replayed"], sample["free"], atol=1e-5)
