"""Learning from pairs and from labels: whole runs at full batch, the same on every layout, beginning where each loss
has to begin."""

from __future__ import annotations

import json
import math

import pytest

from megarl.losses.preference import PAIR_LOSSES, REFERENCE_FREE
from megarl.observe.metrics import read_metrics
from tests.distributed import train_cases
from tests.marks import by_default

LAYOUTS = {
    "1 rank": (1, []),
    "TP2": (2, ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]),
    "DP2": (2, []),
    "PP2": (2, ["parallel.pipeline_model_parallel_size=2"]),
    "CP2": (2, ["parallel.context_parallel_size=2"]),
}
RECIPE = """
cluster: {{device: cpu}}
run: {{root: {root}, max_num_steps: 12, max_num_epochs: 12}}
model: {{path: {model}, dtype: fp32}}
optimizer: {{lr: 1.0e-3}}
train: {{train_global_batch_size: 64, train_mb_tokens: 240, logprob_mb_tokens: 400}}
data: {{path: {data}, apply_chat_template: false, max_prompt_length: 8}}
checkpoint: {{save_at_end: false}}
"""
# More than the defaults, where a loss needs it.
MORE = {"robust": ["preference.label_smoothing=0.1"], "dpop": ["preference.dpop_lambda=2"]}
# Loss of a policy that is its own reference: delta = 0 and z0 = 0. Of rpo: p = sigmoid(gap of the scores, which is 1).
_P = 1 / (1 + math.exp(-1))
AT_THE_START = {
    "dpo": math.log(2),
    "robust": math.log(2),  # (0.9 - 0.1) / (1 - 0.2) of it
    "ipo": 25.0,  # 1 / (4 x 0.1^2)
    "hinge": 1.0,
    "dpop": math.log(2),
    "rpo_bwd_kl": _P * math.log(2 * _P) + (1 - _P) * math.log(2 * (1 - _P)),
    "rpo_fwd_kl": -0.5 * math.log(4 * _P * (1 - _P)),
    "rpo_sq": 1.0,
    "bco_pair": 2 * math.log(2),
    "kto": 0.5,
    "bco": math.log(2),
}
PAIRED = sorted(set(PAIR_LOSSES) - {"longpo"})
LONG = ["preference.loss=longpo", "data.prompt_key=long", "data.reference_prompt_key=prompt"]
# Loops and options beside the losses: recipe and settings.
OTHERS = {
    "sft": ("preference", ["algorithm=sft", "data.response_key=chosen"]),
    "reward_model": ("preference", ["algorithm=reward_model", "preference.center_rewards_coef=0.01"]),
    "reward_model, margin": ("preference", ["algorithm=reward_model", "preference.margin_from_scores=true"]),
    "longpo": ("preference", [*LONG, "preference.longpo_lambda=1"]),
    "dpo + sft": ("preference", ["preference.sft_loss_coef=0.5"]),
    "cdpo": ("preference", ["preference.label_smoothing=0.1"]),
    "dpo, precomputed": ("preference", ["preference.precompute_ref_log_probs=true"]),
    "bco, precomputed": ("unpaired", ["preference.loss=bco", "preference.precompute_ref_log_probs=true"]),
    "bco, density": ("unpaired", ["preference.loss=bco", "preference.bco_density_ratio=true"]),
}


@pytest.fixture(scope="module")
def recipes(tiny_chat_model, tmp_path_factory):
    """One for pairs, one for labelled responses of unequal numbers."""
    folder = tmp_path_factory.mktemp("offline")
    sums = [(f"{a}+{b}=", str(a + b), str(a + b + 1) + "0" * (b % 3)) for a in range(8) for b in range(8)]
    pairs = [
        {"prompt": p, "long": "1+" + p, "chosen": y, "rejected": n, "chosen_score": 2, "rejected_score": 1}
        for p, y, n in sums
    ]
    labels = [{"prompt": p, "response": y if k % 3 else n, "label": bool(k % 3)} for k, (p, y, n) in enumerate(sums)]
    out = {}
    for name, rows in (("preference", pairs), ("unpaired", labels)):
        data, out[name] = folder / f"{name}.jsonl", folder / f"{name}.yaml"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        text = RECIPE.format(root=folder / "runs", model=tiny_chat_model, data=data)
        out[name].write_text(f"algorithm: {name}\n{text}")
    return out


