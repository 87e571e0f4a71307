"""Every knob of a run: nested dataclasses with a sentence under each field, and how they are filled in.

Contract: `load([recipe.yaml, key=value, ...])` merges schema <- YAML <- overrides and returns a frozen `Config`, or
raises `ConfigError` with *every* problem found, before any process group exists. Fields are read as attributes and
never written. A recipe is a short diff from the defaults below; `save` writes the whole of it next to the run's
results. Nothing here imports torch: loading a config takes a fraction of a second.

The sections: `job` (name, machines, files), `model` (with layout and optimizer), `data`, `rollout` (with rewards and
weight sync), `algorithm` (advantages and losses). `reader` fills them in, `values` says what each value may be, and
`checks` what fits together.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from omegaconf import OmegaConf

from megarl.config.algorithm import (
    AdvantageConfig,
    CriticConfig,
    LossConfig,
    PreferenceConfig,
    PrimeConfig,
    TeacherConfig,
    TrainConfig,
)
from megarl.config.checks import check
from megarl.config.data import DataConfig
from megarl.config.job import CheckpointConfig, ClusterConfig, GuardConfig, LoggerConfig, RunConfig
from megarl.config.model import FP8Config, ModelConfig, OffloadConfig, OptimizerConfig, ParallelConfig
from megarl.config.reader import ConfigError, read
from megarl.config.rollout import (
    ResponseLengthConfig,
    RewardConfig,
    RewardFunction,
    RolloutConfig,
    ValidationConfig,
    WeightSyncConfig,
)

__all__ = [
    "AdvantageConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "ConfigError",
    "CriticConfig",
    "DataConfig",
    "FP8Config",
    "GuardConfig",
    "LoggerConfig",
    "LossConfig",
    "ModelConfig",
    "OffloadConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PreferenceConfig",
    "PrimeConfig",
    "ResponseLengthConfig",
    "RewardConfig",
    "RewardFunction",
    "RolloutConfig",
    "RunConfig",
    "TeacherConfig",
    "TrainConfig",
    "ValidationConfig",
    "WeightSyncConfig",
    "launched_world_size",
    "load",
    "save",
    "world_size",
]


@dataclass(frozen=True)
class Config:
    algorithm: Literal[
        "sft",
        "preference",
        "unpaired",
        "reward_model",
        "grpo",
        "ppo",
        "remax",
        "prime",
        "online_dpo",
        "distillation",
    ] = "grpo"
    """Which loop of megarl/algorithms runs."""
    run: RunConfig = field(default_factory=RunConfig)
    """Name, length and seed of the run."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """How many ranks there are, and on what."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The policy."""
    fp8_cfg: FP8Config = field(default_factory=FP8Config)
    """Training in FP8."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the policy is divided over ranks; what remains of the job is data parallel."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its learning rate."""
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    """What leaves the device while it is not used."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Batch sizes."""
    data: DataConfig = field(default_factory=DataConfig)
    """Prompts, responses, preferences, and which of them to take."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Sampling and the vLLM engines."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """What a sample is worth."""
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    """From rewards to advantages."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The policy loss."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """The critic of ppo."""
    prime: PrimeConfig = field(default_factory=PrimeConfig)
    """The implicit process reward model of prime."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The teacher of distillation."""
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    """The loss of preference data."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """When and how held-out accuracy is measured."""
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)
    """From the policy to vLLM, and how far the two may disagree."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When the run is saved, what is kept, and what it resumes from."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """What happens to steps that are not finite, and to jumps."""
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    """Where metrics go besides the run's folder."""


def load(argv: Sequence[str], *, check_model: bool = True) -> Config:
    """The config of `[recipe.yaml, key=value, ...]`, checked; raises ConfigError with all problems at once.

    `check_model=False` leaves out what needs files or devices of this machine: the model's directory, data files, CUDA.
    """
    reading = read(Config, argv)
    cfg: Config = reading.config
    problems = reading.problems + check(cfg, launched_world_size(), reading.refused, this_machine=check_model)
    if problems:
        raise ConfigError(problems)
    return cfg


def save(cfg: Config, path: str | Path) -> None:
    """Write every value, defaults included, as YAML that `load` reads back to the same config."""
    OmegaConf.save(OmegaConf.structured(cfg), path)


def world_size(cfg: Config) -> int:
    """Number of ranks: what the launcher started, or what the recipe asks for when nothing is launched yet."""
    return launched_world_size() or cfg.cluster.num_nodes * cfg.cluster.gpus_per_node


def launched_world_size() -> int | None:
    """Number of ranks that torchrun, or srun by itself, started this process among; None before any launch.

    A batch script has SLURM_PROCID=0 and the job's SLURM_NTASKS without being a rank: srun alone counts the tasks of a
    step. A step of one task is a job started by hand, or the shell of an interactive allocation.
    """
    if world := os.environ.get("WORLD_SIZE"):
        return int(world)
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1)
    return tasks if tasks > 1 and "SLURM_PROCID" in os.environ else None
