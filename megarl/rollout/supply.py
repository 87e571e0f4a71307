"""Prompts of groups that need not end in the step that they begin in.

Contract: every prompt that is drawn is used for exactly one group that a step gets (or drops as unscorable, or
rejects), whatever else happens: those that no engine came to are given back and come first in the next step, and those
whose groups are under way are known here, on every rank, so that a run that resumes begins these groups anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megarl.data.prompts import Prompt

Numbered = tuple[int, Prompt]  # in the order of drawing


class Supply:
    """The same on all ranks."""

    def __init__(self, items: Sequence[Prompt], engines: int) -> None:
        """
        Args:
            items: the data, in which a resumed run finds its prompts again.
            engines: how many share the prompts.
        """
        self._items = items
        self._back: list[Numbered] = []
        self._next = 0
        self.under_way: list[list[Numbered]] = [[] for _ in range(engines)]

    def take(self, count: int, draw: Callable[[int], list[Prompt]]) -> list[Numbered]:
        """The next prompts: first those that were given back."""
        taken, self._back = self._back[:count], self._back[count:]
        drawn = draw(count - len(taken)) if len(taken) < count else []
        taken += [(self._next + i, prompt) for i, prompt in enumerate(drawn)]
        self._next += len(drawn)
        return taken

    def settle(self, taken: Sequence[Numbered], used: Sequence[int], under_way: Sequence[list[Numbered]]) -> None:
        """After a step in which engine e had ``taken[e::engines]``, began the first ``used[e]`` of them, and has
        ``under_way[e]`` not done."""
        engines = len(used)
        self._back = [entry for i, entry in enumerate(taken) if i // engines >= used[i % engines]] + self._back
        self.under_way = list(under_way)

    def state_dict(self) -> dict[str, Any]:
        """The ids of prompts to begin anew, in order."""
        waiting = sorted(
            [*self._back, *(entry for part in self.under_way for entry in part)], key=lambda entry: entry[0]
        )
        return {"prompts": [prompt.id for _, prompt in waiting]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        by_id = {prompt.id: prompt for prompt in self._items}
        self._back = list(enumerate(by_id[name] for name in state["prompts"]))
        self._next = len(self._back)
        self.under_way = [[] for _ in self.under_way]
