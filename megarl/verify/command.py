"""``megarl verify RECIPE``: does this layout of this family compute what one rank computes, and what transformers and
vLLM compute? Its ranks are processes of this machine, on its GPUs where there are enough, else on CPU."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import signal
import sys
import tempfile
import time
import traceback
from multiprocessing.queues import Queue
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from megarl.config import Config, ConfigError, load, save
from megarl.config.machine import count_gpus
from megarl.parallel.ports import free_port
from megarl.verify.shrink import as_truth, left_out, one_rank, small_layout, small_recipe, write_models

if TYPE_CHECKING:
    from megarl.verify.measure import Difference

_RANKS_MINUTES = 30.0
_ONE, _ALL = "one", "all"


def verify(recipe: list[str], *, max_ranks: int, tolerance: float, vllm: bool) -> int:
    """Print the table. Returns 0 if everything agrees, 1 if not, 2 for a recipe that cannot be tried."""
    console = Console()
    try:
        cfg = load(recipe, check_model=False)
        hf = json.loads((Path(cfg.model.path) / "config.json").read_text())
        layout = small_layout(cfg, max_ranks)
    except FileNotFoundError as error:
        print(f"megarl verify: {error}; of the model its config.json is enough", file=sys.stderr)
        return 2
    except (ConfigError, ValueError) as error:
        print(f"megarl verify: {error}", file=sys.stderr)
        return 2
    # One device for both: differences between two kinds are none of the layout's.
    device = "cuda" if count_gpus(cfg.cluster.device) >= layout.world_size else "cpu"
    with tempfile.TemporaryDirectory(prefix="megarl-verify-") as name:
        folder = Path(name)
        write_models(hf, layout, folder, cfg.run.seed)
        write_recipes(cfg, max_ranks, folder, device)
        try:
            for which in (_ONE, _ALL):
                small = load([str(folder / f"{which}.yaml")])
        except ConfigError as error:
            print(f"megarl verify: made small, the recipe does not hold: {error}", file=sys.stderr)
            return 2
        where = f"{layout.world_size} ranks on {device}"
        console.print(f"{hf['architectures'][0]}, made small, as {layout.describe()} on {where}, {cfg.algorithm}:")
        for line in left_out(cfg, small):
            console.print(f"  left out: {line}", highlight=False)
        references = run_ranks(1, folder, _ONE, tolerance, vllm=vllm)
        differences = run_ranks(layout.world_size, folder, _ALL, tolerance, vllm=False)
    return report(console, references, differences)


def write_recipes(cfg: Config, max_ranks: int, folder: Path, device: str) -> None:
    """``one.yaml`` and ``all.yaml``, what the ranks of the truth and of the layout load."""
    layout = small_layout(cfg, max_ranks)
    (folder / "data.jsonl").touch()
    save(as_truth(small_recipe(cfg, one_rank(layout), folder, device)), folder / f"{_ONE}.yaml")
    save(small_recipe(cfg, layout, folder, device), folder / f"{_ALL}.yaml")


def run_ranks(world: int, folder: Path, which: str, tolerance: float, *, vllm: bool) -> list[Difference]:
    """Differences that the ranks find: of the one rank from transformers and vLLM, of the layout from that rank.

    Raises RuntimeError with the traceback of the rank that failed first, or with what killed it.
    """
    context = multiprocessing.get_context("spawn")
    port = free_port()
    answers: Queue[Any] = context.Queue()
    ranks = [
        context.Process(target=_rank, args=(rank, world, port, folder, which, tolerance, vllm, answers))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    try:
        found, error = _first_answer(answers, ranks)
        if error:
            raise RuntimeError(f"a rank of the layout failed:\n{error}")
        for process in ranks:
            process.join(20)
    finally:
        for process in ranks:
            process.kill()
    rows: list[Difference] = found
    return rows


def _first_answer(answers: Queue[Any], ranks: list[Any]) -> Any:
    """Of any rank. Raises RuntimeError where one has died without an answer, or all are silent for too long."""
    deadline = time.monotonic() + 60 * _RANKS_MINUTES
    while time.monotonic() < deadline:
        # Asked before the queue is: an answer of a rank that ended well is in it by then.
        ended = [(rank, process.exitcode) for rank, process in enumerate(ranks) if process.exitcode is not None]
        try:
            return answers.get(timeout=1.0)
        except queue.Empty:
            if ended:
                rank, code = ended[0]
                how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
                text = f"rank {rank} of {len(ranks)} ended {how} and said nothing"
                raise RuntimeError(f"{text}; SIGKILL is often the kernel's, for lack of memory") from None
    raise RuntimeError(f"the ranks gave no answer within {_RANKS_MINUTES:g} minutes")


def _rank(
    rank: int, world: int, port: int, folder: Path, which: str, tolerance: float, vllm: bool, answers: Queue[Any]
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        import torch

        from megarl.parallel.mesh import build_mesh

        torch.set_num_threads(1)
        cfg = load([str(folder / f"{which}.yaml")])
        mesh = build_mesh(cfg)
        rows = truth(cfg, mesh, folder, vllm=vllm) if which == _ONE else differences(cfg, mesh, folder, tolerance)
        if rank == 0:
            answers.put((rows, None))
        mesh.close()
    except BaseException:  # the process that asked says it
        answers.put((None, f"rank {rank}:\n{traceback.format_exc()}"))
        answers.close()
        answers.join_thread()
        os._exit(1)  # the others' collectives must not be waited for


def truth(cfg: Config, mesh: Any, folder: Path, *, vllm: bool) -> list[Difference]:
    """On one rank: write what the layout is held against, and compare the model with transformers and vLLM."""
    from megarl.verify.cases import cases_of
    from megarl.verify.references import against_transformers, against_vllm
    from megarl.verify.truth import compute

    rows = [against_transformers(cfg, mesh), *([against_vllm(cfg, mesh)] if vllm else [])]
    for number, case in enumerate(cases_of(cfg)):
        compute(cfg, mesh, case).save(folder / f"truth{number}.safetensors")
    return rows


def differences(cfg: Config, mesh: Any, folder: Path, tolerance: float) -> list[Difference]:
    """On every rank of a layout: how far any of them is from `truth`."""
    from megarl.verify.cases import cases_of
    from megarl.verify.measure import Measured, compare, measure, worst_over_ranks

    rows = []
    for number, case in enumerate(cases_of(cfg)):
        expected = Measured.load(folder / f"truth{number}.safetensors")
        rows += compare(case, expected, measure(cfg, mesh, case, expected.outputs), tolerance)
    return worst_over_ranks(rows, mesh)


def report(console: Console, references: list[Difference], differences: list[Difference]) -> int:
    """The table, and 0 if all of it agrees. Gradients are one row a model; those that differ are named below."""
    table = Table("compared", "largest difference", "tolerance", "")
    gradients = [row for row in differences if row.tensor]
    for row in (*references, *(row for row in differences if not row.tensor)):
        _add(table, row, row.what)
    for model in dict.fromkeys(row.what.partition(": ")[0] for row in gradients):
        rows = [row for row in gradients if row.what.startswith(f"{model}: ")]
        worst = max(rows, key=lambda row: row.size)
        _add(table, worst, f"{model}: gradients of {len(rows)} tensors; the worst is {worst.what.partition(': ')[2]}")
    console.print(table)
    wrong = [row for row in (*references, *differences) if not row.agrees]
    if not wrong:
        console.print("all of it agrees with one rank")
        return 0
    tensors = [row for row in wrong if row.tensor]
    first = (tensors or wrong)[0]
    what = f"the first parameter of {len(tensors)} is {first.what}" if tensors else first.what
    console.print(f"DIFFERS: {what}, by {first.difference:.3g}, where {first.tolerance:g} is allowed", soft_wrap=True)
    for row in tensors[1:20]:
        console.print(f"  {row.what}: {row.difference:.3g}", soft_wrap=True)
    return 1


def _add(table: Table, row: Difference, what: str) -> None:
    if row.difference is None:
        table.add_row(what, row.note.splitlines()[0], "", "not compared")
    else:
        table.add_row(what, f"{row.difference:.2e}", f"{row.tolerance:g}", "" if row.agrees else "DIFFERS")
