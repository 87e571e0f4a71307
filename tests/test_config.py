"""Configs: everything wrong is said at once, with the place, the arithmetic, and nothing that is only an echo."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

import pytest

from megarl.config import Config, ConfigError, load, save, world_size
from megarl.config.machine import check_gpus, transformer_config_fields
from megarl.config.running import duration_seconds
from megarl.config.values import OWNED_OVERRIDES, RANGES, in_interval

HF_CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "num_hidden_layers": 10,
    "hidden_size": 56,
    "intermediate_size": 96,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """``recipe(yaml, heads=...)``: a recipe beside a model's folder and a data file, both real enough to be checked."""

    def write(text: str = "", **hf: Any) -> Path:
        model = tmp_path / "model"
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text(json.dumps(HF_CONFIG | hf))
        (tmp_path / "train.jsonl").touch()
        path = tmp_path / "recipe.yaml"
        path.write_text(f"model: {{path: {model}}}\ndata: {{path: {tmp_path}/train.jsonl}}\n{text}")
        return path

    return write


def problems(*argv: Any, check_model: bool = True) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load([str(argument) for argument in argv], check_model=check_model)
    return caught.value.problems


def overrides(settings: dict[str, Any]) -> list[str]:
    return [f"{path}={value}" for path, value in settings.items()]


# ---- what a good config gives ----


def test_defaults_below_recipe_below_overrides(recipe: Callable[..., Path]) -> None:
    path = recipe("optimizer: {lr: 1e-4, weight_decay: 0.1}\nrun: {name: mine}\nlogger: {name: '${run.name}'}")
    cfg = load([str(path), "optimizer.lr=3e-5", "model.model_overrides.qk_layernorm=true", "run.max_num_steps=null"])
    assert (cfg.optimizer.lr, cfg.optimizer.weight_decay, cfg.optimizer.adam_beta2) == (3e-5, 0.1, 0.999)
    assert cfg.model.model_overrides == {"qk_layernorm": True}
    assert cfg.logger.name == "mine"
    assert [function.name for function in cfg.reward.functions] == ["math"]


def test_config_is_frozen(recipe: Callable[..., Path]) -> None:
    cfg = load([str(recipe())])
    with pytest.raises(FrozenInstanceError):
        cfg.run.name = "other"  # type: ignore[misc]


def test_saved_config_loads_to_the_same(recipe: Callable[..., Path], tmp_path: Path) -> None:
    text = "reward: {functions: [{name: exact, weight: 2}, {name: 'a.b:c', args: {k: [1]}}]}\nloss: {clip_ratio_c: 3}"
    cfg = load([str(recipe(text))])
    save(cfg, tmp_path / "saved.yaml")
    assert load([str(tmp_path / "saved.yaml")]) == cfg


def test_empty_section_is_no_section(recipe: Callable[..., Path]) -> None:
    assert load([str(recipe("rollout:\n  # temperature: 0.7\n"))]).rollout.temperature == 1.0


def test_world_size_is_the_launchers_or_the_recipes(
    recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = load([str(recipe("cluster: {num_nodes: 2, gpus_per_node: 4}"))])
    assert world_size(cfg) == 8
    monkeypatch.setenv("SLURM_PROCID", "0")  # a batch script has these, and is no rank
    monkeypatch.setenv("SLURM_NTASKS", "16")
    assert world_size(cfg) == 8
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # srun with one task, which torchrun may follow
    assert world_size(cfg) == 8
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "16")
    assert world_size(cfg) == 16
    monkeypatch.setenv("WORLD_SIZE", "3")  # torchrun's word, under srun too
    assert world_size(cfg) == 3


