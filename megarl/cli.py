"""The `megarl` command. Each subcommand imports its work when it runs, so that `megarl --help` costs nothing.

Exit codes: 0 done, 1 the work failed, 2 the command or the config is wrong (nothing was started).
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megarl import __version__
from megarl.convert.commands import add_arguments as add_convert_arguments

if TYPE_CHECKING:
    from megarl.config import Config

RECIPE_HELP = "YAML file that says how the run differs from the defaults"
# A rank that is told to stop says within seconds what it was waiting for; a frozen one is not worth waiting for.
SHUTDOWN = "--shutdown-timeout=15"
CONVERT_HELP = "checkpoints between Hugging Face and Megatron: convert, compare, describe"
OVERRIDE_HELP = "settings over the recipe's, such as rollout.temperature=0.8"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = _parser().parse_args(argv)
    return int(args.command(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megarl", description="LLM post-training with Megatron-core and vLLM.")
    parser.add_argument("--version", action="version", version=f"megarl {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    train_parser = add("train", train, "check a recipe, then start its ranks on this machine and train")
    config_parser = add("config", config, "check a recipe and print every setting it leads to")
    for sub in (train_parser, config_parser):
        sub.add_argument("recipe", metavar="RECIPE", help=RECIPE_HELP)
        sub.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=OVERRIDE_HELP)
    config_parser.add_argument(
        "--elsewhere", action="store_true", help="leave out what needs this machine: model and data files, CUDA"
    )
    add("doctor", doctor, "say what is installed, what its absence switches off, and whether training can run")
    report_parser = add("report", report, "summarise a run's metrics.jsonl and draw its reward curve")
    convert_parser = commands.add_parser("convert", help=CONVERT_HELP, description=CONVERT_HELP)
    add_convert_arguments(convert_parser)
    report_parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="folder of a run, such as runs/quickstart")
    return parser


def train(args: argparse.Namespace) -> int:
    """Become the ranks (under a launcher) or torchrun (otherwise), once the config is known to be good."""
    cfg = _load(args)
    if cfg is None:
        return 2
    from megarl.config import launched_world_size

    launched = launched_world_size() is not None
    if cfg.cluster.num_nodes > 1 and not launched:
        print(multi_node_advice(cfg, args.recipe, args.overrides), file=sys.stderr)
        return 2
    if cfg.cluster.device != "cuda":
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks share the cores: more threads would fight for them
    ranks = rank_arguments(args.recipe, args.overrides)
    # Replacing this process leaves no signal and no exit code to be passed on.
    command = [sys.executable, *(ranks if launched else torchrun_arguments(cfg, ranks))]
    if not launched:
        # It also keeps the process id: a rank with another parent knows that torchrun died before it could ask.
        os.environ["MEGARL_LAUNCHER"] = str(os.getpid())
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, command)


def config(args: argparse.Namespace) -> int:
    """Print the resolved config as YAML."""
    from omegaconf import OmegaConf

    cfg = _load(args, check_model=not args.elsewhere)
    if cfg is None:
        return 2
    print(OmegaConf.to_yaml(OmegaConf.structured(cfg)), end="")
    return 0


def doctor(args: argparse.Namespace) -> int:
    """Print the doctor's tables."""
    from megarl.doctor import run_doctor

    return run_doctor()


def report(args: argparse.Namespace) -> int:
    """Print a run's summary table and save its reward curve beside the metrics."""
    from rich.console import Console
    from rich.table import Table

    from megarl.observe.metrics import METRICS_FILE, read_metrics
    from megarl.observe.report import picture_name, plot_rewards, summary

    metrics = args.run_dir / METRICS_FILE
    if not metrics.is_file():
        print(f"megarl report: there is no {metrics}; give the folder of a run", file=sys.stderr)
        return 2
    records = read_metrics(metrics)
    if not records:
        print(f"megarl report: {metrics} has no step yet", file=sys.stderr)
        return 1
    table = Table(title=str(args.run_dir), show_header=False)
    for what, value in summary(records):
        table.add_row(what, value)
    console = Console()
    console.print(table)
    picture = args.run_dir / picture_name(records)
    plot_rewards(records, picture, title=args.run_dir.name)
    console.print(f"curve: {picture}")
    return 0


def _load(args: argparse.Namespace, *, check_model: bool = True) -> "Config | None":
    """The config, or None after printing everything that is wrong with it."""
    from megarl.config import ConfigError, load

    try:
        return load([args.recipe, *args.overrides], check_model=check_model)
    except ConfigError as error:
        print(f"megarl: {error}", file=sys.stderr)
        return None


def rank_arguments(recipe: str, overrides: Sequence[str]) -> list[str]:
    """What Python is called with on every rank."""
    return ["-m", "megarl.train", recipe, *overrides]


def torchrun_arguments(cfg: "Config", ranks: list[str]) -> list[str]:
    """What Python is called with to start all ranks of one machine."""
    # --standalone picks a free port; the local address spares machines whose own name does not resolve.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", SHUTDOWN]
    return [*launcher, f"--nproc-per-node={cfg.cluster.gpus_per_node}", *ranks]


def multi_node_advice(cfg: "Config", recipe: str, overrides: Sequence[str]) -> str:
    """The lines that start a job of several machines, which nobody can start from one of them alone."""
    nodes, per_node = cfg.cluster.num_nodes, cfg.cluster.gpus_per_node
    rendezvous = f"--rdzv-backend=c10d --rdzv-id={shlex.quote(cfg.run.name)} --rdzv-endpoint"
    launch = f"torchrun --nnodes={nodes} --nproc-per-node={per_node} {SHUTDOWN} {rendezvous}"
    # Without the flag srun lets the other nodes wait for one whose ranks have failed, until their own deadline.
    srun = f"srun --kill-on-bad-exit=1 --nodes={nodes} --ntasks-per-node=1"
    ranks = shlex.join(rank_arguments(recipe, overrides))
    return (
        f"megarl: the recipe asks for {nodes} nodes x {per_node} ranks; `megarl train` starts those of one machine.\n"
        f"On every node, with HEAD the name of one of them:\n"
        f"  {launch}=HEAD:29500 {ranks}\n"
        f"or in a Slurm allocation:\n"
        f"  HEAD=$(scontrol show hostnames | head -n 1)\n"
        f"  {srun} {launch}=$HEAD:29500 {ranks}"
    )
