"""``megarl verify RECIPE``: does this layout of this family compute what one rank computes, and what transformers and
vLLM compute? Its ranks are processes of this machine, on its GPUs where there are enough, else on CPU."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megarl.config import ClusterConfig, Config, ConfigError, DataConfig, load, save
from megarl.config.machine import count_gpus
from megarl.verify.shrink import SmallLayout, small_layout, write_small_model

_RANKS_MINUTES = 30.0


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
    with tempfile.TemporaryDirectory(prefix="megarl-verify-") as name:
        folder = Path(name)
        write_small_model(hf, layout, folder / "model", cfg.run.seed)
        (folder / "data.jsonl").touch()
        one = SmallLayout(dataclasses.replace(layout.parallel, **_NOT_DIVIDED), dp=1)
        for which, sizes in (("one", one), ("all", layout)):
            save(small_recipe(cfg, sizes, folder), folder / f"{which}.yaml")
        console.print(f"{hf['architectures'][0]}, made small, as {layout.describe()} on {layout.world_size} ranks:")
        references = run_ranks(1, folder, "one", tolerance, vllm=vllm)
        differences = run_ranks(layout.world_size, folder, "all", tolerance, vllm=False)
    return report(console, references, differences)


_NOT_DIVIDED: dict[str, Any] = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "sequence_parallel": False,
    "virtual_pipeline_model_parallel_size": None,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": None,
    "num_layers_in_first_pipeline_stage": None,
    "num_layers_in_last_pipeline_stage": None,
}


def small_recipe(cfg: Config, layout: SmallLayout, folder: Path) -> Config:
    """The recipe with the small model, in fp32, in several microbatches; its loss, its recomputation and its overrides
    of the model as they are. Gradients stay whole on every rank, to be compared."""
    device = "cuda" if count_gpus(cfg.cluster.device) >= layout.world_size else "cpu"
    cp = layout.parallel.context_parallel_size
    return dataclasses.replace(
        cfg,
        cluster=ClusterConfig(num_nodes=1, gpus_per_node=layout.world_size, device=device),
        run=dataclasses.replace(cfg.run, root=str(folder / "runs"), deadline_s=60 * _RANKS_MINUTES),
        model=dataclasses.replace(cfg.model, path=str(folder / "model"), dtype="fp32"),
        parallel=layout.parallel,
        optimizer=dataclasses.replace(cfg.optimizer, use_distributed_optimizer=False, overlap_grad_reduce=False),
        train=dataclasses.replace(
            cfg.train, train_global_batch_size=12, train_mb_tokens=144 // cp, logprob_mb_tokens=144 // cp
        ),
        data=DataConfig(path=str(folder / "data.jsonl"), max_prompt_length=20),
        rollout=dataclasses.replace(
            cfg.rollout,
            max_response_length=40,
            max_model_len=None,
            num_prompts_per_step=6,
            num_generations_per_prompt=2,
            tensor_parallel_size=1,
            max_num_batched_tokens=None,
            quantization=None,
            dtype=None,
        ),
        validation=type(cfg.validation)(),
        critic=dataclasses.replace(cfg.critic, path=None),
    )


def run_ranks(world: int, folder: Path, which: str, tolerance: float, *, vllm: bool) -> list[dict[str, Any]]:
    """Differences that the ranks of one layout find, as rows of the table. Raises RuntimeError with the ranks'
    tracebacks."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    answers: Queue[Any] = context.Queue()
    ranks = [
        context.Process(target=_rank, args=(rank, world, port, folder, which, tolerance, vllm, answers))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    try:
        found, error = answers.get(timeout=60 * _RANKS_MINUTES)
        if error:
            raise RuntimeError(f"a rank of the layout failed:\n{error}")
    finally:
        for process in ranks:
            process.join(20)
            process.kill()
    rows: list[dict[str, Any]] = found
    return rows


def _rank(
    rank: int, world: int, port: int, folder: Path, which: str, tolerance: float, vllm: bool, answers: Queue[Any]
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        from megarl.parallel.mesh import build_mesh
        from megarl.verify.measure import compare, measure, worst_over_ranks
        from megarl.verify.references import against_transformers, against_vllm

        cfg = load([str(folder / f"{which}.yaml")])
        mesh = build_mesh(cfg)
        rows: list[dict[str, Any]] = []
        if which == "one":
            rows.append(against_transformers(cfg, mesh))
            if vllm:
                rows.append(against_vllm(cfg, mesh))
        measured = measure(cfg, mesh)
        if which == "one":
            torch.save(measured, folder / "truth.pt")
        else:
            truth = torch.load(folder / "truth.pt", weights_only=False)  # of the rank before, in our own folder
            mine = compare(truth, measured, tolerance)
            rows = [dataclasses.asdict(row) for row in worst_over_ranks(mine, mesh)]
        if rank == 0:
            answers.put((rows, None))
        mesh.close()
    except BaseException:  # the process that asked says it
        answers.put((None, f"rank {rank}:\n{traceback.format_exc()}"))
        answers.close()
        answers.join_thread()
        os._exit(1)  # the others' collectives must not be waited for


def report(console: Console, references: list[dict[str, Any]], differences: list[dict[str, Any]]) -> int:
    """The table, and 0 if all of it agrees. Gradients are one row, unless some differ: then each of these."""
    table = Table("compared", "largest difference", "tolerance", "")
    wrong = [row for row in (*references, *differences) if not agrees(row)]
    gradients = differences[3:]
    for row in (*references, *differences[:3]):
        _add(table, row)
    worst = max(gradients, key=lambda row: (row["difference"] != row["difference"], row["difference"]))
    _add(table, worst | {"what": f"gradients of {len(gradients)} tensors; the worst is {worst['what']}"})
    console.print(table)
    if not wrong:
        console.print("all of it agrees with one rank")
        return 0
    first = wrong[0]
    console.print(f"DIFFERS, first in {first['what']}: by {first['difference']:.3g}, {first['tolerance']:g} is allowed")
    for row in [row for row in wrong[1:] if row in gradients][:20]:
        console.print(f"  {row['what']}: {row['difference']:.3g}")
    return 1


def agrees(row: dict[str, Any]) -> bool:
    return row["difference"] is None or row["difference"] <= row["tolerance"]


def _add(table: Table, row: dict[str, Any]) -> None:
    if row["difference"] is None:
        table.add_row(row["what"], row["note"], "", "not compared")
    else:
        table.add_row(
            row["what"], f"{row['difference']:.2e}", f"{row['tolerance']:g}", "" if agrees(row) else "DIFFERS"
        )
