"""What every rank runs: ``torchrun ... -m megarl.train recipe.yaml [key=value ...]``.

Loads the config (exit code 2 with every problem listed, before any process group), joins the mesh, runs the algorithm,
and leaves with all ranks: exit code 0 when the run is done, 75 when it was told to stop, saved, and has more to do. A
rank that fails says who and where it is, and which ranks it was perhaps waiting for.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from megarl.config import Config, ConfigError, load
from megarl.launch import SAVED
from megarl.observe.journal import Output

EXIT_CONFIG = 2
EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: saved and stopped before the end; start it again to go on


def main(argv: list[str]) -> int:
    try:
        cfg = load(argv)
    except ConfigError as problems:
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            print(problems, file=sys.stderr)
        return EXIT_CONFIG
    return run(cfg)


def run(cfg: Config) -> int:
    """Train on this rank; the exit code."""
    # Imported here: these cost seconds, which a wrong config should not.
    from megarl.algorithms import ALGORITHMS
    from megarl.checkpoint.folder import Broken
    from megarl.checkpoint.resume import find
    from megarl.data.reading import DataError
    from megarl.environments.making import EnvironmentProblem
    from megarl.losses.mismatch import MismatchError
    from megarl.model.engine import NonFiniteError
    from megarl.observe.lock import FolderInUse
    from megarl.observe.run import Run
    from megarl.parallel.mesh import RendezvousError, build_mesh, device_name
    from megarl.parallel.watchdog import Watchdog, die_with_parent
    from megarl.rewards import RewardError
    from megarl.rollout.table import EmptyStepError
    from megarl.rollout.vllm_engine import RolloutError
    from megarl.weights.hf_files import CheckpointError

    # What their sentences say is all there is to say: a traceback would only bury it.
    told: tuple[type[BaseException], ...] = (DataError, CheckpointError, RewardError, MismatchError, NonFiniteError)
    told += (EmptyStepError, RolloutError, EnvironmentProblem, FolderInUse, Broken)
    die_with_parent()
    try:
        mesh = build_mesh(cfg)
    except RendezvousError as error:
        print(f"rank {os.environ['RANK']}: {error}", file=sys.stderr)
        return 1
    watchdog = Watchdog(cfg.run.deadline_s, Path(cfg.run.root) / cfg.run.name / "hangs")
    try:
        resumed = find(cfg, mesh)
        name = device_name(mesh.device)
        run = Run(cfg, mesh.rank, mesh.world_size, mesh.describe(), name, watchdog, resumed)
        ALGORITHMS[cfg.algorithm](cfg, run, mesh)
        run.finish()
        if run.stopped is not None:  # said while all are here: srun ends those that are left
            if saved := os.environ.get(SAVED):
                Path(saved).touch()
            if mesh.rank == 0:
                print(f"{run.stopped}. Exit code {EXIT_REQUEUE}: the same command goes on from there", file=sys.stderr)
        mesh.close()
    except BaseException as error:
        if not isinstance(error, told):
            traceback.print_exc()
        watchdog.report_error(error)
        # Interpreter exit would wait for collectives of the others; the launcher ends them when it sees this one gone.
        os._exit(1)
    watchdog.close()
    return 0 if run.stopped is None else EXIT_REQUEUE


if __name__ == "__main__":
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)  # type: ignore[assignment]
    sys.exit(main(sys.argv[1:]))
