"""Checks of what acts on samples outside the models: rewards of domains, and environments.

Contract: as in values.py, a check is a generator over a config that yields `Problem`s.
"""

import difflib
from typing import TYPE_CHECKING

from megarl.config.algorithm import ON_POLICY
from megarl.config.values import Problem, Problems
from megarl.environments import ENVIRONMENTS, SINGLE_TURN

if TYPE_CHECKING:
    from megarl.config import Config


def check_acting(cfg: "Config") -> Problems:
    yield from _domains(cfg)
    yield from _environment(cfg)
    yield from _surplus(cfg)


def _domains(cfg: "Config") -> Problems:
    """Rewards of domains need to be told a record's domain, and the field that tells it needs such rewards."""
    routed = [function.name for function in cfg.reward.functions if function.domains]
    fields = ("reward.functions", "reward.domain_key")
    if routed and cfg.reward.domain_key is None:
        have = f"reward.functions: {', '.join(routed)} have domains"
        yield Problem(f"{have}, but reward.domain_key names no field that tells them", fields)
    if cfg.reward.domain_key is not None and not routed:
        yield Problem(f"reward.domain_key = {cfg.reward.domain_key} does nothing: no reward has domains", fields)


def _environment(cfg: "Config") -> Problems:
    """A known environment, and settings that it reads."""
    name, path = cfg.rollout.environment, "rollout.environment"
    if name not in ENVIRONMENTS and ":" not in name:
        near = difflib.get_close_matches(name, ENVIRONMENTS, n=1)
        known = f"known: {', '.join(ENVIRONMENTS)}, or package.module:function"
        yield Problem(f"{path} = {name!r} is not one; {f'did you mean {near[0]}?' if near else known}", (path,))
    elif name == SINGLE_TURN:
        unread = ("environment_args", "observation_role", "max_turns", "turn_timeout_s", "episode_timeout_s")
        default = type(cfg.rollout)()
        for field in unread:
            if vars(cfg.rollout)[field] != vars(default)[field]:
                text = f"rollout.{field} would do nothing: {path} = {SINGLE_TURN} has one turn and no tools"
                yield Problem(text, (path, f"rollout.{field}"))
    elif cfg.algorithm not in ON_POLICY:
        text = f"{path} = {name} would do nothing: algorithm = {cfg.algorithm} samples no data of its own"
        yield Problem(text, (path, "algorithm"))
    elif cfg.rollout.router_replay:
        text = f"rollout.router_replay is of responses in one go, and {path} = {name} has turns"
        yield Problem(text, (path, "rollout.router_replay"))


def _surplus(cfg: "Config") -> Problems:
    """Groups that go on in the next step were begun by older weights: what that needs, and what it would upset."""
    refill, path = "rollout.dynamic_sampling_refill", "rollout.oversample"
    if cfg.rollout.dynamic_sampling_refill and not cfg.rollout.dynamic_sampling:
        yield Problem(f"{refill} goes with rollout.dynamic_sampling=true", (refill, "rollout.dynamic_sampling"))
    if cfg.rollout.dynamic_sampling_refill and cfg.rollout.mode == "remote":
        yield Problem(f"{refill} is of engines in the trainer's processes", (refill, "rollout.mode"))
    if not cfg.rollout.oversample:
        return
    said = f"{path} = {cfg.rollout.oversample:g}"
    if cfg.rollout.mode == "remote":
        text = f"{said} is of engines in the trainer's processes; servers have rollout.max_staleness"
        yield Problem(text, (path, "rollout.mode"))
    if cfg.algorithm not in ("grpo", "ppo", "prime"):
        yield Problem(
            f"{said} is not for algorithm = {cfg.algorithm}: it pairs a step's own samples", (path, "algorithm")
        )
    if cfg.rollout.dynamic_sampling and not cfg.rollout.dynamic_sampling_refill:
        yield Problem(f"{said} with rollout.dynamic_sampling needs {refill}=true", (path, refill))
    correction = "loss.truncated_importance_sampling_type"
    if cfg.loss.truncated_importance_sampling_type == "none" and not cfg.loss.use_rollout_logps:
        text = f"{said} trains on tokens of older weights, which the loss has to correct for: set {correction}"
        yield Problem(f"{text}, or loss.use_rollout_logps=true", (path, correction, "loss.use_rollout_logps"))
