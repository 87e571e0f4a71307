"""The job: its name and length, its machines, what it writes and where it logs."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RunConfig:
    name: str = "run"
    """Name of the run: the folder under `root` that holds everything it writes."""
    root: str = "runs"
    """Folder that holds the runs; made when missing."""
    seed: int = 1234
    """Seed of the order of the data, of sampling and of dropout; weights always come from a checkpoint."""
    max_num_steps: int | None = None
    """Stop after this many steps; null goes by `max_num_epochs` alone."""
    max_num_epochs: int = 1
    """Stop after this many passes over the data."""
    deadline_s: float = 1800.0
    """Longest time in seconds that a rank may stay in one phase or collective before it ends the job with an error."""


@dataclass(frozen=True)
class ClusterConfig:
    num_nodes: int = 1
    """Number of machines."""
    gpus_per_node: int = 1
    """Ranks on each machine, one for a GPU; where there is no GPU, CPU processes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes CUDA when torch finds a GPU."""


@dataclass(frozen=True)
class CheckpointConfig:
    save_period: int = 0
    """Steps between Hugging Face exports of the policy; 0 means none in between."""
    save_at_end: bool = True
    """Export the policy after the last step."""


@dataclass(frozen=True)
class LoggerConfig:
    wandb_enabled: bool = False
    """Log to Weights & Biases too; metrics.jsonl and TensorBoard files are always written."""
    project: str = "megarl"
    """Weights & Biases project."""
    name: str | None = None
    """Weights & Biases name of the run; null means `run.name`."""
