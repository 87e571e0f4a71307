"""Rewards: plain functions in plain files, one file each.

Contract: a reward is `def f(completions: list[str], **columns: list) -> list[float]`, as in TRL. The columns are
`prompts`, `answers`, `completion_ids`, `finish_reasons`, `transcripts` (of several turns: with what the policy read in
between), every measure of an environment and every field of the data's records, each a list as long as `completions`.
Options from the config arrive as keyword arguments; those behind a `*` in the signature are never taken for columns of
the same name. A reward that cannot judge a sample raises; 0.0 means judged, and worth nothing. One with an option
`batch_size` is called for up to so many samples at once, and may return an exception in the place of a number
(`megarl.rewards.plan`).

Importing this package imports no reward: the libraries some need are loaded when `resolve` is asked for them.
"""

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Reward = Callable[..., list[float]]

REWARDS = {
    "math": "megarl.rewards.math:math_reward",
    "exact": "megarl.rewards.exact:exact_reward",
    "format": "megarl.rewards.format:format_reward",
    "countdown": "megarl.rewards.countdown:countdown_reward",
    "code": "megarl.rewards.code:code_reward",
    "measure": "megarl.rewards.measure:measure_reward",
    "http": "megarl.rewards.http:http_reward",
    "judge": "megarl.rewards.judge:judge_reward",
    "reward_model": "megarl.rewards.reward_model:reward_model_reward",
}
COLUMNS = ("completions", "prompts", "answers", "completion_ids", "finish_reasons", "transcripts")


class RewardError(Exception):
    """A reward cannot be used, or failed where the config says to abort; the message says which and why."""


def resolve(name: str) -> Reward:
    """The function behind a name in REWARDS or behind "package.module:function"."""
    target = REWARDS.get(name, name)
    module_name, colon, function_name = target.partition(":")
    if not colon:
        hint = did_you_mean(name, REWARDS)
        raise RewardError(f"unknown reward {name!r}{hint}; rewards: {', '.join(REWARDS)}, or package.module:function")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # importing runs the user's code, which may raise anything
        raise RewardError(f"reward {name!r}: importing it failed: {type(error).__name__}: {error}") from error
    functions = {key: value for key, value in vars(module).items() if callable(value)}
    if function_name not in functions:
        hint = did_you_mean(function_name, functions)
        raise RewardError(f"reward {name!r}: {module.__file__} has no function {function_name!r}{hint}")
    return functions[function_name]


def check_arguments(name: str, function: Reward, args: Mapping[str, Any]) -> None:
    """Refuse a function that cannot take columns, and options that it would quietly swallow among the columns."""
    parameters = inspect.signature(function).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        raise RewardError(f"reward {name!r} must take **columns: def f(completions, **columns) -> list[float]")
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    options = [option for option in named if option not in COLUMNS]
    for arg in args:
        if arg not in options:
            hint = did_you_mean(arg, options)
            raise RewardError(f"reward {name!r} has no option {arg!r}{hint}; options: {', '.join(options) or 'none'}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The closest known word as a question, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
