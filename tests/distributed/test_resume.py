"""A run that stops and resumes is the run that did not: bit for bit in one layout, within 1e-5 across layouts."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import shutil

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megarl.checkpoint import folder as disk
from megarl.observe.metrics import read_metrics
from tests.distributed import resume_cases

RECIPE = """
cluster: {{gpus_per_node: 2, device: cpu}}
run: {{root: {root}, max_num_steps: 6, max_num_epochs: 9}}
model: {{path: {model}, dtype: fp32}}
optimizer: {{lr: 1.0e-2, lr_warmup_iters: 3}}
train: {{train_global_batch_size: 8, train_mb_tokens: 200, logprob_mb_tokens: 300}}
data: {{path: {data}, apply_chat_template: false, max_prompt_length: 8}}
rollout: {{num_prompts_per_step: 4, num_generations_per_prompt: 4, max_response_length: 6, kv_cache_gb: 0.02}}
reward: {{workers: 1, functions: [{{name: "tests.fixtures.digits:even"}}]}}
weight_sync: {{bucket_size_mb: 1, max_gen_kl_error: 1.0e-9}}
checkpoint: {{save_at_end: false}}
"""
LAYOUTS = {
    "TP2": ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
    "DP2": [],
    "PP2": ["parallel.pipeline_model_parallel_size=2"],
}
ALGORITHMS = {
    "sft": ["algorithm=sft"],
    "dpo": ["algorithm=preference"],
    "bco": ["algorithm=unpaired", "preference.loss=bco"],
    "grpo": ["algorithm=grpo", "loss.kl_loss_coef=0.01", "train.ppo_epochs=2"],
    "ppo": ["algorithm=ppo", "loss.kl_loss_coef=0.01"],
    "prime": ["algorithm=prime", "prime.optimizer.lr=1e-2"],
}
# What depends on the clock, and on when a checkpoint was written.
UNLIKE = ("timing_s/", "perf/", "checkpoint/")


@pytest.fixture(scope="module")
def recipe(tiny_chat_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    sums = [(f"{a}+{b}=", str(a + b), str(a + b + 1) + "0" * (b % 3)) for a in range(5) for b in range(5)]
    rows = {
        "rows": [{"prompt": p, "answer": y, "response": y} for p, y, _ in sums],
        "preference": [{"prompt": p, "chosen": y, "rejected": n} for p, y, n in sums],
        "unpaired": [{"prompt": p, "response": n, "label": bool(k % 3)} for k, (p, _, n) in enumerate(sums)],
    }
    for name, records in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(root=folder / "runs", model=tiny_chat_model, data=folder / "rows.jsonl"))
    return path


def run(ranks, recipe, name, what, layout="DP2", world=2, **kwargs):
    overrides = [f"run.name={name}", *ALGORITHMS[what], *LAYOUTS[layout]]
    for kind in ("preference", "unpaired"):
        if f"algorithm={kind}" in overrides:
            overrides.append(f"data.path={recipe.parent / kind}.jsonl")
    overrides += kwargs.pop("more", [])
    stopped = ranks.run(resume_cases.train, world, recipe=str(recipe), overrides=overrides, **kwargs)
    return stopped, [numbers(record) for record in read_metrics(recipe.parent / "runs" / name)]


def numbers(record):
    return {name: value for name, value in record.items() if not name.startswith(UNLIKE)}


def check_bits(ranks, recipe, what, layout, more=(), label="", **kwargs):
    """3 steps, a stop, 3 more: every number of every step is that of 6 steps straight."""
    name = f"{what}-{layout}{label}"
    _, straight = run(ranks, recipe, f"{name}-straight", what, layout, more=more)
    stopped, first = run(ranks, recipe, name, what, layout, stop_after=3, more=more, **kwargs)
    assert all("after step 3 of 6" in said for said in stopped)
    assert len(first) == 3
    _, resumed = run(ranks, recipe, name, what, layout, more=more)
    assert resumed == straight
    assert len({record["actor/loss"] for record in straight}) == 6


def test_sft_resumes_bit_for_bit(ranks, recipe):
    """The signal comes to one rank only; both stop."""
    check_bits(ranks, recipe, "sft", "TP2", only_on=1)


@pytest.mark.slow
@pytest.mark.parametrize("what, layout", [("sft", "DP2"), ("sft", "PP2"), ("dpo", "DP2"), ("bco", "TP2")])
def test_learning_from_data_resumes_bit_for_bit(ranks, recipe, what, layout):
    check_bits(ranks, recipe, what, layout)


@pytest.mark.slow
@pytest.mark.parametrize("what, layout", [("grpo", "DP2"), ("grpo", "TP2"), ("ppo", "DP2"), ("prime", "DP2")])
def test_learning_from_rollouts_resumes_bit_for_bit(ranks, recipe, what, layout):
    """vLLM's rollouts included: their seeds are of the step and the sample. PPO's critic and PRIME's model too."""
    check_bits(ranks, recipe, what, layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout, own", [("TP2", ""), ("DP2", "critic.parallel.tensor_model_parallel_size=2")])
def test_a_critic_in_a_layout_of_its_own_resumes_bit_for_bit(ranks, recipe, layout, own):
    """Both models' weights and optimizers are in one checkpoint, each by its own layout."""
    name, more = f"ppo-{layout}-critic", ["critic.own_layout=true", *([own] if own else [])]
    _, straight = run(ranks, recipe, f"{name}-straight", "ppo", layout, more=more)
    run(ranks, recipe, name, "ppo", layout, stop_after=3, more=more)
    _, resumed = run(ranks, recipe, name, "ppo", layout, more=more)
    assert resumed == straight


OFFLOAD = ["offload.params=true", "offload.grads=true", "offload.optimizer=true"]


@pytest.mark.slow
@pytest.mark.parametrize("what, layout", [("sft", "DP2"), ("grpo", "TP2")])
def test_what_waits_in_host_memory_is_saved_and_resumed(ranks, recipe, what, layout):
    """3 steps, a stop, 3 more, with nothing of the trainer on the device in between: the numbers of a plain run."""
    name, more = f"{what}-{layout}-offload", [*OFFLOAD, "optimizer.optimizer_cpu_offload=true"]
    _, straight = run(ranks, recipe, f"{name}-straight", what, layout)
    run(ranks, recipe, name, what, layout, stop_after=3, more=more)
    _, resumed = run(ranks, recipe, name, what, layout, more=more)
    assert resumed == straight


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["generate", "reward", "save"])
def test_a_signal_in_any_phase_of_a_rollout_run_stops_after_its_step(ranks, recipe, phase):
    """Step 3 is finished, saved, and gone on from, wherever in it the signal came to one of the ranks."""
    more = ["checkpoint.save_period=1"]
    _, straight = run(ranks, recipe, f"grpo-{phase}-straight", "grpo", more=more)
    stopped, _ = run(ranks, recipe, f"grpo-{phase}", "grpo", more=more, stop_after=3, only_on=1, phase=phase)
    assert all("after step 3 of 6" in said for said in stopped)
    _, resumed = run(ranks, recipe, f"grpo-{phase}", "grpo", more=more)
    assert resumed == straight


