"""Environments: what a policy talks with, one plain file each.

Contract: an environment is a function `def make(dialogue, **options) -> conversation`, called once a run, and a
conversation is `async def conversation(episode, prompt) -> Sample`, called once a sample
(`megarl.rollout.conversation`); many of them run side by side, in one thread. `dialogue` knows the tokenizer and puts
what the environment says between two turns; `episode` is the engine, within limits, and keeps the transcript:

    async def conversation(episode, prompt):
        while True:
            turn = await episode.turn()                    # the policy writes
            said = await look_up(dialogue.text(turn.tokens))
            if said is None:
                return episode.sample()
            episode.observe(dialogue.says(said, turn))     # the policy reads

Tokens in, tokens out: nothing is tokenised twice, and what the policy did not write is outside of the loss. What a
conversation learns about itself (`episode.measures`) are columns for rewards, and metrics. Environments know no engine
and no process group; an exception in one costs its group and names its prompt.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from megarl.environments.dialogue import Dialogue
from megarl.environments.episode import EpisodeLimits, within
from megarl.rewards import did_you_mean
from megarl.rollout.conversation import Conversation, single_turn

Environment = Callable[..., Conversation]

SINGLE_TURN = "single_turn"
ENVIRONMENTS = {
    SINGLE_TURN: "megarl.environments:only_one_turn",
    "calculator": "megarl.environments.tools:calculator",
    "python": "megarl.environments.tools:python",
    "search": "megarl.environments.tools:search",
    "countdown": "megarl.environments.countdown:countdown",
    "grid": "megarl.environments.grid:grid",
}


class EnvironmentProblem(Exception):
    """An environment cannot be used; the message says which and why."""


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
    return within(limits, function(dialogue, **args))


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
