"""The end of a run: a short table and a picture, both from the records of metrics.jsonl.

A record is one step's flat dict (see metrics.py). `timing_s/step` is the whole step, every other `timing_s/<phase>` a
part of it; a record without it (validation before the first step) counts as the sum of its phases.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Record = dict[str, Any]
Row = tuple[str, str]
STEP_SECONDS = "timing_s/step"


def summary(records: Sequence[Record]) -> list[Row]:
    """(what, value) rows: accuracy, reward or loss, length, speed, mismatch, then the seconds of every phase."""
    rows: list[Row] = []
    accuracy = _series(records, "val/accuracy")
    if accuracy:
        best_step, best = max(accuracy, key=lambda point: point[1])
        rows.append(("held-out accuracy, before → after", f"{accuracy[0][1]:.1%} → {accuracy[-1][1]:.1%}"))
        rows.append(("held-out accuracy, best", f"{best:.1%} (step {best_step})"))
    reward = _series(records, "reward/mean")
    if reward:
        rows.append(("reward, first → last step", f"{reward[0][1]:.3f} → {reward[-1][1]:.3f}"))
    elif loss := _series(records, "actor/loss"):
        rows.append(("loss, first → last step", f"{loss[0][1]:.4f} → {loss[-1][1]:.4f}"))
    if length := _series(records, "response_length/mean"):
        rows.append(("response length, first → last step", f"{length[0][1]:.1f} → {length[-1][1]:.1f}"))
    if throughput := _series(records, "perf/throughput"):
        rows.append(("tokens/s per rank, whole step", f"{_mean(throughput):,.0f}"))
    if generated := _series(records, "perf/generate_tokens_per_s"):
        rows.append(("tokens/s while generating", f"{_mean(generated):,.0f}"))
    if utilisation := _series(records, "perf/mfu"):
        rows.append(("model FLOP/s utilisation", f"{_mean(utilisation):.1%}"))
    if mismatch := _series(records, "gen_kl_error"):
        worst = max(value for _, value in mismatch)
        rows.append(
            ("train/rollout log-prob mismatch (gen_kl_error)", f"{_mean(mismatch):.1e} mean, {worst:.1e} worst")
        )
    return rows + phase_rows(records)


def phase_rows(records: Sequence[Record]) -> list[Row]:
    """Mean seconds of every phase over the steps that had it, and its share of the run's time, longest first."""
    whole = 0.0
    by_phase: dict[str, list[float]] = {}
    for record in records:
        phases = {key: value for key, value in record.items() if key.startswith("timing_s/") and key != STEP_SECONDS}
        whole += record[STEP_SECONDS] if STEP_SECONDS in record else sum(phases.values())
        for key, value in phases.items():
            by_phase.setdefault(key.removeprefix("timing_s/"), []).append(value)
    rows = [
        (f"seconds: {name}", f"{sum(values) / len(values):.2f} ({sum(values) / whole:.0%})")
        for name, values in sorted(by_phase.items(), key=lambda item: -sum(item[1]))
    ]
    steps = _series(records, STEP_SECONDS)
    return [*rows, ("seconds: whole step", f"{_mean(steps):.2f}, {len(steps)} steps")] if steps else rows


def plot_rewards(records: Sequence[Record], png_path: str | Path, title: str = "") -> None:
    """Reward per step (the loss where there is none), held-out accuracy as markers, response length on a second axis.

    A step whose value is not finite leaves a gap.
    """
    records = [{key: value for key, value in record.items() if math.isfinite(value)} for record in records]
    figure = Figure(figsize=(9, 5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    left = figure.add_subplot()
    reward, accuracy = _series(records, "reward/mean"), _series(records, "val/accuracy")
    length = _series(records, "response_length/mean")
    if reward:
        left.plot(*zip(*reward, strict=True), color="tab:blue", linewidth=2, label="reward (mean of the step)")
    elif loss := _series(records, "actor/loss"):
        left.plot(*zip(*loss, strict=True), color="tab:blue", linewidth=2, label="loss")
    if accuracy:
        style: dict[str, Any] = {
            "color": "tab:green",
            "marker": "o",
            "markersize": 8,
            "linestyle": "--",
            "linewidth": 1,
        }
        left.plot(*zip(*accuracy, strict=True), **style, label="held-out accuracy", zorder=3)
        for step, value in (accuracy[0], accuracy[-1]):
            left.annotate(
                f"{value:.0%}", (step, value), xytext=(0, 9), textcoords="offset points", ha="center", color="tab:green"
            )
    if reward or accuracy:
        values = [value for _, value in reward + accuracy]
        left.set_ylim(min(0.0, *values), max(1.0, *values) * 1.08)
    if accuracy and not reward and _series(records, "actor/loss"):
        left.set_ylabel("loss, accuracy")
    elif reward:
        left.set_ylabel("reward, accuracy")
    handles, labels = left.get_legend_handles_labels()
    if length:
        right = left.twinx()
        (line,) = right.plot(*zip(*length, strict=True), color="tab:orange", linewidth=1.2, alpha=0.8)
        right.set_ylabel("response length (tokens)", color="tab:orange")
        right.tick_params(axis="y", labelcolor="tab:orange")
        right.set_ylim(0, max(value for _, value in length) * 1.25)
        handles, labels = [*handles, line], [*labels, "response length (mean)"]
        left.set_zorder(right.get_zorder() + 1)  # the reward over the length, not under it
        left.patch.set_visible(False)
    left.set_xlabel("step")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.grid(alpha=0.3)
    left.set_title(title)
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(png_path)


def _series(records: Sequence[Record], key: str) -> list[tuple[int, float]]:
    return [(record["step"], record[key]) for record in records if key in record]


def _mean(series: Sequence[tuple[int, float]]) -> float:
    return sum(value for _, value in series) / len(series)
