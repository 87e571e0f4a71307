"""The scalar head: what transformers' models with one label compute, and the same step on every layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.distributed import value_cases
from tests.distributed.test_model_ranks import layout

RECIPE = """
algorithm: sft
cluster: {{gpus_per_node: 1, device: cpu}}
run: {{root: {root}}}
model: {{path: {root}, dtype: fp32}}
data: {{path: {root}/data.jsonl, max_prompt_length: 16}}
train: {{train_global_batch_size: 4, train_mb_tokens: 60, logprob_mb_tokens: 60}}
rollout: {{max_response_length: 16}}
optimizer: {{use_distributed_optimizer: false}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("values")
    (folder / "data.jsonl").touch()
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(root=folder))
    return path


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A random reward model as transformers saves it."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from tests.conftest import TINY

    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**TINY, num_labels=1, pad_token_id=0)).float()
    path = tmp_path_factory.mktemp("classifier")
    model.save_pretrained(path)
    return path, model


@pytest.fixture(scope="module")
def samples():
    generator = torch.Generator().manual_seed(1)
    lengths = [(5, 9), (3, 20), (8, 1), (2, 13), (6, 6), (4, 11)]
    return [
        {
            "prompt_id": f"p{i}",
            "index": 0,
            "tokens": torch.randint(0, 131, (prompt + response,), generator=generator).tolist(),
            "prompt_length": prompt,
        }
        for i, (prompt, response) in enumerate(lengths)
    ]


def test_values_equal_transformers_and_come_back(ranks, recipe, classifier, samples, tmp_path):
    path, model = classifier
    (found,) = ranks.run(
        value_cases.one_step,
        1,
        recipe=str(recipe),
        model=str(path),
        overrides=[],
        samples=samples,
        save_to=str(tmp_path / "out"),
    )
    for sample, values in zip(samples, found["values"], strict=True):
        with torch.no_grad():
            hidden = model.model(torch.tensor([sample["tokens"]])).last_hidden_state
            expected = model.score(hidden)[0, :, 0]
        # The state before a response token is that of the token in front of it.
        np.testing.assert_allclose(values, expected[sample["prompt_length"] - 1 : -1].numpy(), atol=2e-6)
    from transformers import AutoModelForSequenceClassification

    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert again.config.num_labels == 1
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


def test_a_language_model_starts_with_values_of_0(ranks, recipe, tiny_hf, samples):
    """Then half the squared distance from 1 is 1/2, whatever the layout and the weights."""
    overrides = layout("TP2 SP")[1]
    found = ranks.run(
        value_cases.one_step, 2, recipe=str(recipe), model=str(tiny_hf("llama")), overrides=overrides, samples=samples
    )
    for rank in found:
        assert all(not values.any() for values in rank["values"])
        assert rank["metrics"]["loss"] == 0.5


@pytest.mark.parametrize("name", ["TP2", "TP2 SP", "PP2", "TP2 SP PP2", "DP2"])
def test_the_step_does_not_depend_on_the_layout(ranks, recipe, classifier, samples, name):
    arguments = {"recipe": str(recipe), "model": str(classifier[0]), "samples": samples}
    (alone,) = ranks.run(value_cases.one_step, 1, overrides=[], **arguments)
    world, overrides = layout(name)
    for rank in ranks.run(value_cases.one_step, world, overrides=overrides, **arguments):
        for a, b in zip(rank["values"], alone["values"], strict=True):
            np.testing.assert_allclose(a, b, atol=2e-6)
        assert rank["metrics"]["loss"] == pytest.approx(alone["metrics"]["loss"], rel=1e-5)
        assert rank["metrics"]["grad_norm"] == pytest.approx(alone["metrics"]["grad_norm"], rel=1e-5)
        assert rank["grads"].keys() == alone["grads"].keys()
        for tensor, gradient in alone["grads"].items():
            np.testing.assert_allclose(
                rank["grads"][tensor], gradient, atol=1e-5 * np.abs(gradient).max(), err_msg=tensor
            )
