"""A walk on a grid: the policy is shown a map, says a direction, and is shown the map again, until it stands on the
goal, falls into a hole or ends its steps.

A record has `grid`, a list of equally long rows: P where the policy starts, G the goal, O a hole, # a wall, _ floor
(`megarl.data.grid` makes some). A turn's last word among up, down, left and right is the step; a turn without one, or
a step against a wall or off the map, moves nowhere. Measures: success (0 or 1), steps, and invalid_steps. The reward
`measure` with field=success scores it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megarl.data.grid import MOVES, parse
from megarl.data.prompts import Prompt
from megarl.data.records import Sample
from megarl.environments.dialogue import Dialogue
from megarl.environments.episode import Episode
from megarl.rollout.conversation import Conversation

STEP = re.compile(r"\b(up|down|left|right)\b", flags=re.IGNORECASE)


@dataclass(frozen=True)
class World:
    """A map, and where on it the policy stands."""

    rows: tuple[str, ...]  # without P
    at: tuple[int, int]  # row, column

    @staticmethod
    def of(rows: Sequence[str]) -> World:
        """Raises ValueError for a map that is none."""
        start, _ = parse(rows)
        return World(tuple(row.replace("P", "_") for row in rows), start)

    @property
    def here(self) -> str:
        return self.rows[self.at[0]][self.at[1]]

    def moved(self, step: str) -> World:
        """After a step; the same where it leads nowhere."""
        row, column = (a + b for a, b in zip(self.at, MOVES[step], strict=True))
        inside = 0 <= row < len(self.rows) and 0 <= column < len(self.rows[0])
        return World(self.rows, (row, column)) if inside and self.rows[row][column] != "#" else self

    def __str__(self) -> str:
        row, column = self.at
        shown = [*self.rows]
        shown[row] = f"{shown[row][:column]}P{shown[row][column + 1 :]}"
        return "\n".join(shown)


def grid(dialogue: Dialogue, *, max_steps: int = 8, stop: Sequence[str] = ()) -> Conversation:
    """Up to `max_steps` turns on a record's map."""
    if max_steps < 1:
        raise ValueError(f"max_steps = {max_steps}: at least 1")
    ends = [dialogue.token(text) for text in stop]

    async def conversation(episode: Episode, prompt: Prompt) -> Sample:
        world = World.of(prompt.fields["grid"])
        episode.measures |= {"success": 0.0, "steps": 0.0, "invalid_steps": 0.0}
        while True:
            turn = await episode.turn(stop_token_ids=ends)
            said = STEP.findall(dialogue.text(turn.tokens))
            before, world = world, world.moved(said[-1].lower()) if said else world
            episode.measures["steps"] += 1
            episode.measures["invalid_steps"] += float(world == before)
            episode.measures["success"] = float(world.here == "G")
            over = world.here in "GO" or episode.measures["steps"] == max_steps
            if over or turn.finish_reason != "stop":
                return episode.sample()
            told = "" if world != before else "That leads nowhere.\n"
            episode.observe(dialogue.says(f"{told}{world}\n", turn))

    return conversation
