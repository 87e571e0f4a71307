"""Training loops, one a file, each to be read as its algorithm. They are functions of (config, run, mesh)."""

from collections.abc import Callable

from megarl.algorithms import (
    distillation,
    grpo,
    online_dpo,
    ppo,
    preference,
    prime,
    remax,
    reward_model,
    sft,
    unpaired,
)
from megarl.config import Config
from megarl.observe.run import Run
from megarl.parallel.mesh import Mesh

ALGORITHMS: dict[str, Callable[[Config, Run, Mesh], None]] = {
    "sft": sft.train,
    "preference": preference.train,
    "unpaired": unpaired.train,
    "reward_model": reward_model.train,
    "grpo": grpo.train,
    "ppo": ppo.train,
    "remax": remax.train,
    "prime": prime.train,
    "online_dpo": online_dpo.train,
    "distillation": distillation.train,
}
