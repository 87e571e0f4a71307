"""The observers: phases, metrics files, console lines, the report, FLOPs. Figures are derived by hand in the
comments."""

import io
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megarl.config import load
from megarl.observe.console import Console, format_duration, step_line
from megarl.observe.metrics import MetricsLog, read_metrics
from megarl.observe.report import phase_rows, picture_name, plot_rewards, recorded_seconds, summary
from megarl.observe.run import Run
from megarl.observe.throughput import mfu, tokens_per_second_per_device
from megarl.observe.timers import Phases

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 16,
    "vocab_size": 10,
}
PLAIN_LOGGER = SimpleNamespace(wandb_enabled=False, project="megarl", name=None)


class RecordingWatchdog:
    def __init__(self) -> None:
        self.events: list[str] = []

    def enter(self, name: str) -> None:
        self.events.append(f"+{name}")

    def leave(self) -> None:
        self.events.append("-")


class Clock:
    """time.perf_counter, moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


@pytest.fixture
def new_run(tmp_path: Path) -> Callable[..., Run]:
    """A run on a writer's rank of 2, in tmp_path/runs/demo, with the model of `TINY`."""

    def start(*overrides: str, model: Path = tmp_path / "model", rank: int = 0, device: str | None = None) -> Run:
        model.mkdir(parents=True, exist_ok=True)
        (model / "config.json").write_text(json.dumps(TINY))
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("data: {path: train.jsonl}\n")
        paths = [f"model.path={model}", f"run.root={tmp_path / 'runs'}", "run.name=demo"]
        cfg = load([str(recipe), *paths, *overrides], check_model=False)
        return Run(cfg, rank, 2, "2 ranks", device)

    return start


def records(steps: int = 20) -> list[dict[str, Any]]:
    """A run as the GRPO loop would record it: validation before the first step, then `steps` steps."""
    start: list[dict[str, Any]] = [{"step": 0, "val/accuracy": 0.4, "timing_s/validate": 2.0}]
    return start + [
        {
            "step": step,
            "reward/mean": 0.4 + 0.5 * step / steps,
            "response_length/mean": 10 + 15 * step / steps,
            "perf/throughput": 1000.0,
            "gen_kl_error": 2e-7 * step,
            "timing_s/generate": 1.0,
            "timing_s/train": 0.5,
            "timing_s/step": 2.0,
            "timing_s/total": 2.0,
        }
        | ({"val/accuracy": 0.4 + 0.5 * step / steps} if step % 10 == 0 else {})
        for step in range(1, steps + 1)
    ]


def test_phases_add_up_nest_and_reset() -> None:
    phases = Phases()
    with phases("step"):
        for _ in range(2):
            with phases("train"):
                time.sleep(0.01)
    seconds = phases.pop()
    assert seconds["timing_s/train"] >= 0.02
    assert seconds["timing_s/total"] == seconds["timing_s/step"] >= seconds["timing_s/train"]
    assert phases.pop() == {}


def test_a_validation_s_rollout_is_not_the_step_s() -> None:
    phases = Phases()
    with phases("validate"), phases("generate"):
        pass
    with phases("step"):
        with phases("generate"):
            pass
        with phases("validate"), phases("generate"):
            time.sleep(0.01)
    with phases("save"):
        time.sleep(0.01)
    seconds = {key.removeprefix("timing_s/"): value for key, value in phases.pop().items()}
    assert set(seconds) == {"generate", "validate", "validate/generate", "step", "save", "total"}
    assert seconds["generate"] < 0.01 <= seconds["validate/generate"] <= seconds["validate"]
    assert seconds["total"] >= seconds["step"] + seconds["save"]


def test_phases_tell_the_watchdog_also_when_the_block_raises() -> None:
    watchdog = RecordingWatchdog()
    phases = Phases(watchdog)
    with pytest.raises(ZeroDivisionError), phases("generate"), phases("sync"):
        _ = 1 / 0
    assert watchdog.events == ["+generate", "+sync", "-", "-"]
    assert set(phases.pop()) == {"timing_s/generate", "timing_s/generate/sync", "timing_s/total"}