def curve(ranks, recipes, loss, layout, more=()):
    """The metrics of every step; ``loss`` is one, or a name of `OTHERS`."""
    plain = "unpaired" if loss in ("kto", "bco") else "preference", [f"preference.loss={loss}", *MORE.get(loss, [])]
    name, settings = OTHERS.get(loss, plain)
    recipe = recipes[name]
    world, overrides = LAYOUTS[layout]
    run = f"{loss}-{layout}-{len(more)}".replace(" ", "")
    overrides = [f"run.name={run}", f"cluster.gpus_per_node={world}", *overrides, *settings, *more]
    outcomes = ranks.run(train_cases.train, world, recipe=str(recipe), overrides=overrides)
    assert outcomes == ["done"] * world
    return read_metrics(recipe.parent / "runs" / run)


def check(ranks, recipes, loss, layouts, record_property):
    """Every layout's curve is one rank's. The largest difference of a loss goes to pytest's --junitxml."""
    truth = curve(ranks, recipes, loss, "1 rank")
    if loss in AT_THE_START:
        assert truth[0]["actor/loss"] == pytest.approx(AT_THE_START[loss], rel=1e-5)
    assert len(truth) == 12 and all(step["actor/grad_norm"] > 0 for step in truth)
    for layout in layouts:
        steps = curve(ranks, recipes, loss, layout)
        worst = max(abs(a["actor/loss"] - b["actor/loss"]) for a, b in zip(steps, truth, strict=True))
        record_property(f"{loss}, {layout}", f"{worst:.1e}")
        for step, expected in zip(steps, truth, strict=True):
            for name in ("actor/loss", "actor/grad_norm", *(n for n in expected if n.startswith("rewards/"))):
                if name == "rewards/accuracies" and abs(expected["rewards/margins"]) < 1e-6:
                    continue  # before the first update all pairs are ties, but for rounding
                where = f"{loss}, {layout}, step {step['step']}: {name}"
                rel = 1e-3 if name == "actor/grad_norm" else 1e-4  # it feels most what rounding did to weights
                assert step[name] == pytest.approx(expected[name], rel=rel, abs=1e-5), where
    return truth


@pytest.mark.parametrize("loss", by_default("dpo", of=["dpo", "kto"]))
def test_same_curve_on_every_layout(ranks, recipes, loss, record_property):
    check(ranks, recipes, loss, ["TP2", "DP2", "PP2"], record_property)


@pytest.mark.parametrize("loss", by_default("bco_pair", "orpo", "rpo_fwd_kl", of=sorted({*PAIRED, "orpo"} - {"dpo"})))
def test_every_loss_on_two_replicas(ranks, recipes, loss, record_property):
    check(ranks, recipes, loss, ["DP2"], record_property)


@pytest.mark.parametrize("what", ["reward_model", "longpo"])
def test_two_steps_on_two_replicas(ranks, recipes, what):
    """Loops and options whose whole curves are marked slow."""
    steps = [curve(ranks, recipes, what, layout, ["run.max_num_steps=2"]) for layout in ("1 rank", "DP2")]
    for alone, both in zip(*steps, strict=True):
        for name in ("actor/loss", "actor/grad_norm"):
            assert both[name] == pytest.approx(alone[name], rel=1e-4)
    assert len(steps[0]) == 2 and steps[0][1]["actor/loss"] != steps[0][0]["actor/loss"]


@pytest.mark.slow
@pytest.mark.parametrize("loss", [*PAIRED, "kto", "bco", *OTHERS])
def test_every_loss_on_every_layout(ranks, recipes, loss, record_property):
    check(ranks, recipes, loss, ["TP2", "DP2", "PP2", "CP2"], record_property)


def test_the_reference_computed_once_is_the_one_that_is_swapped_in(ranks, recipes):
    """Computed and written in a first run, read in a second, of another layout."""
    swapped = curve(ranks, recipes, "dpo", "DP2")
    path = recipes["preference"].parent / "ref_log_probs.jsonl"
    kept = [f"preference.ref_log_probs_path={path}"]
    once = curve(ranks, recipes, "dpo, precomputed", "DP2", kept)
    assert len(path.read_text().splitlines()) == 1 + 2 * 64  # what it is of, and both responses of 64 pairs
    again = curve(ranks, recipes, "dpo, precomputed", "1 rank", kept)
    for name in ("actor/loss", "actor/grad_norm", "rewards/chosen"):
        truth = [step[name] for step in swapped]
        for steps in (once, again):
            assert [step[name] for step in steps] == pytest.approx(truth, rel=1e-5, abs=1e-6)
    assert "timing_s/ref_logps" not in again[0]


@pytest.mark.parametrize("loss", ["dpo", "simpo"])
def test_the_chosen_response_gains_on_the_rejected(ranks, recipes, loss):
    """12 updates with all 64 pairs at lr 1e-3 leave the margin above 0."""
    steps = curve(ranks, recipes, loss, "1 rank")
    assert steps[-1]["rewards/margins"] > steps[0]["rewards/margins"]
    assert steps[-1]["rewards/margins"] > 0 or loss in REFERENCE_FREE
