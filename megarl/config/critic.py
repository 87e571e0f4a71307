"""Checks of a critic that is not like the policy: its own model, and its own layout. They are the policy's, of a config
in which the critic stands in the policy's place."""

import dataclasses
from typing import TYPE_CHECKING

from megarl.config.model import ParallelConfig
from megarl.config.values import RANGES, Problem, Problems, in_interval

if TYPE_CHECKING:
    from megarl.config import Config

OWN = "critic.own_layout"


def critic_as_policy(cfg: "Config") -> "Config":
    """The config of an engine for the critic: its model, optimizer and layout are the policy's."""
    model = dataclasses.replace(cfg.model, path=cfg.critic.path or cfg.model.path)
    parallel = cfg.critic.parallel if cfg.critic.own_layout else cfg.parallel
    return dataclasses.replace(cfg, model=model, optimizer=cfg.critic.optimizer, parallel=parallel)


def of_critic(problems: Problems) -> Problems:
    """Problems of `critic_as_policy`, in the words of the config that the user wrote."""
    for problem in problems:
        text = problem.text.replace("parallel.", "critic.parallel.").replace("model.path", "critic.path")
        fields = [f"critic.{name}" if name.startswith("parallel.") else name for name in problem.fields]
        yield Problem(text, (*fields, OWN, "critic.parallel"))


def check_critic(cfg: "Config") -> Problems:
    """Its layout by itself."""
    if not cfg.critic.own_layout:
        if cfg.critic.parallel != ParallelConfig():
            yield Problem(f"critic.parallel would do nothing: {OWN} = false", ("critic.parallel", OWN))
        return
    for path, interval in RANGES.items():
        section, name = path.split(".")
        value = vars(cfg.critic.parallel).get(name) if section == "parallel" else None
        if value is not None and not in_interval(value, interval):
            yield Problem(f"critic.{path} = {value} is outside {interval}", ("critic.parallel",))