@pytest.mark.slow
def test_samples_do_not_depend_on_how_many_engines_there_are(ranks, recipe):
    """Two engines of a rank each, or one of both: every sample has its own generator, so that the first step's samples
    are the same, and with them its rewards and lengths."""
    _, two = run(ranks, recipe, "engines-2", "grpo", more=["run.max_num_steps=1"])
    _, one = run(ranks, recipe, "engines-1", "grpo", more=["run.max_num_steps=1", "rollout.tensor_parallel_size=2"])
    names = ("reward/mean", "reward/std", "response_length/mean", "response_length/min", "frac_reward_zero_std")
    assert [two[0][name] for name in names] == [one[0][name] for name in names]
    assert two[0]["reward/std"] > 0


OTHERWISE = {
    "bf16": ("DP2", ["model.dtype=bf16"]),
    "undistributed": ("DP2", ["optimizer.use_distributed_optimizer=false"]),
    "undistributed-bf16": ("DP2", ["optimizer.use_distributed_optimizer=false", "model.dtype=bf16"]),
    "CP2": ("DP2", ["parallel.context_parallel_size=2"]),
    "VPP2": ("PP2", ["parallel.virtual_pipeline_model_parallel_size=2", "model.path=qwen2"]),
    "EP2": ("DP2", ["parallel.expert_model_parallel_size=2", "model.path=mixtral"]),
}


def with_models(settings, tiny_hf, tiny_chat_model, folder):
    """``model.path=family``, where families are random models with the tokenizer of the others."""
    out = []
    for setting in settings:
        key, _, family = setting.partition("=")
        if key == "model.path":
            path = folder / family
            if not path.exists():
                shutil.copytree(tiny_hf(family), path)
                for file in ("tokenizer.json", "tokenizer_config.json"):
                    shutil.copy(tiny_chat_model / file, path)
            setting = f"model.path={path}"
        out.append(setting)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("how", OTHERWISE)
