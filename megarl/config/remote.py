"""Checks of ``rollout.mode: remote``: engines that are servers of their own, and samples older than the policy."""

from typing import TYPE_CHECKING

from megarl.config.sizes import ROLLOUT_TP
from megarl.config.values import Problem, Problems

if TYPE_CHECKING:
    from megarl.config import Config

# Algorithms whose loss takes samples to be the policy's, or weighs them by how far they are from it.
_WEIGHED = ("grpo", "ppo", "remax", "prime", "distillation")
_CORRECTION = ("loss.truncated_importance_sampling_type", "loss.use_rollout_logps")


def engines_beside(cfg: "Config") -> int:
    """How many servers `megarl train` starts on its own machine."""
    here = cfg.rollout.mode == "remote" and cfg.cluster.num_nodes == 1 and cfg.rollout.num_nodes == 0
    return cfg.rollout.num_engines if here else 0


def check_remote(cfg: "Config") -> Problems:
    """What remote engines need."""
    r, mode = cfg.rollout, "rollout.mode"
    if r.mode == "colocated":
        return
    corrected = cfg.loss.use_rollout_logps or cfg.loss.truncated_importance_sampling_type != "none"
    if r.max_staleness and cfg.algorithm in _WEIGHED and not corrected:
        text = (
            f"rollout.max_staleness = {r.max_staleness}: samples are of older weights than those that learn from them; "
            "correct for it with loss.truncated_importance_sampling_type=tis or loss.use_rollout_logps=true"
        )
        yield Problem(text, ("rollout.max_staleness", *_CORRECTION, "algorithm"))
    if r.router_replay:
        text = "rollout.router_replay = true: servers do not report experts; rollout.mode=colocated does"
        yield Problem(text, ("rollout.router_replay", mode))
    if r.dynamic_sampling and r.response_length_stages:
        text = (
            "rollout.response_length_stages with rollout.dynamic_sampling: groups begin before it is known which step "
            "they are for, where steps take as many as they need; rollout.mode=colocated has both"
        )
        yield Problem(text, ("rollout.response_length_stages", "rollout.dynamic_sampling", mode))
    if r.engine_timeout_s >= cfg.run.deadline_s:
        text = (
            f"rollout.engine_timeout_s = {r.engine_timeout_s:g} is not less than run.deadline_s = "
            f"{cfg.run.deadline_s:g}, after which the run ends without saying that it waited for servers"
        )
        yield Problem(text, ("rollout.engine_timeout_s", "run.deadline_s"))
    machines = r.num_nodes or 1
    if (started := machines * r.num_engines) and r.min_engines > started:
        words = f"rollout.num_engines {r.num_engines}" + (f" x {machines} machines = {started}" if r.num_nodes else "")
        text = f"rollout.min_engines = {r.min_engines} is more than {words}"
        yield Problem(text, ("rollout.min_engines", "rollout.num_engines", "rollout.num_nodes"))
    if r.num_nodes and r.num_engines == 0:
        text = f"rollout.num_nodes = {r.num_nodes} machines with rollout.num_engines = 0 servers would do nothing"
        yield Problem(text, ("rollout.num_nodes", "rollout.num_engines"))
    per_node, used = cfg.cluster.gpus_per_node, r.num_engines * r.tensor_parallel_size
    if r.num_nodes and used > per_node:
        text = (
            f"rollout.num_engines {r.num_engines} x {ROLLOUT_TP} {r.tensor_parallel_size} = {used} are more than "
            f"cluster.gpus_per_node = {per_node} of a machine"
        )
        yield Problem(text, ("rollout.num_engines", ROLLOUT_TP, "cluster.gpus_per_node"))
