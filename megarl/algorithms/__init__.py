"""Training loops, one a file, each to be read as its algorithm. They are functions of (config, run, mesh)."""

from collections.abc import Callable

from megarl.algorithms import grpo, sft
from megarl.config import Config
from megarl.observe.run import Run
from megarl.parallel.mesh import Mesh

ALGORITHMS: dict[str, Callable[[Config, Run, Mesh], None]] = {"sft": sft.train, "grpo": grpo.train}