def test_other_optimizers_layouts_and_models_resume_bit_for_bit(ranks, recipe, tiny_hf, tiny_chat_model, how):
    layout, settings = OTHERWISE[how]
    more = with_models(settings, tiny_hf, tiny_chat_model, recipe.parent)
    check_bits(ranks, recipe, "sft", layout, more=more, label=f"-{how}")


@pytest.mark.slow
def test_a_kl_controller_resumes_bit_for_bit(ranks, recipe):
    """Its coefficient moves from step to step, and goes on from where it was."""
    more = ["loss.kl_loss_coef=0", "advantage.adv_estimator=rloo", "advantage.kl_coef=0.1", "advantage.kl_target=0.01"]
    check_bits(ranks, recipe, "grpo", "DP2", more=[*more, "advantage.kl_horizon=50"], label="-kl")
    records = read_metrics(recipe.parent / "runs" / "grpo-DP2-kl")
    assert len({record["critic/kl_coef"] for record in records}) == 6


@pytest.mark.slow
def test_experts_go_on_in_another_layout(ranks, recipe, tiny_hf, tiny_chat_model):
    """Mixtral's, from two ranks that hold half of them each to two that divide every matrix."""
    model = with_models(["model.path=mixtral"], tiny_hf, tiny_chat_model, recipe.parent)
    goes_on(ranks, recipe, "sft", "DP2", "TP2", [*model, "parallel.expert_model_parallel_size=2"], model, "experts")


@pytest.mark.slow
def test_a_rollout_run_goes_on_in_another_layout(ranks, recipe):
    """DP2 to TP2, with the same engines: samples are the same, and all that comes of them within 1e-5."""
    goes_on(ranks, recipe, "grpo", "DP2", "TP2", [], [], "rollouts")


def goes_on(ranks, recipe, what, before, after, more, more_after, name):
    _, straight = run(ranks, recipe, f"{name}-straight", what, before, more=more)
    run(ranks, recipe, name, what, before, stop_after=3, more=more)
    _, resumed = run(ranks, recipe, name, what, after, more=more_after)
    names = {"actor/loss", "actor/grad_norm", "actor/lr", "reward/mean", "response_length/mean"} & straight[0].keys()
    for ours, theirs in zip(resumed, straight, strict=True):
        for key in names:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-7), (ours["step"], key)


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [("TP2", "PP2"), ("DP2", "TP2"), ("PP2", "DP2")])
def test_another_layout_goes_on(ranks, recipe, before, after):
    goes_on(ranks, recipe, "sft", before, after, [], [], f"sft-{before}-{after}")


def events(recipe, name):
    path = recipe.parent / "runs" / name / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def poison(ranks, recipe, name, at, *more, **kwargs):
    overrides = [f"run.name={name}", "algorithm=sft", "run.max_num_steps=8", "checkpoint.save_period=2", *more]
    kwargs |= {"recipe": str(recipe), "overrides": overrides, "at": at, "on_rank": 1}
    return ranks.run(resume_cases.poisoned, 2, **kwargs)


@pytest.mark.slow
def test_a_step_that_is_no_number_on_one_rank_changes_nothing_on_any(ranks, recipe):
    """NaN in step 4 of one rank: an event that names its samples, no update, and the run goes on; both ranks alike."""
    (ran, error, weights), (_, _, others) = poison(ranks, recipe, "nan-once", [4])
    assert len(ran) == 8 and error is None and weights == others
    assert all(value == value for value in weights)
    (event,) = [e for e in events(recipe, "nan-once") if e["kind"] == "non-finite"]
    assert event["step"] == 4 and "rows.jsonl" in event["event"] and "refused on all ranks" in event["event"]
    assert "persistent: computed again" in event["event"]
    records = read_metrics(recipe.parent / "runs" / "nan-once")
    assert records[3]["actor/loss"] != records[3]["actor/loss"] and records[4]["actor/loss"] > 0

    assert [record["actor/refused_updates"] for record in records] == [0, 0, 0, 1, 0, 0, 0, 0]


@pytest.mark.slow
def test_the_sample_and_the_kind_of_fault_are_named(ranks, recipe):
    """NaN in one sample's loss, each time: it alone is named. NaN the first time only: the same step is finite when it
    is computed again, and no sample is to blame."""
    poison(ranks, recipe, "nan-sample", [4], how="first")
    (event,) = [e["event"] for e in events(recipe, "nan-sample") if e["kind"] == "non-finite"]
    assert event.count("rows.jsonl:") == 1 and "not finite is the loss of prompt" in event and "persistent" in event
    poison(ranks, recipe, "nan-transient", [4], how="once")
    (event,) = [e["event"] for e in events(recipe, "nan-transient") if e["kind"] == "non-finite"]
    assert "transient: computed again, it is finite" in event and "this replica trained on 4 samples" in event


