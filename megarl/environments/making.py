"""From `rollout.environment` to the conversation that a run's rollouts are."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from megarl.config import Config
from megarl.data.reading import RecordError
from megarl.environments import ENVIRONMENTS, SINGLE_TURN
from megarl.environments.dialogue import Dialogue
from megarl.environments.episode import EpisodeLimits, within
from megarl.rewards import did_you_mean
from megarl.rollout.conversation import Conversation, single_turn
from megarl.sandbox import SandboxError

Environment = Callable[..., Conversation]


class EnvironmentProblem(Exception):
    """An environment cannot be used; the message says which and why."""


def conversation_of(cfg: Config, tokenizer: PreTrainedTokenizerBase) -> Conversation:
    """The conversation of `rollout.environment`. Raises EnvironmentProblem."""
    r = cfg.rollout
    if r.environment == SINGLE_TURN:  # which says nothing between turns, and has no limit but that of tokens
        return single_turn
    try:
        dialogue = Dialogue(tokenizer, use_chat_template=cfg.data.apply_chat_template, role=r.observation_role)
    except (ValueError, RecordError) as error:
        raise EnvironmentProblem(f"rollout.observation_role = {r.observation_role!r}: {error}") from error
    limits = EpisodeLimits(r.max_turns, r.turn_timeout_s, r.episode_timeout_s)
    return make(r.environment, r.environment_args, dialogue, limits)


def only_one_turn(dialogue: Dialogue) -> Conversation:
    """The prompt, and one response."""
    return single_turn


def make(name: str, args: Mapping[str, Any], dialogue: Dialogue, limits: EpisodeLimits) -> Conversation:
    """The conversation of an environment, by a name in ENVIRONMENTS or as "package.module:function", within limits."""
    function = resolve(name)
    try:
        inspect.signature(function).bind(dialogue, **args)
    except TypeError as error:
        raise EnvironmentProblem(f"rollout.environment = {name!r}: rollout.environment_args: {error}") from error
    try:
        return within(limits, function(dialogue, **args))
    except (ValueError, OSError, SandboxError) as error:
        raise EnvironmentProblem(f"rollout.environment = {name!r}: {error}") from error


def resolve(name: str) -> Environment:
    target = ENVIRONMENTS.get(name, name)
    module_name, colon, function_name = target.partition(":")
    if not colon:
        hint = did_you_mean(name, ENVIRONMENTS)
        known = f"known: {', '.join(ENVIRONMENTS)}, or package.module:function"
        raise EnvironmentProblem(f"rollout.environment: unknown environment {name!r}{hint}; {known}")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise EnvironmentProblem(f"rollout.environment = {name!r}: importing it failed: {error}") from error
    if function_name not in vars(module):
        raise EnvironmentProblem(f"rollout.environment = {name!r}: {module.__file__} has no {function_name!r}")
    return vars(module)[function_name]