@pytest.mark.parametrize("launcher", [{"WORLD_SIZE": "6"}, {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6"}], ids=str)
def test_launcher_starts_what_the_recipe_asks_for(
    recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, launcher: dict[str, str]
) -> None:
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    load([str(recipe()), "cluster.num_nodes=2", f"{GPUS}=3"])
    assert problems(recipe(), "cluster.num_nodes=2", f"{GPUS}=4") == [
        f"6 ranks were launched, but cluster.num_nodes 2 x {GPUS} 4 = 8"
    ]


# ---- what is wrong with single values ----


def test_all_problems_come_at_once_and_say_where(recipe: Callable[..., Path]) -> None:
    path = recipe(
        "optimizer:\n"  # line 3
        "  lr: fast\n"
        "  clip_gard: 1.0\n"
        "rollout:\n"
        "  max_prompt_length: 5\n"
        "  stop_token_ids: [[1]]\n"
        "reward:\n"
        "  functions:\n"
        "    - {name: maths}\n"
        "    - {nam: exact}\n"
        "loss: {kl_type: k4}\n"
    )
    found = problems(path, "loss.entropy_coef=-1", "advantage=5", "train.ppo_epochs=true", "foo", "run.name=[1")
    assert found[:2] == [
        "command line: 'foo' is not key=value",
        "command line: 'run.name=[1' is not valid YAML: " + found[1].partition("not valid YAML: ")[2],
    ]
    assert set(found[2:]) == {
        f"{path}:4: optimizer.lr = 'fast': expected a number",
        f"{path}:5: unknown key optimizer.clip_gard; did you mean optimizer.clip_grad?",
        f"{path}:7: unknown key rollout.max_prompt_length; did you mean data.max_prompt_length?",
        f"{path}:8: rollout.stop_token_ids = [[1]]: expected a list of int",
        f"{path}:12: unknown key reward.functions[1].nam; did you mean reward.functions[1].name?",
        f"{path}:12: reward.functions[1].name is missing",
        f"{path}:13: loss.kl_type = 'k4': expected one of k1, k2, k3",
        "command line: advantage = 5: expected a section with adv_estimator, normalize_by_std, "
        "use_leave_one_out_baseline, eps, "
        "baseline, truncated_in_baseline, max_difference, gamma, gae_lambda, normalize_advantages, "
        "whiten_with_bessel, kl_coef, kl_target, kl_horizon",
        "command line: train.ppo_epochs = True: expected an integer",
        "loss.entropy_coef = -1.0 is outside [0, inf)",
        "reward.functions: unknown reward 'maths'; did you mean math?",
    }


def test_message_lists_every_problem(recipe: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"^2 problems in the config:\n  - .*loss.kl_loss_coef.*\n  - .*run.seed"):
        load([str(recipe()), "loss.kl_loss_coef=x", "run.seed=y"])


def test_mandatory_values(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").touch()
    assert problems(tmp_path / "empty.yaml", check_model=False) == [
        "data.path is missing: set it in the recipe or as data.path=...",
        "model.path is missing: set it in the recipe or as model.path=...",
    ]


def test_recipe_that_cannot_be_read(tmp_path: Path) -> None:
    assert "cannot read the recipe" in problems(tmp_path / "none.yaml")[0]
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert "a recipe is a mapping of sections" in problems(tmp_path / "list.yaml")[0]
    (tmp_path / "twice.yaml").write_text("run: {seed: 1, seed: 2}\n")
    assert "duplicate key seed" in problems(tmp_path / "twice.yaml")[0]
    assert "no recipe given" in problems()[0]


def test_references(recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hidden")
    path = recipe("logger: {name: '${oc.env:SECRET}', project: '${run.nam}'}\noptimizer: {lr: '${run.name}'}")
    found = problems(path)
    assert len(found) == 3
    assert "only plain references" in found[0] and "hidden" not in found[0]
    assert found[1].endswith("logger.project = '${run.nam}': Interpolation key 'run.nam' not found")
    assert "optimizer.lr = '${run.name}'" in found[2] and "'run'" in found[2]


@pytest.mark.parametrize("name", ["..", "a/b", "../../x", "", "/etc", "a\\b"])
def test_run_name_is_a_plain_folder_name(recipe: Callable[..., Path], name: str) -> None:
    assert problems(recipe(), f"run.name='{name}'") == [
        f"run.name = {name!r} must be a plain folder name, without / or \\"
    ]


def test_run_folder_stays_inside_its_root(recipe: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "elsewhere")
    (found,) = problems(recipe(), f"run.root={tmp_path}/runs", "run.name=link")
    assert f"leads out of run.root, to {tmp_path}/elsewhere" in found


def test_intervals() -> None:
    assert [in_interval(x, "[0, 1)") for x in (-0.1, 0, 0.5, 1, math.nan)] == [False, True, True, False, False]
    assert [in_interval(x, "(0, inf)") for x in (0, 1e-9, 1e30, math.inf)] == [False, True, True, False]


def test_every_number_has_a_range() -> None:
    """An out-of-range or non-finite value of any numeric field is caught, so every one is in the table."""
    numbers = set()
    for section in fields(Config):
        if is_dataclass(section.type):
            for f in fields(section.type):
                if {int, float} & {f.type, *get_args(f.type)} and f.name != "stop_token_ids":
                    numbers.add(f"{section.name}.{f.name}")
    assert numbers == set(RANGES)


@pytest.mark.parametrize("value", [".nan", ".inf", "-1e-6"])
def test_learning_rate_that_is_none(recipe: Callable[..., Path], value: str) -> None:
    assert problems(recipe(), f"optimizer.lr={value}")[0].endswith("is outside [0, inf)")


# ---- what does not fit together ----

GPUS, TP, PP = "cluster.gpus_per_node", "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
FIRST = "parallel.num_layers_in_first_pipeline_stage"
ROLLOUT_TP = "rollout.tensor_parallel_size"
TIS, OVERSAMPLE = "loss.truncated_importance_sampling_type", "rollout.oversample"
BATCH, GROUP = "train.train_global_batch_size", "rollout.num_generations_per_prompt"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({GPUS: 6, TP: 2, PP: 2}, f"6 ranks cannot be divided by {TP} 2 x {PP} 2 = 4: 6 % 4 = 2"),
        ({GPUS: 6, ROLLOUT_TP: 4}, f"6 ranks cannot be divided by {ROLLOUT_TP} 4: 6 % 4 = 2"),
        ({"parallel.sequence_parallel": True}, f"{TP} = 1"),
        ({BATCH: 384}, f"64 x {GROUP} 8 = 512 sequences a step do not make whole updates"),
        ({BATCH: 384}, f"{BATCH} 384 sequences: 512 % 384 = 128"),
        ({GPUS: 8, TP: 2, BATCH: 2}, f"too few for 4 data-parallel ranks: 8 ranks / ({TP} 2 x {PP} 1) = 4"),
        ({GROUP: 1, BATCH: 64}, "every advantage is r - r = 0"),
        ({"rollout.temperature": 0}, "rollout.temperature = 0.0 is outside [0.01, 2]"),
        ({"validation.val_temperature": 0.001}, "is neither 0 (greedy) nor in [0.01, 2]"),
        ({"validation.val_num_generations_per_prompt": 4}, "as many equal copies"),
        ({"validation.val_reward": "exact"}, "'exact' is not one of reward.functions: math"),
        ({"weight_sync.max_token_mult_prob_error": 1}, "is outside (1, inf)"),
        ({"algorithm": "sft", "validation.val_period": 5}, "so that validation.val_period would do nothing"),
        (
            {"algorithm": "sft", "data.val_path": "squad", "validation.val_at_end": False},
            "so that data.val_path, validation.val_at_end would do nothing",
        ),
        (
            {"algorithm": "sft", "train.train_mb_tokens": 1024},
            "train.train_mb_tokens = 1024 is less than the shortest example with the longest prompt: "
            "data.max_prompt_length 1024 + 1 token of response = 1025",
        ),
        (
            {"cluster.num_nodes": 2, GPUS: 6, ROLLOUT_TP: 4},  # 12 ranks make 3 engines, the second over both nodes
            f"{GPUS} 6 and {ROLLOUT_TP} 4 do not divide one another: an engine would have part of a node "
            "(6 % 4 = 2, 4 % 6 = 4)",
        ),
        (
            {"rollout.max_model_len": 2000},
            "rollout.max_model_len = 2000 is less than the longest sequence: "
            "data.max_prompt_length 1024 + rollout.max_response_length 1024 = 2048",
        ),
        ({"train.train_mb_tokens": 1000}, "train.train_mb_tokens = 1000 is less than the longest sequence"),
        ({"train.logprob_mb_tokens": 1000}, "train.logprob_mb_tokens = 1000 is less than the longest sequence"),
        ({"rollout.max_num_batched_tokens": 100}, "rollout.max_num_seqs = 256"),
        (
            {"rollout.quantization": "fp8_per_tensor", "rollout.dtype": "fp32", "loss.use_rollout_logps": True},
            "needs rollout.dtype = bf16",
        ),
        ({"optimizer.min_lr": 1e-3}, "is above optimizer.lr"),
        ({"optimizer.lr_warmup_iters": 10, "optimizer.lr_decay_iters": 10}, "leaves nothing"),
        ({"validation.val_period": 5}, "no data.val_path"),
        ({"data.adapter": "gsm9k"}, "data.adapter = 'gsm9k' is not one of gsm8k"),
        ({"reward.functions": "[]"}, "grpo needs a reward"),
        ({"reward.functions": "[{name: math}, {name: math}]"}, "math more than once"),
        ({"reward.functions": "[{name: math, domains: [a]}]"}, "but reward.domain_key names no field"),
        ({"reward.domain_key": "kind"}, "reward.domain_key = kind does nothing"),
        (
            {OVERSAMPLE: 0.5},
            "has to correct for: set loss.truncated_importance_sampling_type, or loss.use_rollout_logps",
        ),
        ({OVERSAMPLE: 0.5, TIS: "tis", "rollout.dynamic_sampling": True}, "needs rollout.dynamic_sampling_refill=true"),
        ({OVERSAMPLE: 0.5, TIS: "tis", "rollout.mode": "remote"}, "servers have rollout.max_staleness"),
        ({OVERSAMPLE: 0.5, TIS: "tis", "algorithm": "remax"}, "is not for algorithm = remax"),
        ({"rollout.dynamic_sampling_refill": True}, "goes with rollout.dynamic_sampling=true"),
        (
            {"rollout.environment": "calculater"},
            "rollout.environment = 'calculater' is not one; did you mean calculator?",
        ),
        (
            {"rollout.max_turns": 3},
            "rollout.max_turns would do nothing: rollout.environment = single_turn has one turn",
        ),
        (
            {"rollout.environment": "grid", "rollout.turn_timeout_s": 0},
            "rollout.turn_timeout_s = 0.0 is outside (0, inf)",
        ),
        ({"rollout.environment": "grid", "algorithm": "sft"}, "rollout.environment = grid would do nothing: algorithm"),
        (
            {"rollout.environment": "grid", "rollout.router_replay": True},
            "rollout.router_replay is of responses in one go",
        ),
        (
            {"model.recompute_granularity": "full", "model.recompute_method": "uniform"},
            "model.recompute_granularity = full needs model.recompute_num_layers",
        ),
        (
            {"model.recompute_granularity": "selective", "model.recompute_modules": "[layernorm]"},
            "['layernorm'] are not among core_attn, mlp, moe,",
        ),
        ({"model.recompute_method": "block"}, "goes with full recompute"),
        ({FIRST: 3}, "needs more than one stage"),
        ({"checkpoint.resume_mode": "resume_path"}, "resume_from_path = null: the path goes with resume_path"),
        ({"checkpoint.resume_from_path": "x"}, "resume_mode = auto and checkpoint.resume_from_path = x"),
        ({"checkpoint.resume_mode": "best"}, "resume_mode = best needs checkpoint.metric_name"),
        ({"checkpoint.checkpoint_must_save_by": "'4:00:00'"}, "'4:00:00' is not DD:HH:MM:SS, in quotes"),
        ({"checkpoint.keep_top_k": 2}, "keep_top_k = 2 and checkpoint.metric_name = null need both"),
        ({"checkpoint.metric_name": "val/accuracy"}, "keep_top_k = 0 and checkpoint.metric_name = val/accuracy"),
        (
            {"checkpoint.keep_top_k": 1, "checkpoint.metric_name": "x", "checkpoint.save_contents": "[hf]"},
            "keep_top_k = 1 needs model in save_contents",
        ),
        ({"checkpoint.save_contents": "[optimizer]"}, "has optimizer without model"),
        ({"guard.on_spike": "rollback"}, "guard.on_spike = rollback needs checkpoints to go back to"),
        ({"guard.on_bad_steps": "rollback"}, "guard.on_bad_steps = rollback needs checkpoints to go back to"),
        (
            {"guard.on_spike": "rollback", "checkpoint.save_period": 2, "checkpoint.save_contents": "[model]"},
            "set checkpoint.save_period, and model and optimizer",
        ),
        ({"reward.pass_env": "[JUDGE_KEY=sk-1]"}, "reward.pass_env: 'JUDGE_KEY'... is no name of an environment"),
        (
            {"parallel.moe_token_dispatcher_type": "allgather", GPUS: 2, PP: 2},
            f"allgather takes packs of one length, which stages do not send: {PP} = 2; set alltoall",
        ),
        (
            {"model.moe_aux_loss_coeff": 0.01, "model.freeze_router": True},
            "model.moe_aux_loss_coeff = 0.01 is learnt by routers: model.freeze_router = true holds them",
        ),
        ({"model.moe_aux_loss_coeff": -1}, "model.moe_aux_loss_coeff = -1.0 is outside [0, inf)"),
        ({"algorithm": "sft", "rollout.router_replay": True}, "rollout.router_replay = true would do nothing"),
    ],
)
def test_sizes_that_do_not_fit(recipe: Callable[..., Path], settings: dict[str, Any], said: str) -> None:
    found = problems(recipe(), *overrides(settings), check_model=False)
    assert len(found) == 1, found
    assert said in found[0]


@pytest.mark.parametrize(
    ("hf", "settings", "said"),
    [
        ({}, {GPUS: 4, TP: 4}, f"14 attention heads cannot be divided by {TP} 4: 14 % 4 = 2"),
        ({}, {GPUS: 4, ROLLOUT_TP: 4}, f"14 attention heads cannot be divided by {ROLLOUT_TP} 4: 14 % 4 = 2"),
        ({"num_key_value_heads": 7}, {GPUS: 2, TP: 2}, "7 % 2 = 1, 2 % 7 = 2"),
        ({"intermediate_size": 97}, {GPUS: 2, TP: 2}, "97 % 2 = 1"),
        ({}, {GPUS: 4, PP: 4}, f"10 layers cannot be divided over {PP} 4 stages: 10 % 4 = 2"),
        (
            {},
            {GPUS: 2, PP: 2, "model.recompute_granularity": "full", "model.recompute_method": "uniform"}
            | {"model.recompute_num_layers": 2},
            "a stage's 5 layers cannot be divided into units of model.recompute_num_layers 2: 5 % 2 = 1",
        ),
        ({}, {GPUS: 4, PP: 4, FIRST: 2}, f"10 layers - 2 = 8 cannot be divided over {PP} 4 - 1 = 3 stages: 8 % 3 = 2"),
        ({"max_position_embeddings": 2000}, {}, "max_position_embeddings = 2000 is less than data.max_prompt_length"),
        ({}, {"rollout.max_model_len": 3000}, "is more than the model's max_position_embeddings = 2048"),
        ({"architectures": ["OtherForCausalLM"]}, {}, "architecture OtherForCausalLM is not supported"),
        ({"num_attention_heads": 0}, {}, "ZeroDivisionError"),
        ({}, {"model.freeze_router": True}, "model.freeze_router = true, but the model has no experts"),
        ({}, {"model.moe_aux_loss_coeff": 0.01}, "model.moe_aux_loss_coeff = 0.01, but the model has no experts"),
        ({}, {"rollout.router_replay": True}, "rollout.router_replay = true, but the model has no experts"),
        ({}, {"parallel.moe_token_dispatcher_type": "allgather"}, "= allgather, but the model has no experts"),
    ],
)
def test_models_that_do_not_fit(
    recipe: Callable[..., Path], hf: dict[str, Any], settings: dict[str, Any], said: str
) -> None:
    found = problems(recipe(**hf), *overrides(settings))
    assert len(found) == 1, found
    assert said in found[0]


def test_durations_in_seconds() -> None:
    """1 day, 2 hours, 3 minutes, 4 seconds."""
    assert duration_seconds("01:02:03:04") == 86400 + 7200 + 180 + 4
    assert [duration_seconds(text) for text in ("1:2:3:4", "02:03:04", "00:00:00:00:00", "x")] == [None] * 4


@pytest.mark.parametrize(("stages", "first", "last"), [(4, 2, 2), (2, 3, 7), (3, None, 2), (5, None, None)], ids=str)
def test_uneven_stages_that_fit(recipe: Callable[..., Path], stages: int, first: int | None, last: int | None) -> None:
    """10 layers: 2+3+3+2, 3+7, 4+4+2, 2+2+2+2+2."""
    given = {GPUS: stages, PP: stages, FIRST: first, FIRST.replace("first", "last"): last}
    load([str(recipe()), *overrides({path: "null" if value is None else value for path, value in given.items()})])


def test_more_tensor_parallel_ranks_than_key_value_heads_fit(recipe: Callable[..., Path]) -> None:
    load([str(recipe(num_attention_heads=16, hidden_size=64)), *overrides({GPUS: 4, TP: 4, ROLLOUT_TP: 4})])


@pytest.mark.parametrize("tp", [2, 4, 8, 16])
def test_engines_within_nodes_or_over_whole_ones(recipe: Callable[..., Path], tp: int) -> None:
    load([str(recipe()), *overrides({"cluster.num_nodes": 4, GPUS: 8, ROLLOUT_TP: tp})], check_model=False)


def test_sft_needs_no_rollout_sizes(recipe: Callable[..., Path]) -> None:
    unused = ["rollout.max_response_length=100000", "rollout.tensor_parallel_size=5", "reward.functions=[]"]
    load([str(recipe("algorithm: sft")), *unused])


def test_refused_values_have_no_echo(recipe: Callable[..., Path]) -> None:
    """6 ranks and TP 4 do not fit, but the TP that was meant is unknown; a size of 0 is one problem, not a division."""
    path = recipe("cluster: {gpus_per_node: 6}\nparallel: {tensor_model_paralel_size: 4, sequence_parallel: true}")
    assert [found.partition(": ")[2] for found in problems(path)] == [
        "unknown key parallel.tensor_model_paralel_size; did you mean parallel.tensor_model_parallel_size?"
    ]
    assert problems(recipe(), "train.train_global_batch_size=0", check_model=False) == [
        "train.train_global_batch_size = 0 is outside [1, inf)"
    ]


# ---- what this machine lacks ----


def test_files_and_devices_of_this_machine(recipe: Callable[..., Path], tmp_path: Path) -> None:
    lacking = [f"model.path={tmp_path}/none", "data.path=none.jsonl", "data.val_path=none.parquet"]
    path = recipe()
    assert problems(path, *lacking) == [
        f"model.path = '{tmp_path}/none' is not a folder; it takes a Hugging Face directory on this machine",
        "data.path = 'none.jsonl': there is no such file",
        "data.val_path = 'none.parquet': there is no such file",
    ]
    load([str(path), *lacking], check_model=False)
    (tmp_path / "bare").mkdir()
    assert problems(path, f"model.path={tmp_path}/bare") == [f"model.path = '{tmp_path}/bare' has no config.json"]
    (tmp_path / "model" / "config.json").write_text("{")
    assert "JSONDecodeError" in problems(path)[0]


def test_cuda_that_is_not_there(recipe: Callable[..., Path]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert problems(recipe(), "cluster.device=cuda") == [
        "cluster.device = cuda, but torch finds no CUDA device (`megarl doctor` says more)"
    ]


def test_every_rank_has_a_gpu_of_its_own(recipe: Callable[..., Path]) -> None:
    def said(*settings: str, found: int) -> list[str]:
        return [problem.text for problem in check_gpus(load([str(recipe()), *settings], check_model=False), found)]

    few = (
        f"{GPUS} = 4 ranks need a GPU each, but torch finds 2 on this machine: take fewer ranks, or cluster.device=cpu"
    )
    assert said(f"{GPUS}=4", found=2) == said(f"{GPUS}=4", "cluster.device=cuda", found=2) == [few]
    assert said(f"{GPUS}=4", "cluster.device=cpu", found=2) == []
    assert said(f"{GPUS}=4", found=0) == []  # auto without a GPU is a CPU run
    assert said(f"{GPUS}=2", found=2) == []


# ---- megatron's own settings ----


def test_overrides_name_what_megatron_has_and_megarl_leaves_to_them(recipe: Callable[..., Path]) -> None:
    settings = {"hiden_dropout": 0.1, "tensor_model_parallel_size": 2, "bf16": True, "calculate_per_token_loss": False}
    settings |= {"overlap_p2p_comm": False, "moe_token_dispatcher_type": "allgather", "moe_aux_loss_coeff": 0.01}
    given = [f"model.model_overrides.{name}={value}" for name, value in settings.items()]
    assert problems(recipe(), *given) == [
        f"model.model_overrides.tensor_model_parallel_size cannot be overridden: set {TP}",
        "model.model_overrides.bf16 cannot be overridden: set model.dtype",
        "model.model_overrides.calculate_per_token_loss cannot be overridden: megarl's engine depends on its own value",
        "model.model_overrides.overlap_p2p_comm cannot be overridden: megarl's engine depends on its own value",
        "model.model_overrides.moe_token_dispatcher_type cannot be overridden: set parallel.moe_token_dispatcher_type",
        "model.model_overrides.moe_aux_loss_coeff cannot be overridden: set model.moe_aux_loss_coeff",
        "model.model_overrides.hiden_dropout: megatron-core's TransformerConfig has no such field; "
        "did you mean hidden_dropout?",
    ]
    load([str(recipe()), "model.model_overrides.hidden_dropout=0.1", "model.model_overrides.qk_clip_alpha=0.3"])


def test_parsed_fields_are_those_of_the_class() -> None:
    """The names that are read from megatron's source, against the dataclass itself, in a process of its own."""
    code = (
        "import dataclasses; from megatron.core.transformer.transformer_config import TransformerConfig as C; "
        "print(*sorted(f.name for f in dataclasses.fields(C)))"
    )
    printed = subprocess.check_output([sys.executable, "-W", "ignore", "-c", code], text=True, timeout=120)
    parsed = set(transformer_config_fields())
    assert parsed == set(printed.splitlines()[-1].split())
    assert OWNED_OVERRIDES.keys() <= parsed
