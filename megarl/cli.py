"""The `megarl` command. Each subcommand imports its work when it runs, so that `megarl --help` costs nothing.

Exit codes: 0 done, 1 the work failed, 2 the command or the config is wrong (nothing was started), 75 `megarl train` was
told to stop, has saved, and has more to do.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megarl import __version__
from megarl.convert.commands import add_arguments as add_convert_arguments

if TYPE_CHECKING:
    from megarl.config import Config

RECIPE_HELP = "YAML file that says how the run differs from the defaults"
CONVERT_HELP = "checkpoints between Hugging Face and Megatron: convert, compare, describe"
OVERRIDE_HELP = "settings over the recipe's, such as rollout.temperature=0.8"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = _parsed(argv)
    return int(args.command(args))


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Settings may stand behind options too, where argparse by itself does not take them."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    strange = [word for word in rest if "overrides" not in args or word.startswith("-") or "=" not in word]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if rest:
        args.overrides += rest
    return args


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
    serve_parser = add("serve", serve, "start vLLM servers for a recipe with rollout.mode=remote, and keep them alive")
    serve_parser.add_argument("recipe", metavar="RECIPE", help=RECIPE_HELP)
    serve_parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=OVERRIDE_HELP)
    serve_parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    serve_parser.add_argument("--first-gpu", type=int, default=0, help="first of the GPUs to use (default 0)")
    _add_submit(add("submit", submit, "check a recipe, and queue it as a Slurm job that goes on until it is done"))
    resume_parser = add("verify-resume", verify_resume, "prove that a recipe, with a tiny model, resumes bit for bit")
    resume_parser.add_argument("recipe", metavar="RECIPE", help=RECIPE_HELP)
    resume_parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=OVERRIDE_HELP)
    resume_parser.add_argument("--steps", type=int, default=4, help="steps of each run; the stop is half-way")
    resume_parser.add_argument("--max-ranks", type=int, default=8, help="most processes to start (default 8)")
    verify_parser = add(
        "verify", verify, "prove that a recipe's layout, with a tiny model, computes what one rank does"
    )
    verify_parser.add_argument("recipe", metavar="RECIPE", help=RECIPE_HELP)
    verify_parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=OVERRIDE_HELP)
    verify_parser.add_argument("--max-ranks", type=int, default=8, help="most processes to start (default 8)")
    verify_parser.add_argument("--tolerance", type=float, default=1e-5, help="largest difference that agrees")
    verify_parser.add_argument("--no-vllm", action="store_true", help="leave vLLM out of the comparison")
    plan_parser = add("plan", plan, "say what a recipe takes of each GPU's memory, by formulas, and whether it fits")
    plan_parser.add_argument("recipe", metavar="RECIPE", help=RECIPE_HELP)
    plan_parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=OVERRIDE_HELP)
    plan_parser.add_argument("--gpu-gb", type=float, default=80.0, help="memory of a GPU in GB (default 80)")
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
        _serve_beside(cfg, args)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, command)


def _serve_beside(cfg: "Config", args: argparse.Namespace) -> None:
    """Start `megarl serve` for a run on one machine that wants servers, as a child of what becomes torchrun."""
    from megarl.config.remote import engines_beside

    if not engines_beside(cfg):
        return
    folder = Path(cfg.run.root) / cfg.run.name / "engines"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "megarl", "serve", args.recipe, *args.overrides]
    command.append(f"--first-gpu={cfg.cluster.gpus_per_node}")
    with (folder / "serve.log").open("ab") as log:
        # A session of its own: Ctrl-C is for the ranks, which need engines to the end of their step.
        subprocess.Popen(
            command,
            env=os.environ | {"MEGARL_LAUNCHER": str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def serve(args: argparse.Namespace) -> int:
    """Keep a recipe's servers alive until told to stop."""
    cfg = _load(args)
    if cfg is None:
        return 2
    if cfg.rollout.mode != "remote":
        print("megarl serve: the recipe has rollout.mode=colocated, whose engines are in the trainer", file=sys.stderr)
        return 2
    from megarl.rollout.serve import serve as keep

    return keep(cfg, host=args.host, first_gpu=args.first_gpu)


