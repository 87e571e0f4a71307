"""Tools: a turn that matches `pattern` is a call of its last match (group 1), whose result the policy reads; a turn
that does not is the answer, and ends the conversation.

Measures: tool_calls, and of these tool_failures, whose result is a sentence about what was wrong with the call. Where
turns end at a token of their own instead of the end of sequence, `stop` names it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from decimal import Context, Decimal
from fractions import Fraction

from megarl.data.prompts import Prompt
from megarl.data.records import Sample
from megarl.environments.bm25 import Index
from megarl.environments.dialogue import Dialogue
from megarl.environments.episode import Episode
from megarl.rewards.countdown import NotArithmeticError, evaluate
from megarl.rollout.conversation import Conversation
from megarl.sandbox import Limits, run

Tool = Callable[[str], Awaitable[str]]
MAX_SHOWN = 2000  # characters of a result


class ToolError(Exception):
    """A call that cannot be carried out; the policy is told the message."""


def calls_of(
    tool: Tool, dialogue: Dialogue, *, pattern: str, reply: str, stop: Sequence[str], max_shown: int = MAX_SHOWN
) -> Conversation:
    """Conversations in which the policy may use `tool`; `reply` is what it reads, with {result} in it."""
    wanted = re.compile(pattern, flags=re.DOTALL)
    if wanted.groups != 1:
        raise ValueError(
            f"pattern = {pattern!r} needs one group, what the tool is called with, and has {wanted.groups}"
        )
    if "{result}" not in reply:
        raise ValueError(f"reply = {reply!r} has no {{result}} in it")
    ends = [dialogue.token(text) for text in stop]

    async def conversation(episode: Episode, prompt: Prompt) -> Sample:
        episode.measures |= {"tool_calls": 0.0, "tool_failures": 0.0}
        while True:
            turn = await episode.turn(stop_token_ids=ends)
            calls = wanted.findall(dialogue.text(turn.tokens))
            if not calls or turn.finish_reason != "stop":
                return episode.sample()
            episode.measures["tool_calls"] += 1
            try:
                result = await tool(calls[-1])
            except ToolError as error:
                episode.measures["tool_failures"] += 1
                result = str(error)
            episode.observe(dialogue.says(reply.replace("{result}", result[:max_shown]), turn))

    return conversation


def calculator(
    dialogue: Dialogue,
    *,
    pattern: str = r"<calculator>(.*?)</calculator>",
    reply: str = "<result>{result}</result>",
    stop: Sequence[str] = (),
) -> Conversation:
    """Whole and decimal numbers, + - * / and parentheses, computed exactly; nothing is run as code."""

    async def tool(expression: str) -> str:
        try:
            value, _ = evaluate(expression, decimals=True)
        except NotArithmeticError as error:
            raise ToolError(f"error: {error}") from error
        return shown(value)

    return calls_of(tool, dialogue, pattern=pattern, reply=reply, stop=stop)


def shown(value: Fraction) -> str:
    """A number in decimals: all of them where it is whole, else ten significant ones, however large it is."""
    if value.denominator == 1:
        return str(value.numerator)
    try:
        return f"{float(value):.10g}"
    except OverflowError:
        return format(Context(prec=10).divide(Decimal(value.numerator), Decimal(value.denominator)), "g")


def python(
    dialogue: Dialogue,
    *,
    pattern: str = r"<python>(.*?)</python>",
    reply: str = "<output>\n{result}</output>",
    stop: Sequence[str] = (),
    concurrency: int = 8,
    wall_s: float = 5.0,
    cpu_s: int = 5,
    memory_mb: int = 1024,
    processes: int = 16,
    disk_mb: int = 32,
    output_bytes: int = 4096,
    isolation: str = "namespaces",
) -> Conversation:
    """Programs, each run by itself in a sandbox (`megarl.sandbox`); at most `concurrency` of them at a time."""
    limits = Limits(wall_s, cpu_s, memory_mb, processes, disk_mb, output_bytes, isolation)  # type: ignore[arg-type]
    run("", limits=limits)  # where there is no sandbox, that is better known now
    free = asyncio.Semaphore(concurrency)

    async def tool(program: str) -> str:
        async with free:
            outcome = await asyncio.to_thread(run, program, "", limits)
        if outcome.ended == "by itself" and outcome.ok:
            return outcome.stdout
        reasons = {"wall clock": f"error: stopped after {wall_s:g} s", "output": "error: too much output"}
        raise ToolError(outcome.stdout + reasons.get(outcome.ended, outcome.stderr[-500:]))

    return calls_of(tool, dialogue, pattern=pattern, reply=reply, stop=stop)


def search(
    dialogue: Dialogue,
    *,
    corpus: str,
    results: int = 3,
    characters: int = 500,
    pattern: str = r"<search>(.*?)</search>",
    reply: str = "<information>\n{result}</information>",
    stop: Sequence[str] = (),
) -> Conversation:
    """The best documents of a local corpus by BM25 (`megarl.environments.bm25`), so many characters of each."""
    index = Index.read(corpus)

    async def tool(query: str) -> str:
        found = await asyncio.to_thread(index.best, query, results)  # of a large corpus it takes a while
        if not found:
            raise ToolError(f"error: nothing is found for {query.strip()!r}")
        return "".join(f"{i}. {document.text[:characters]}\n" for i, document in enumerate(found, start=1))

    return calls_of(tool, dialogue, pattern=pattern, reply=reply, stop=stop, max_shown=MAX_SHOWN + results * characters)
