"""Countdown in several attempts: after an answer that misses, the policy reads what it makes, and tries again.

Records are `megarl.data.countdown`'s, answers stand between <answer> and </answer>, and the reward `countdown` looks at
the last one. Measures: attempts (answers that were looked at) and solved (0 or 1).
"""

from __future__ import annotations

from collections.abc import Sequence

from megarl.data.prompts import Prompt
from megarl.data.records import Sample
from megarl.environments.dialogue import Dialogue
from megarl.environments.episode import Episode
from megarl.environments.tools import shown
from megarl.rewards.countdown import ANSWER, SPELLINGS, NotArithmeticError, evaluate, score
from megarl.rollout.conversation import Conversation


def countdown(dialogue: Dialogue, *, attempts: int = 3, stop: Sequence[str] = ()) -> Conversation:
    """Up to `attempts` answers; the conversation ends with the right one, or with a turn that has none."""
    if attempts < 1:
        raise ValueError(f"attempts = {attempts}: at least 1")
    ends = [dialogue.token(text) for text in stop]

    async def conversation(episode: Episode, prompt: Prompt) -> Sample:
        nums, target = prompt.fields["nums"], prompt.fields["target"]
        episode.measures |= {"attempts": 0.0, "solved": 0.0}
        while True:
            turn = await episode.turn(stop_token_ids=ends)
            text = dialogue.text(turn.tokens)
            answers = ANSWER.findall(text)
            if not answers:
                return episode.sample()
            episode.measures["attempts"] += 1
            episode.measures["solved"] = float(score(text, nums, target, 0.0) == 1.0)
            if episode.measures["solved"] or episode.measures["attempts"] == attempts or turn.finish_reason != "stop":
                return episode.sample()
            left = attempts - int(episode.measures["attempts"])
            episode.observe(dialogue.says(f"{verdict(answers[-1], nums, target)} Attempts left: {left}.", turn))

    return conversation


def verdict(answer: str, nums: list[int], target: int) -> str:
    """What is wrong with an answer, in a sentence."""
    try:
        value, used = evaluate(answer.translate(SPELLINGS).partition("=")[0])
    except NotArithmeticError as error:
        return f"That is not arithmetic: {error}."
    made = f"That makes {shown(value)}"
    if sorted(used) != sorted(nums):
        return f"{made}, but with the numbers {', '.join(map(str, used))}; use {', '.join(map(str, nums))}, each once."
    return f"{made}, not {target}." if value != target else f"{made}; write only {target} after the equals sign."