def test_metrics_are_flat_json_lines_and_tensorboard_scalars(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, PLAIN_LOGGER, {"run": {"seed": 1}}, is_writer=True)
    log.log(1, {"reward/mean": 0.5, "actor/lr": 1e-6})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # before close: a killed run keeps its records
    assert [json.loads(line) for line in lines] == [{"step": 1, "reward/mean": 0.5, "actor/lr": 1e-6}]
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(1, 0.5)]


def test_nonfinite_values_are_valid_json_and_counted(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, PLAIN_LOGGER, {}, is_writer=True)
    log.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5})
    log.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 1.5, "metrics/nonfinite": 3}
    (record,) = read_metrics(tmp_path)
    assert math.isnan(record["a"]) and record["b"] == math.inf and record["c"] == -math.inf


def test_lines_of_a_step_are_merged_and_a_half_written_one_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "reward/mean": 0.1}\n{"step": 2, "reward/mean": 0.2}\n{"step": 3, "rew')
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    log = MetricsLog(tmp_path, PLAIN_LOGGER, {}, is_writer=True)
    log.log(2, {"reward/mean": 0.25, "val/accuracy": 0.5})
    log.log(3, {"reward/mean": 0.3})
    log.close()
    assert read_metrics(path) == [
        {"step": 1, "reward/mean": 0.1},
        {"step": 2, "reward/mean": 0.25, "val/accuracy": 0.5},
        {"step": 3, "reward/mean": 0.3},
    ]


def test_lines_wait_while_the_disk_takes_none(tmp_path: Path) -> None:
    """In a process that may write 25 bytes: two lines of 10, a half, and the rest once there is room again."""
    code = f"""
import resource
from pathlib import Path
from megarl.observe.journal import Journal
journal = Journal(Path({str(tmp_path / "lines")!r}))
resource.setrlimit(resource.RLIMIT_FSIZE, (25, resource.RLIM_INFINITY))
for number in range(4):
    journal.append([f"line {{number:04d}}"])
print(Path(journal.path).read_text())
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
journal.append(["the last"])
journal.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "line 0000\nline 0001\nline \n"
    assert done.stderr.count("waits in memory") == 1 and "File too large" in done.stderr
    lines = (tmp_path / "lines").read_text().split("\n")
    assert lines == ["line 0000", "line 0001", "line 0002", "line 0003", "the last", ""]


def test_output_that_the_disk_does_not_take_is_said_later(tmp_path: Path) -> None:
    """Unbuffered, into a file of at most 12 bytes, and then of any number."""
    code = """
import resource, sys
from megarl.observe.journal import Output
sys.stdout = Output(sys.stdout)
resource.setrlimit(resource.RLIMIT_FSIZE, (12, resource.RLIM_INFINITY))
for number in range(4):
    print(f"line {number}", flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print("the last", flush=True)
"""
    with (tmp_path / "out").open("w") as out:
        done = subprocess.run([sys.executable, "-u", "-c", code], stdout=out, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 0 and done.stderr == b""
    lines = (tmp_path / "out").read_text().split("\n")
    assert lines[0] == "line 0" and lines[-2:] == ["the last", ""]
    assert any("characters could not be written here" in line for line in lines)


def test_a_broken_metrics_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: not a metrics record"):
        read_metrics(path)


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "run", PLAIN_LOGGER, {}, is_writer=False)
    log.log(1, {"reward/mean": 0.5})
    log.close()
    assert not (tmp_path / "run").exists()
    out = io.StringIO()
    console = Console(is_writer=False, file=out)
    console.step(1, 2, {"reward/mean": 0.5})
    console.note("hello")
    assert out.getvalue() == ""
    console.error("rank 1 died in generate")
    assert "rank 1 died in generate" in out.getvalue()


def test_missing_wandb_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # import fails, as without the package
    logger = SimpleNamespace(wandb_enabled=True, project="megarl", name=None)
    with pytest.raises(RuntimeError, match="pip install wandb"):
        MetricsLog(tmp_path, logger, {}, is_writer=True)


def test_step_line_shows_what_the_step_has() -> None:
    grpo = {"reward/mean": 0.5234, "actor/loss": -0.01, "val/accuracy": 0.61, "response_length/mean": 21.25}
    assert step_line(7, 40, grpo) == "step  7/40  reward 0.523  val 61.0%  length 21.2"
    sft = {"actor/loss": 1.25, "perf/throughput": 5321.4, "timing_s/step": 0.5}
    assert step_line(7, 9, sft) == "step 7/9  loss 1.2500  tok/s/rank 5,321  time 0.50s"


def test_plain_files_get_one_line_a_step_without_escapes() -> None:
    out = io.StringIO()
    console = Console(is_writer=True, file=out)
    for step in (1, 2):
        console.status("generate")
        console.step(step, 40, {"reward/mean": 0.5, "gen_kl_error": 1.5e-7, "timing_s/step": 2.0})
    console.close()
    # 39 and 38 steps left at 2 seconds each
    assert out.getvalue().splitlines() == [
        "step  1/40  reward 0.500  mismatch 1.5e-07  time 2.00s  ETA 1m18s",
        "step  2/40  reward 0.500  mismatch 1.5e-07  time 2.00s  ETA 1m16s",
    ]


def test_a_terminal_gets_a_line_that_is_rewritten() -> None:
    out = io.StringIO()
    console = Console(is_writer=True, file=out, force_terminal=True)
    console.status("generate")
    console.step(1, 2, {"reward/mean": 0.5, "timing_s/step": 2.0})
    console.step(2, 2, {"reward/mean": 0.6, "timing_s/step": 2.0})
    console.close()
    text = out.getvalue()
    assert "generate" in text and "━" in text and "\r\x1b[2K" in text
    assert "1/2  ETA 2s" in text and text.endswith("\r\x1b[2K")


def test_header_and_table() -> None:
    cfg = SimpleNamespace(
        algorithm="grpo",
        run=SimpleNamespace(root="runs", name="demo", seed=7),
        model=SimpleNamespace(path="models/tiny", dtype="fp32"),
        data=SimpleNamespace(path="train.jsonl"),
        train=SimpleNamespace(train_global_batch_size=256),
        rollout=SimpleNamespace(num_prompts_per_step=32, num_generations_per_prompt=8),
    )
    out = io.StringIO()
    console = Console(is_writer=True, file=out)
    console.header(cfg, "2 ranks: TP 2")
    console.table("Result", [("accuracy", "40.0% → 90.0%"), ("[seconds]", "1.0")])
    text = out.getvalue()
    for part in ("runs/demo", "models/tiny (fp32)", "2 ranks: TP 2", "32 prompts x 8 a step, 256 sequences per update"):
        assert part in text
    assert "40.0% → 90.0%" in text and "[seconds]" in text  # cells are text, not markup


def test_durations() -> None:
    assert [format_duration(s) for s in (0.4, 59, 185, 7620)] == ["0s", "59s", "3m05s", "2h07m"]


def test_summary_says_before_and_after() -> None:
    rows = dict(summary(records()))
    assert rows["held-out accuracy, before → after"] == "40.0% → 90.0%"
    assert rows["held-out accuracy, best"] == "90.0% (step 20)"
    assert rows["reward, first → last step"] == "0.425 → 0.900"
    assert rows["tokens/s per rank, whole step"] == "1,000"
    # the mean of 2e-7 * (1..20)
    assert rows["train/rollout log-prob mismatch (gen_kl_error)"] == "2.1e-06 mean, 4.0e-06 worst"
    sft = dict(summary([{"step": 1, "actor/loss": 2.0}, {"step": 2, "actor/loss": 0.5}]))
    assert sft == {"loss, first → last step": "2.0000 → 0.5000"}


def test_phase_shares_are_of_the_whole_run() -> None:
    # 20 steps of 2 s and a validation of 2 s: 42 s, of which generate has 20 and train 10
    assert phase_rows(records()) == [
        ("seconds: generate", "1.00 (48%)"),
        ("seconds: train", "0.50 (24%)"),
        ("seconds: validate", "2.00 (5%)"),
        ("seconds: whole step", "2.00 (95%), 20 steps"),
        ("seconds: whole run", "42.00"),
    ]


def test_phases_beside_the_step_have_shares_below_one() -> None:
    # 60 s of loading, two steps of 1 s, 20 s of saving beside the second: 82 s
    data: list[dict[str, Any]] = [
        {"step": 1, "timing_s/load": 60.0, "timing_s/step": 1.0, "timing_s/train": 1.0, "timing_s/total": 61.0},
        {"step": 2, "timing_s/save": 20.0, "timing_s/step": 1.0, "timing_s/train": 1.0, "timing_s/total": 21.0},
    ]
    assert phase_rows(data) == [
        ("seconds: load", "60.00 (73%)"),
        ("seconds: save", "20.00 (24%)"),
        ("seconds: train", "1.00 (2%)"),
        ("seconds: whole step", "1.00 (2%), 2 steps"),
        ("seconds: whole run", "82.00"),
    ]


def test_phases_inside_others_are_counted_once() -> None:
    inner = {"timing_s/validate": 4.0, "timing_s/validate/generate": 3.0}
    assert recorded_seconds([{"step": 0, **inner}]) == 4.0  # without a total
    assert recorded_seconds([{"step": 1, "timing_s/step": 5.0, **inner}]) == 5.0
    assert dict(phase_rows([{"step": 0, **inner}]))["seconds: validate/generate"] == "3.00 (75%)"


def test_no_time_is_no_division_by_zero() -> None:
    assert phase_rows([]) == [] == phase_rows([{"step": 1, "reward/mean": 1.0}])
    assert phase_rows([{"step": 1, "timing_s/train": 0.0}])[0] == ("seconds: train", "0.00 (-)")


def test_held_out_rows() -> None:
    data: list[dict[str, Any]] = [
        {"step": 0, "val/accuracy": 0.5, "val/reward": 0.7, "val/errors": 0},
        {"step": 4, "val/accuracy": 0.75, "val/reward": 0.9, "val/errors": 3},
    ]
    rows = dict(summary(data))
    assert rows["held-out reward, before → after"] == "0.700 → 0.900"
    assert rows["held-out samples that could not be scored"] == "3"
    same = dict(summary([record | {"val/reward": record["val/accuracy"], "val/errors": 0} for record in data]))
    assert list(same) == ["held-out accuracy, before → after", "held-out accuracy, best"]


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (records(), "reward.png"),
        ([{"step": 1, "actor/loss": 2.0}, {"step": 2, "actor/loss": math.nan}], "loss.png"),
        ([], "loss.png"),
    ],
)
def test_the_picture_is_a_png(tmp_path: Path, data: list[dict[str, Any]], name: str) -> None:
    assert picture_name(data) == name
    plot_rewards(data, tmp_path / name, title="demo")
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_run_s_folder_and_its_table(new_run: Callable[..., Run], capsys: pytest.CaptureFixture[str]) -> None:
    run = new_run()
    with run.phase("load"):
        run.dropped({"overlong": 3, "bad_record": 0}, kept=7470)
    with run.phase("validate"):
        pass
    run.report(0, 1, {"val/accuracy": 0.5})
    with run.phase("step"):
        with run.phase("generate"):
            pass
        with run.phase("train"):
            pass
    run.report(1, 1, {"reward/mean": 0.75, "response_length/mean": 4.0}, lengths=[8, 10], epochs=2)
    with run.phase("save"):
        pass
    run.finish()
    before, after = read_metrics(run.dir)
    assert (before["data/dropped_overlong"], before["data/dropped_bad_record"]) == (3, 0)
    assert "timing_s/load" in before and "data/dropped_overlong" not in after
    assert after["reward/mean"] == 0.75 and after["timing_s/save"] > 0  # the save came after the report
    assert after["timing_s/total"] == pytest.approx(after["timing_s/step"] + after["timing_s/save"])
    assert after["perf/generate_tokens_per_s"] == pytest.approx(2 * 4.0 / after["timing_s/generate"] / 2)
    assert (run.dir / "reward.png").exists() and (run.dir / "config.yaml").exists()
    text = capsys.readouterr().out
    assert "data: 7,470 records; dropped 3 overlong\n" in text and "before training: held-out accuracy 50.0%" in text
    assert "grpo · demo · 1 step, " in text and "seconds: save" in text


def test_a_save_after_the_last_report_adds_to_the_one_in_it(new_run: Callable[..., Run], clock: Clock) -> None:
    run = new_run("algorithm=sft")
    for phase, seconds in (("save", 3.0), ("step", 2.0)):  # the save of the step before
        with run.phase(phase):
            clock.now += seconds
    run.report(2, 2, {"actor/loss": 1.0})
    with run.phase("save"):
        clock.now += 4.0
    run.finish()
    (record,) = read_metrics(run.dir)
    assert (record["timing_s/save"], record["timing_s/total"], record["timing_s/step"]) == (7.0, 9.0, 2.0)
    assert (run.dir / "loss.png").exists() and not (run.dir / "reward.png").exists()


def test_every_epoch_counts_as_work(new_run: Callable[..., Run], clock: Clock) -> None:
    used = []
    for epochs in (1, 4):
        run = new_run(device="NVIDIA H100 80GB HBM3")
        with run.phase("step"), run.phase("train"):
            clock.now += 2.0
        run.report(1, 1, {}, lengths=[3, 1], epochs=epochs)
        run.finish()
        (record,) = read_metrics(run.dir)
        used.append(record["perf/mfu"])
    assert used[0] == pytest.approx(3 * (2 * 1232 * 4 + 320) / (2.0 * 2 * 989e12))  # tests/test_flops.py; 2 s, 2 GPUs
    assert used[1] == pytest.approx(4 * used[0])


def test_a_clock_that_is_set_moves_no_time_limit(new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run, now = new_run(), time.time()
    before = run.seconds()
    for jump in (-86400, 86400):
        monkeypatch.setattr(time, "time", lambda jump=jump: now + jump)
        assert 0 <= run.seconds() - before < 10


def test_no_event_is_lost(new_run: Callable[..., Run], capsys: pytest.CaptureFixture[str]) -> None:
    run = new_run()
    run.dropped({"overlong": 0}, kept=12)
    errors = [f"prompt {i}: ZeroDivisionError" for i in range(7)]
    run.events(1, [])
    assert not (run.dir / "events.jsonl").exists()
    run.events(1, errors)
    run.events(2, ["prompt 9: hung"])
    new_run(rank=1).events(2, ["prompt 9: hung"])  # all ranks report, one writes
    lines = [json.loads(line) for line in (run.dir / "events.jsonl").read_text().splitlines()]
    expected = [(1, error) for error in errors] + [(2, "prompt 9: hung")]
    assert [(line["step"], line["event"]) for line in lines] == expected
    text = capsys.readouterr().out
    assert "data: 12 records\n" in text
    assert "prompt 4" in text and "prompt 5" not in text and f"2 more, all of them in {run.dir}/events.jsonl" in text
    run.log.close()


def test_an_earlier_run_is_set_aside_under_a_number_that_is_free(new_run: Callable[..., Run], tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "demo"
    for name in ("earlier-1", "earlier-3", "earlier-old", "hf/final"):  # earlier-2 was deleted
        (folder / name).mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.1}\n')
    (folder / "events.jsonl").write_text("{}\n")
    run = new_run()
    run.log.close()
    assert read_metrics(run.dir) == []
    assert sorted(file.name for file in (folder / "earlier-4").iterdir()) == ["events.jsonl", "hf", "metrics.jsonl"]
    assert not (folder / "hf").exists() and not (folder / "events.jsonl").exists()


def test_a_model_that_the_run_starts_from_stays_where_it_is(new_run: Callable[..., Run], tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "demo"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    new_run(model=folder / "hf" / "final").log.close()
    assert (folder / "hf" / "final" / "config.json").exists()
    assert (folder / "earlier-1" / "metrics.jsonl").exists() and not (folder / "earlier-1" / "hf").exists()


def test_mfu_knows_gpus_and_admits_the_rest() -> None:
    assert mfu(989e12, 2.0, "NVIDIA H100 80GB HBM3") == pytest.approx(0.5)
    assert mfu(989e12, 1.0, "NVIDIA H200", devices=4) == pytest.approx(0.25)
    assert mfu(756e12, 1.0, "NVIDIA H100 PCIe") == pytest.approx(1.0)
    assert mfu(1e12, 1.0, None) is None and mfu(1e12, 1.0, "GeForce") is None
    assert tokens_per_second_per_device(8000, 2.0, 4) == 1000.0
