"""Whether training goes wrong: updates that were not finite, and jumps of metrics. Pure bookkeeping, no collectives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from megarl.config import GuardConfig

Verdict = Literal["fine", "abort", "rollback"]


class Guard:
    """Looks at every step's report. Its windows are part of a checkpoint, its count of rollbacks is the process's."""

    def __init__(self, cfg: GuardConfig) -> None:
        self.cfg = cfg
        self.bad_in_a_row = 0
        self.rollbacks = 0
        self._windows: dict[str, list[float]] = {name: [] for name in cfg.spike_metrics}

    def look(self, values: Mapping[str, float], refused: bool) -> tuple[Verdict, list[str]]:
        """What follows from a step with these metrics, of which an update was refused or not; and what to say."""
        said, verdict = [], "fine"
        self.bad_in_a_row = self.bad_in_a_row + 1 if refused else 0
        if self.bad_in_a_row >= self.cfg.max_bad_steps:
            said.append(f"{self.bad_in_a_row} steps in a row were not finite (guard.max_bad_steps)")
            verdict = self.cfg.on_bad_steps
        for name in self.cfg.spike_metrics:
            if name in values and (jump := self._jump(name, values[name])):
                said.append(jump)
                if self.cfg.on_spike != "warn" and verdict == "fine":
                    verdict = self.cfg.on_spike
        if verdict == "rollback":
            self.bad_in_a_row = 0
            self.rollbacks += 1
            if self.rollbacks > self.cfg.max_rollbacks:
                said.append(
                    f"and this would be rollback {self.rollbacks} of guard.max_rollbacks {self.cfg.max_rollbacks}"
                )
                verdict = "abort"
        return verdict, said  # type: ignore[return-value]

    def _jump(self, name: str, value: float) -> str | None:
        """What to say of a value far above the window before it. A jump does not enter the window."""
        window = self._windows[name]
        if len(window) >= max(self.cfg.spike_window // 5, 2) and math.isfinite(value):
            mean = sum(window) / len(window)
            deviation = math.sqrt(sum((x - mean) ** 2 for x in window) / len(window))
            if value > mean + self.cfg.spike_sigmas * deviation and value - mean > 1e-6 * abs(mean):
                return f"{name} jumped to {value:.4g}: the last {len(window)} steps had {mean:.4g} ± {deviation:.2g}"
        if math.isfinite(value):
            window.append(value)
            del window[: -self.cfg.spike_window]
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"bad_in_a_row": self.bad_in_a_row, "windows": self._windows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bad_in_a_row = state["bad_in_a_row"]
        self._windows = {name: list(state["windows"].get(name, [])) for name in self._windows}
