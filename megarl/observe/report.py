"""The end of a run: a short table and a picture, both from the records of metrics.jsonl.

A record is one step's flat dict (see metrics.py). Its `timing_s/...` are phases (see timers.py): `timing_s/step` is the
whole step, a name with a slash is a part of the phase before the slash, and `timing_s/total` is all the time that was
recorded, in the step and beside it (loading, validation before the first step, a save after it).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megarl.observe.timers import PREFIX, STEP, TOTAL

Record = dict[str, Any]
Row = tuple[str, str]
Series = list[tuple[int, float]]
REWARD_PICTURE, LOSS_PICTURE = "reward.png", "loss.png"


def summary(records: Sequence[Record]) -> list[Row]:
    """(what, value) rows: accuracy, reward or loss, length, speed, mismatch, then the seconds of every phase."""
    rows = _held_out_rows(records)
    if reward := _series(records, "reward/mean"):
        rows.append(("reward, first → last step", _first_last(reward, "{:.3f}")))
    elif loss := _series(records, "actor/loss"):
        rows.append(("loss, first → last step", _first_last(loss, "{:.4f}")))
    if length := _series(records, "response_length/mean"):
        rows.append(("response length, first → last step", _first_last(length, "{:.1f}")))
    if throughput := _series(records, "perf/throughput"):
        rows.append(("tokens/s per rank, whole step", f"{_mean(throughput):,.0f}"))
    if generated := _series(records, "perf/generate_tokens_per_s"):
        rows.append(("response tokens/s per rank, while generating", f"{_mean(generated):,.0f}"))
    if utilisation := _series(records, "perf/mfu"):
        rows.append(("model FLOP/s utilisation", f"{_mean(utilisation):.1%}"))
    if mismatch := _series(records, "gen_kl_error"):
        worst = max(value for _, value in mismatch)
        rows.append(
            ("train/rollout log-prob mismatch (gen_kl_error)", f"{_mean(mismatch):.1e} mean, {worst:.1e} worst")
        )
    return rows + phase_rows(records)


def phase_rows(records: Sequence[Record]) -> list[Row]:
    """Mean seconds of every phase over the records that have it, and its share of the whole run's, longest first.

    Phases side by side add up to at most 100 %; one with a slash in its name is counted in its parent's share too.
    """
    whole = recorded_seconds(records)
    by_phase: dict[str, list[float]] = {}
    for record in records:
        for name, seconds in _phases(record).items():
            by_phase.setdefault(name, []).append(seconds)
    steps = by_phase.pop(STEP, [])
    rows = [
        (f"seconds: {name}", f"{sum(values) / len(values):.2f} ({_share(sum(values), whole)})")
        for name, values in sorted(by_phase.items(), key=lambda item: -sum(item[1]))
    ]
    if steps:
        rows.append(
            ("seconds: whole step", f"{sum(steps) / len(steps):.2f} ({_share(sum(steps), whole)}), {len(steps)} steps")
        )
    return [*rows, ("seconds: whole run", f"{whole:.2f}")] if rows else []


def recorded_seconds(records: Sequence[Record]) -> float:
    """All the time that the records account for. One without `timing_s/total` counts as its step, or else its phases
    that lie in no other."""
    whole = 0.0
    for record in records:
        phases = _phases(record)
        outermost = sum(seconds for name, seconds in phases.items() if "/" not in name)
        whole += record.get(PREFIX + TOTAL, phases.get(STEP, outermost))
    return whole


def picture_name(records: Sequence[Record]) -> str:
    """`reward.png`, or `loss.png` for a run without rewards."""
    return REWARD_PICTURE if _series(records, "reward/mean") or _series(records, "val/reward") else LOSS_PICTURE


def plot_rewards(records: Sequence[Record], png_path: str | Path, title: str = "") -> None:
    """Reward per step (the loss where there is none), held-out accuracy as markers, response length on a second axis.

    A step whose value is not finite is left out. Below `title` stands what became of the accuracy, reward or loss.
    """
    records = [{key: value for key, value in record.items() if math.isfinite(value)} for record in records]
    figure = Figure(figsize=(9, 5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    left = figure.add_subplot()
    reward, accuracy = _series(records, "reward/mean"), _series(records, "val/accuracy")
    loss = [] if reward or accuracy else _series(records, "actor/loss")
    marker = "." if len(reward or loss) < 3 else ""  # a line needs two points to be seen
    for series, label in ((reward, "reward (mean of the step)"), (loss, "loss")):
        if series:
            left.plot(*zip(*series, strict=True), color="tab:blue", linewidth=2, marker=marker, label=label, zorder=2.5)
    if accuracy:
        _plot_accuracy(left, accuracy)
    if reward or accuracy:
        values = [value for _, value in reward + accuracy]
        left.set_ylim(min(0.0, *values), max(1.0, *values) * 1.08)
    left.set_ylabel("reward, accuracy" if reward and accuracy else "reward" if reward else "loss" if loss else "")
    handles, labels = left.get_legend_handles_labels()
    if length := _series(records, "response_length/mean"):
        handles.append(_plot_length(left, length))
        labels.append("response length (mean, right axis)")
    left.set_xlabel("step")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.grid(alpha=0.3)
    left.set_title("\n".join(line for line in (title, _outcome(accuracy, reward, loss)) if line), fontsize=11)
    if len(handles) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(png_path)


def _plot_accuracy(axes: Axes, accuracy: Series) -> None:
    axes.plot(
        *zip(*accuracy, strict=True),
        color="tab:green",
        marker="o",
        markersize=8,
        linestyle="--",
        linewidth=1,
        label="held-out accuracy",
        zorder=3,
    )
    for step, value in dict([accuracy[0], accuracy[-1]]).items():
        axes.annotate(
            f"{value:.1%}", (step, value), xytext=(0, 9), textcoords="offset points", ha="center", color="tab:green"
        )


def _plot_length(left: Axes, length: Series) -> Any:
    """The line of the response lengths, on an axis of its own, behind the others."""
    right = left.twinx()
    (line,) = right.plot(*zip(*length, strict=True), color="tab:orange", linewidth=1.2, alpha=0.8)
    right.set_ylabel("response length (tokens)", color="tab:orange")
    right.tick_params(axis="y", labelcolor="tab:orange")
    right.set_ylim(0, max(1.0, max(value for _, value in length) * 1.25))
    left.set_zorder(right.get_zorder() + 1)
    left.patch.set_visible(False)
    return line


def _outcome(accuracy: Series, reward: Series, loss: Series) -> str:
    for name, form, series in (
        ("held-out accuracy", "{:.1%}", accuracy),
        ("reward", "{:.3f}", reward),
        ("loss", "{:.4f}", loss),
    ):
        if series:
            return f"{name} {_first_last(series, form)}, steps {series[0][0]} to {series[-1][0]}"
    return ""


def _held_out_rows(records: Sequence[Record]) -> list[Row]:
    rows: list[Row] = []
    accuracy, reward = _series(records, "val/accuracy"), _series(records, "val/reward")
    if accuracy:
        best_step, best = max(accuracy, key=lambda point: point[1])
        rows.append(("held-out accuracy, before → after", _first_last(accuracy, "{:.1%}")))
        rows.append(("held-out accuracy, best", f"{best:.1%} (step {best_step})"))
    if reward and reward != accuracy:  # with one reward function of weight 1 they are the same
        rows.append(("held-out reward, before → after", _first_last(reward, "{:.3f}")))
    if errors := sum(value for _, value in _series(records, "val/errors")):
        rows.append(("held-out samples that could not be scored", f"{errors:,.0f}"))
    return rows


def _phases(record: Record) -> dict[str, float]:
    """Seconds by phase, the step among them, the total not."""
    timed = {key.removeprefix(PREFIX): value for key, value in record.items() if key.startswith(PREFIX)}
    return {name: seconds for name, seconds in timed.items() if name != TOTAL}


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole > 0 else "-"


def _first_last(series: Series, form: str) -> str:
    return f"{form.format(series[0][1])} → {form.format(series[-1][1])}"


def _series(records: Sequence[Record], key: str) -> Series:
    return [(record["step"], record[key]) for record in records if key in record]


def _mean(series: Series) -> float:
    return sum(value for _, value in series) / len(series)
