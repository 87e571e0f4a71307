"""A critic with a model or a layout of its own is checked as the policy is, in the words of its own settings."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megarl.config import load
from tests.test_config import HF_CONFIG, no_launcher, overrides, problems, recipe

__all__ = ["no_launcher", "recipe"]  # fixtures

GPUS, OWN = "cluster.gpus_per_node", "critic.own_layout"
TP, PP = "critic.parallel.tensor_model_parallel_size", "critic.parallel.pipeline_model_parallel_size"
PPO = {"algorithm": "ppo", GPUS: 4}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({TP: 2}, "critic.parallel would do nothing: critic.own_layout = false"),
        ({OWN: True, TP: 3}, f"4 ranks cannot be divided by {TP} 3 x {PP} 1 = 3: 4 % 3 = 1"),
        ({OWN: True, TP: 0}, f"{TP} = 0 is outside [1, inf)"),
        ({OWN: True, "critic.parallel.sequence_parallel": True}, f"but {TP} = 1"),
        ({OWN: True, PP: 4}, f"the model's 10 layers cannot be divided over {PP} 4 stages: 10 % 4 = 2"),
        ({OWN: True, TP: 4}, f"14 attention heads cannot be divided by {TP} 4: 14 % 4 = 2"),
        ({"critic.path": "/none"}, "critic.path = '/none' is not a folder"),
        ({"algorithm": "grpo", OWN: True}, "critic.own_layout = true would do nothing: it is read with algorithm"),
    ],
)
def test_critics_that_do_not_fit(recipe: Callable[..., Path], settings: dict[str, Any], said: str) -> None:
    found = problems(recipe(), *overrides(PPO | settings))
    assert said in "\n".join(found)
    assert all("critic" in problem for problem in found), found  # nothing is wrong with the policy


def test_a_critic_of_other_sizes_in_another_layout(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """14 heads are too odd for TP 4; the critic's 16 are not. The policy stays at TP 2 x DP 2."""
    other = tmp_path / "critic"
    other.mkdir()
    sizes = {"num_attention_heads": 16, "num_key_value_heads": 4, "hidden_size": 64}
    (other / "config.json").write_text(json.dumps(HF_CONFIG | sizes))
    policy = {"parallel.tensor_model_parallel_size": 2, "critic.path": other}
    cfg = load([str(recipe()), *overrides(PPO | policy | {OWN: True, TP: 4})])
    assert (cfg.parallel.tensor_model_parallel_size, cfg.critic.parallel.tensor_model_parallel_size) == (2, 4)
