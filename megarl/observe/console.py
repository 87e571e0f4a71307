"""What the person in front of the run sees: a header, one line per step, tables, notes.

On a terminal the last line is rewritten in place (progress bar, running phase, ETA) below the lines of the steps done;
into a file or a pipe go plain lines only. The line is redrawn when something happens and by no thread: a rank that is
killed leaves no hidden cursor behind. Only the writer's rank prints, but for `error`, which every rank may need.
"""

import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import IO, Any

import rich.console
import rich.table
import rich.text
from rich.control import Control
from rich.segment import ControlType

from megarl.config.algorithm import ON_POLICY, PAIRED

PLAIN_WIDTH = 160
ETA_WINDOW = 10
BAR_WIDTH = 24

# (metric, label, how to write it); a step's line shows those that it has, in this order.
STEP_FIELDS = (
    ("reward/mean", "reward", "{:.3f}"),
    ("actor/loss", "loss", "{:.4f}"),
    ("val/accuracy", "val", "{:.1%}"),
    ("response_length/mean", "length", "{:.1f}"),
    ("perf/throughput", "tok/s/rank", "{:,.0f}"),
    ("gen_kl_error", "mismatch", "{:.1e}"),
    ("timing_s/step", "time", "{:.2f}s"),
)


class Console:
    """Prints for one rank; `file` and `force_terminal` are for tests and wrappers."""

    def __init__(self, is_writer: bool, file: IO[str] | None = None, force_terminal: bool | None = None) -> None:
        self._is_writer = is_writer
        self._out = _rich_console(file or sys.stdout, force_terminal)
        self._err = _rich_console(file or sys.stderr, force_terminal)
        self._seconds: deque[float] = deque(maxlen=ETA_WINDOW)
        self._last_step_at = time.perf_counter()
        self._progress = ""

    def header(self, cfg: Any, mesh_line: str) -> None:
        """What is about to run, in four lines."""
        self.note(f"megarl {cfg.algorithm} · run {cfg.run.root}/{cfg.run.name} · seed {cfg.run.seed}")
        self.note(f"  model    {cfg.model.path} ({cfg.model.dtype})")
        self.note(f"  layout   {mesh_line}")
        unit = "pairs" if cfg.algorithm in (*PAIRED, "online_dpo") else "sequences"
        batch = f"{cfg.train.train_global_batch_size} {unit} per update"
        if cfg.algorithm in ON_POLICY:
            rollout = cfg.rollout
            batch = f"{rollout.num_prompts_per_step} prompts x {rollout.num_generations_per_prompt} a step, {batch}"
        self.note(f"  data     {cfg.data.path}, {batch}")

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """One line for a step that is done; the ETA comes from the last steps' wall-clock time."""
        now = time.perf_counter()
        self._seconds.append(metrics.get("timing_s/step", now - self._last_step_at))
        self._last_step_at = now
        eta = format_duration(sum(self._seconds) / len(self._seconds) * (total - step))
        self.note(f"{step_line(step, total, metrics)}  ETA {eta}")
        done = round(BAR_WIDTH * step / max(total, 1))
        bar = "━" * done + "╌" * (BAR_WIDTH - done)
        self._progress = f"{bar} {step}/{total}  ETA {eta}" if step < total else ""
        self.status("")

    def status(self, text: str) -> None:
        """The line at the bottom of a terminal: progress and what is going on now. Nothing in a file."""
        if self._is_writer and self._out.is_terminal:
            self._erase_line()
            line = rich.text.Text("  ".join(part for part in (self._progress, text) if part), style="cyan")
            line.truncate(self._out.width - 1)
            self._out.print(line, end="")

    def table(self, title: str, rows: Sequence[Sequence[str]], columns: Sequence[str] = ()) -> None:
        """Rows of text; the first column to the left, the others to the right."""
        table = rich.table.Table(title=title, title_justify="left", title_style="bold", show_header=bool(columns))
        for index in range(max((len(row) for row in rows), default=len(columns))):
            label = columns[index] if index < len(columns) else ""
            table.add_column(label, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*(rich.text.Text(cell) for cell in row))
        self._print(table)

    def note(self, text: str) -> None:
        self._print(rich.text.Text(text))

    def error(self, text: str) -> None:
        """To stderr, from any rank."""
        self._erase_line()
        self._err.print(rich.text.Text(text, style="bold red"), soft_wrap=True)

    def close(self) -> None:
        """Leave the terminal on a fresh line."""
        self._progress = ""
        self._erase_line()

    def _print(self, renderable: Any) -> None:
        if not self._is_writer:
            return
        self._erase_line()
        self._out.print(renderable, soft_wrap=isinstance(renderable, rich.text.Text))
        self._out.file.flush()

    def _erase_line(self) -> None:
        if self._is_writer and self._out.is_terminal:
            self._out.control(Control((ControlType.CARRIAGE_RETURN,), (ControlType.ERASE_IN_LINE, 2)))


def step_line(step: int, total: int, metrics: Mapping[str, float]) -> str:
    """`step  7/40  reward 0.523  val 61.0%  length 21.3  ...` from the metrics that are there."""
    width = len(str(total))
    parts = [f"step {step:>{width}}/{total}"]
    for key, label, form in STEP_FIELDS:
        hidden = key == "actor/loss" and "reward/mean" in metrics
        if key in metrics and not hidden:
            parts.append(f"{label} {form.format(metrics[key])}")
    return "  ".join(parts)


def format_duration(seconds: float) -> str:
    """59s, 3m05s, 2h07m."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _rich_console(file: IO[str], force_terminal: bool | None) -> rich.console.Console:
    console = rich.console.Console(file=file, force_terminal=force_terminal, highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH  # a log file does not wrap
    return console
