"""Settings of remote engines that do not fit, and those that need the machine's GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megarl.config import Config, ConfigError, load
from megarl.config.machine import check_gpus
from megarl.config.remote import engines_beside

REMOTE = {"rollout.mode": "remote"}
STAGES = [{"first_step": 1, "max_response_length": 32}, {"first_step": 5, "max_response_length": 64}]
STALE = REMOTE | {"rollout.max_staleness": 2}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


def loaded(folder: Path, settings: dict[str, Any]) -> Config:
    (folder / "train.jsonl").touch()
    path = folder / "recipe.yaml"
    path.write_text(f"model: {{path: {folder}}}\ndata: {{path: {folder}/train.jsonl}}\n")
    return load([str(path), *(f"{name}={value}" for name, value in settings.items())], check_model=False)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"rollout.max_staleness": 1},
            "rollout.max_staleness = 1 would do nothing: it is read with rollout.mode = remote",
        ),
        ({"rollout.num_nodes": 2}, "rollout.num_nodes = 2 would do nothing"),
        (
            REMOTE | {"rollout.seed_per_request": False},
            "rollout.seed_per_request = false would do nothing: it is read with rollout.mode = colocated",
        ),
        (STALE, "correct for it with loss.truncated_importance_sampling_type=tis or loss.use_rollout_logps=true"),
        (STALE | {"algorithm": "ppo"}, "rollout.max_staleness = 2"),
        (STALE | {"algorithm": "distillation", "teacher.path": "teacher"}, "rollout.max_staleness = 2"),
        (
            REMOTE | {"rollout.engine_timeout_s": 90, "run.deadline_s": 90},
            "rollout.engine_timeout_s = 90 is not less than run.deadline_s = 90, after which",
        ),
        (
            REMOTE
            | {"rollout.dynamic_sampling": True}
            | {"rollout.response_length_stages": STAGES, "rollout.max_response_length": 64},
            "groups begin before it is known which step they are for",
        ),
        (REMOTE | {"rollout.router_replay": True}, "servers do not report experts"),
        (REMOTE | {"rollout.min_engines": 2}, "rollout.min_engines = 2 is more than rollout.num_engines 1"),
        (
            REMOTE | {"rollout.min_engines": 5, "rollout.num_nodes": 2},
            "rollout.num_engines 1 x 2 machines = 2",
        ),
        (
            REMOTE | {"rollout.num_engines": 0, "rollout.num_nodes": 1},
            "rollout.num_engines = 0 servers would do nothing",
        ),
        (
            REMOTE
            | {"rollout.num_engines": 5, "rollout.tensor_parallel_size": 2, "rollout.num_nodes": 1}
            | {"cluster.gpus_per_node": 8},
            "rollout.num_engines 5 x rollout.tensor_parallel_size 2 = 10 are more than cluster.gpus_per_node = 8",
        ),
    ],
)
def test_remote_settings_that_do_not_fit(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, settings)
    assert len(caught.value.problems) == 1, caught.value.problems
    assert said in caught.value.problems[0]


def test_what_corrects_for_old_samples_is_enough(tmp_path: Path) -> None:
    for correction in ("loss.truncated_importance_sampling_type=tis", "loss.use_rollout_logps=true"):
        name, _, value = correction.partition("=")
        assert loaded(tmp_path, STALE | {name: value}).rollout.max_staleness == 2
    assert loaded(tmp_path, STALE | {"algorithm": "online_dpo", "train.train_global_batch_size": 64})


def test_an_engine_elsewhere_may_have_any_size(tmp_path: Path) -> None:
    """3 does not divide 8 ranks, which colocated engines would need."""
    cfg = loaded(tmp_path, REMOTE | {"rollout.tensor_parallel_size": 3, "cluster.gpus_per_node": 8})
    assert engines_beside(cfg) == 1


def test_servers_beside_the_ranks_need_gpus_too(tmp_path: Path) -> None:
    """4 ranks + 2 servers of 2 = 8 GPUs."""
    beside = REMOTE | {"rollout.num_engines": 2, "rollout.tensor_parallel_size": 2, "cluster.gpus_per_node": 4}
    cfg = loaded(tmp_path, beside)
    assert list(check_gpus(cfg, 8)) == []
    (problem,) = check_gpus(cfg, 7)
    assert "4 ranks and rollout.num_engines 2 x rollout.tensor_parallel_size 2 = 4 need a GPU each" in problem.text
    assert engines_beside(loaded(tmp_path, beside | {"rollout.num_nodes": 1})) == 0
