"""Checks of what acts on samples outside the models: rewards of domains, and environments.

Contract: as in values.py, a check is a generator over a config that yields `Problem`s.
"""

from typing import TYPE_CHECKING

from megarl.config.values import Problem, Problems

if TYPE_CHECKING:
    from megarl.config import Config


def check_acting(cfg: "Config") -> Problems:
    yield from _domains(cfg)


def _domains(cfg: "Config") -> Problems:
    """Rewards of domains need to be told a record's domain, and the field that tells it needs such rewards."""
    routed = [function.name for function in cfg.reward.functions if function.domains]
    fields = ("reward.functions", "reward.domain_key")
    if routed and cfg.reward.domain_key is None:
        have = f"reward.functions: {', '.join(routed)} have domains"
        yield Problem(f"{have}, but reward.domain_key names no field that tells them", fields)
    if cfg.reward.domain_key is not None and not routed:
        yield Problem(f"reward.domain_key = {cfg.reward.domain_key} does nothing: no reward has domains", fields)
