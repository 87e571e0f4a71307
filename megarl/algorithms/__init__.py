"""Training loops, one a file, each to be read as its algorithm. They are functions of (config, run, mesh)."""

from collections.abc import Callable

from megarl.algorithms import grpo, ppo, preference, remax, sft, unpaired
from megarl.config import Config
from megarl.observe.run import Run
from megarl.parallel.mesh import Mesh

ALGORITHMS: dict[str, Callable[[Config, Run, Mesh], None]] = {
    "sft": sft.train,
    "preference": preference.train,
    "unpaired": unpaired.train,
    "grpo": grpo.train,
    "ppo": ppo.train,
    "remax": remax.train,
}
