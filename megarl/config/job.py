"""The job: its name and length, its machines, what it writes and where it logs."""

from dataclasses import dataclass, field
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
    stop_grace_s: float = 60.0
    """Seconds that torchrun, once told to stop, gives ranks to finish their step and save before it kills them."""


@dataclass(frozen=True)
class ClusterConfig:
    num_nodes: int = 1
    """Number of machines."""
    gpus_per_node: int = 1
    """Ranks on each machine, one for a GPU; where there is no GPU, CPU processes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes CUDA when torch finds a GPU."""


SAVE_CONTENTS: tuple[Literal["model", "optimizer", "hf"], ...] = ("model", "optimizer", "hf")


@dataclass(frozen=True)
class CheckpointConfig:
    save_period: int = 0
    """Steps between checkpoints; 0 means none in between."""
    save_at_end: bool = True
    """Save after the last step."""
    save_contents: list[Literal["model", "optimizer", "hf"]] = field(
        default_factory=lambda: ["model", "optimizer", "hf"]
    )
    """What is saved: model and optimizer make a checkpoint to resume from, hf is an export of the policy."""
    async_save: bool = True
    """Let training go on while a checkpoint is written; it waits only for the copy to host memory."""
    keep_last: int = 2
    """Newest checkpoints (and exports between steps) that are kept."""
    keep_every: int = 0
    """Checkpoints of every so many steps are kept for good; 0 means none."""
    keep_top_k: int = 0
    """Checkpoints with the best `metric_name` that are kept; 0 means none."""
    metric_name: str | None = None
    """Metric that says which checkpoint is best, such as val/accuracy; a step that did not report it has none."""
    higher_is_better: bool = True
    """Whether more of `metric_name` is better."""
    on_save_error: Literal["continue", "stop"] = "continue"
    """After a save that the disk refused: go on and try again at the next, or end the run; the last save always ends
    it."""
    resume_mode: Literal["auto", "continue", "best", "disable", "resume_path"] = "auto"
    """auto goes on with an unfinished run of this name, continue also takes a finished one as done, best goes back to
    its checkpoint with the best `metric_name`."""
    resume_from_path: str | None = None
    """Checkpoint folder (.../checkpoints/iter_0000100) that resume_mode=resume_path starts from."""
    checkpoint_must_save_by: str | None = None
    """Time after the start, as DD:HH:MM:SS, by which a run that is not done has saved and stopped."""


@dataclass(frozen=True)
class GuardConfig:
    max_bad_steps: int = 3
    """Steps in a row whose loss or gradient is not finite (no rank applies such an update) before `on_bad_steps`."""
    on_bad_steps: Literal["abort", "rollback"] = "abort"
    """End the run, or go back to the last good checkpoint and leave out the data that came after it."""
    spike_metrics: list[str] = field(default_factory=list)
    """Metrics that may not jump, such as actor/loss or actor/kl_loss."""
    spike_sigmas: float = 8.0
    """A jump is further above the mean of the last steps than so many of their standard deviations."""
    spike_window: int = 50
    """Steps that the mean and deviation are of; the first fifth of it is only watched."""
    on_spike: Literal["warn", "abort", "rollback"] = "warn"
    """What follows a jump: an event, the end of the run, or the last good checkpoint and other data."""
    max_rollbacks: int = 3
    """Rollbacks of one process before it ends the run."""


@dataclass(frozen=True)
class LoggerConfig:
    wandb_enabled: bool = False
    """Log to Weights & Biases too; metrics.jsonl and TensorBoard files are always written."""
    project: str = "megarl"
    """Weights & Biases project."""
    name: str | None = None
    """Weights & Biases name of the run; null means `run.name`."""