def _add_submit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help=RECIPE_HELP)
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=OVERRIDE_HELP)
    parser.add_argument("--nodes", type=int, help="number of nodes; the recipe's cluster.num_nodes without it")
    parser.add_argument("--time", help="time limit of each start, such as 4:00:00")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--exclude", help="nodes not to use")
    parser.add_argument("--grace", type=int, default=300, help="seconds before the limit at which ranks begin to save")
    parser.add_argument("--chain", type=int, default=1, help="queue it so many times in a row, where requeue is off")
    parser.add_argument("--sweep", action="append", default=[], metavar="KEY=V1,V2", help="an array of runs")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="an option of sbatch's, as --sbatch=--qos=high"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the script, and queue nothing")


def submit(args: argparse.Namespace) -> int:
    """Print or queue the job of a recipe."""
    from megarl.submit import Job, SubmitError, script
    from megarl.submit import submit as queue

    own = [*args.overrides, *([f"cluster.num_nodes={args.nodes}"] if args.nodes else [])]
    cfg = _load(argparse.Namespace(recipe=args.recipe, overrides=own), check_model=False)
    if cfg is None:
        return 2
    job = Job(
        nodes=cfg.cluster.num_nodes,
        time=args.time,
        partition=args.partition,
        account=args.account,
        exclude=args.exclude,
        grace=args.grace,
        chain=args.chain,
        sweep=tuple(args.sweep),
        sbatch=tuple(args.sbatch),
    )
    recipe = str(Path(args.recipe).resolve())
    try:
        if args.dry_run:
            print(script(cfg, job, recipe, args.overrides), end="")
        else:
            print(queue(cfg, job, recipe, args.overrides))
    except SubmitError as error:
        print(f"megarl submit: {error}", file=sys.stderr)
        return 2
    return 0


def verify_resume(args: argparse.Namespace) -> int:
    """Run the recipe's shrunk twin straight, and with a stop half-way, and compare every number."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from megarl.checkpoint.verify import verify

    cfg = _load(args, check_model=False)
    return 2 if cfg is None else verify(cfg, args.steps, args.max_ranks)


def config(args: argparse.Namespace) -> int:
    """Print the resolved config as YAML."""
    from omegaconf import OmegaConf

    cfg = _load(args, check_model=not args.elsewhere)
    if cfg is None:
        return 2
    print(OmegaConf.to_yaml(OmegaConf.structured(cfg)), end="")
    return 0


def verify(args: argparse.Namespace) -> int:
    """Compare the recipe's layout with one rank, and the model with transformers and vLLM."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from megarl.verify.command import verify as compare

    recipe = [args.recipe, *args.overrides]
    return compare(recipe, max_ranks=args.max_ranks, tolerance=args.tolerance, vllm=not args.no_vllm)


def plan(args: argparse.Namespace) -> int:
    """Print the memory of the recipe's fullest rank; 1 where it does not fit. Needs the model's config.json."""
    from rich.console import Console
    from rich.table import Table

    from megarl.config.machine import check_model
    from megarl.model.family import read_spec
    from megarl.plan import plan as memory
    from megarl.plan import rows_of, too_much

    cfg = _load(args, check_model=False)
    if cfg is None:
        return 2
    if wrong := [problem.text for problem in check_model(cfg)]:
        print("megarl plan: " + "\n  ".join(wrong), file=sys.stderr)
        return 2
    found = memory(cfg, read_spec(cfg.model.path))
    table = Table("GB of the fullest GPU", "")
    for row in rows_of(found, cfg, args.gpu_gb):
        table.add_row(*row)
    Console().print(table)
    for reason in too_much(found, cfg, args.gpu_gb):
        print(f"does not fit: {reason}", file=sys.stderr)
    return bool(too_much(found, cfg, args.gpu_gb))


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
    launcher = ["-m", "megarl.launch", "--standalone", "--local-addr=127.0.0.1", shutdown(cfg)]
    return [*launcher, f"--nproc-per-node={cfg.cluster.gpus_per_node}", *ranks]


def shutdown(cfg: "Config") -> str:
    """torchrun's option of how long ranks that were told to stop have to finish their step and save."""
    return f"--shutdown-timeout={cfg.run.stop_grace_s:.0f}"


def multi_node_advice(cfg: "Config", recipe: str, overrides: Sequence[str]) -> str:
    """The lines that start a job of several machines, which nobody can start from one of them alone."""
    nodes, per_node = cfg.cluster.num_nodes, cfg.cluster.gpus_per_node
    rendezvous = f"--rdzv-backend=c10d --rdzv-id={shlex.quote(cfg.run.name)} --rdzv-endpoint"
    launch = f"python -m megarl.launch --nnodes={nodes} --nproc-per-node={per_node} {shutdown(cfg)} {rendezvous}"
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