@pytest.mark.slow
def test_bad_steps_in_a_row_roll_back_and_other_data_follows(ranks, recipe):
    """Steps 5, 6 and 7 are NaN: back to step 4's checkpoint; the steps after it draw what comes next, not the same."""
    more = ["guard.max_bad_steps=3", "guard.on_bad_steps=rollback"]
    (ran, error, weights), (_, _, others) = poison(ranks, recipe, "nan-rollback", [5, 6, 7], *more)
    assert error is None and weights == others
    assert len(ran) == 7 + 4  # 1 to 7, then 5 to 8 again
    kinds = [e["kind"] for e in events(recipe, "nan-rollback")]
    assert kinds.count("non-finite") == 3 and kinds.count("rollback") == 1
    records = read_metrics(recipe.parent / "runs" / "nan-rollback")
    assert [record["step"] for record in records] == list(range(1, 9))
    assert all(record["actor/loss"] > 0 for record in records)  # the second time round


@pytest.mark.slow
def test_a_jump_goes_back_behind_the_checkpoint_it_had(ranks, recipe):
    """Step 6 has a thousand times the loss, and a checkpoint: back to that of step 4, and the other is no more."""
    more = ["guard.spike_metrics=[actor/loss]", "guard.on_spike=rollback", "guard.spike_window=5"]
    (ran, error, weights), (_, _, others) = poison(ranks, recipe, "jump", [6], *more, factor=1e3)
    assert error is None and weights == others
    assert len(ran) == 6 + 4  # 1 to 6, then 5 to 8
    (jump,) = [e["event"] for e in events(recipe, "jump") if e["kind"] == "guard"]
    assert "actor/loss jumped to" in jump
    (back,) = [e["event"] for e in events(recipe, "jump") if e["kind"] == "rollback"]
    assert back.startswith("back from step 6 to 4")
    root = recipe.parent / "runs" / "jump" / "checkpoints"
    assert [disk.step_of(path) for path in disk.finished(root)] == [8, 6]  # step 6 a second time
    assert all(record["actor/loss"] < 100 for record in read_metrics(root.parent))


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def plant(folder, canary):
    """Make the embedding of a checkpoint an object, whose pickle makes a folder; with sizes and hashes that fit."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    (name,) = [key for key in metadata.state_dict_metadata if key == "embedding.word_embeddings.weight"]
    (index, *more) = [index for index in metadata.storage_data if index.fqn == name]
    assert not more
    info = metadata.storage_data.pop(index)
    file, payload = folder / info.relative_path, io.BytesIO()
    torch.save(Canary(canary), payload)
    place = _StorageInfo(info.relative_path, file.stat().st_size, len(payload.getvalue()))
    file.write_bytes(file.read_bytes() + payload.getvalue())
    metadata.storage_data[MetadataIndex(name)] = place
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    manifest = disk.Manifest.read(folder)
    files = {n: disk.FileEntry((folder / n).stat().st_size, disk.hash_file(folder / n)) for n in manifest.files}
    (folder / disk.MANIFEST).write_text(dataclasses.replace(manifest, files=files).as_json())
    return payload.getvalue()


def test_an_object_in_a_tensors_place_is_refused_before_it_is_unpickled(ranks, recipe, tmp_path):
    """torch's planner unpickles what the metadata calls an object. A checkpoint with correct hashes that makes a weight
    one is skipped, and the one before is taken."""
    more = ["cluster.gpus_per_node=1", "run.max_num_steps=4", "checkpoint.save_period=1"]
    run(ranks, recipe, "hostile", "sft", world=1, more=more, stop_after=3)
    newest, before = disk.finished(recipe.parent / "runs" / "hostile" / "checkpoints")
    payload = plant(newest, tmp_path / "canary")
    disk.verify(newest)  # sizes and hashes say nothing
    _, records = run(ranks, recipe, "hostile", "sft", world=1, more=more)
    assert not (tmp_path / "canary").exists() and [record["step"] for record in records] == [1, 2, 3, 4]
    (said,) = [e for e in events(recipe, "hostile") if e["kind"] == "resume"]
    assert said["step"] == 2 == disk.step_of(before)
    assert "'embedding.word_embeddings.weight' is to be unpickled" in said["event"]
    torch.load(io.BytesIO(payload), weights_only=False)
    assert (tmp_path / "canary").exists()  # which is what torch would have done


@pytest.mark.slow
def test_bad_steps_in_a_row_end_the_run(ranks, recipe):
    (ran, error, _), _ = poison(ranks, recipe, "nan-abort", [3, 4], "guard.max_bad_steps=2")
    assert len(ran) == 4 and "the run ends after step 4" in error
