"""TRL's side of tools/compare_trl.py: ``trl_side.py <folder> <method> ...``, in TRL's own virtual environment.

Writes <folder>/trl.json: for each method the loss and gradient norm of every update, or why it did not run. Batches
come in file order; completions are those of the file, in place of sampled ones.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from methods import BATCH, GROUP, MAX_COMPLETION, METHODS, STEPS, Method, read
from torch.utils.data import SequentialSampler
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
    set_seed,
)


class Norms(TrainerCallback):
    """Gradient norms, before clipping."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "grad_norm" in logs:
            self.found.append(float(logs["grad_norm"]))


def run(folder: Path, method: Method) -> dict[str, list[float]]:
    set_seed(0)
    module, name = method.trainer.split(":")
    trainer_class = getattr(importlib.import_module(module), name)
    config_class = getattr(importlib.import_module(module), name.replace("Trainer", "Config"))
    losses: list[float] = []
    norms = Norms()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    kind = AutoModelForSequenceClassification if name == "RewardTrainer" else AutoModelForCausalLM
    where = str(folder / ("classifier" if name == "RewardTrainer" else "model"))
    model = kind.from_pretrained(where, dtype=torch.float32)
    settings = common(folder) | (grouped(method) if method.samples else {}) | method.trl
    rows = read(folder, method.data)
    extra: dict[str, Any] = {}
    if method.samples:
        extra["reward_funcs"] = rewarded(rows)
        dataset = Dataset.from_list([{"prompt": row["prompt"]} for row in rows])
    else:
        dataset = Dataset.from_list([renamed(row, method) for row in rows])
    if name in ("DPOTrainer", "KTOTrainer", "BCOTrainer"):
        extra["ref_model"] = kind.from_pretrained(where, dtype=torch.float32)
    trainer = in_order(trainer_class, losses, rows if method.samples else None, name)(
        model=model,
        args=config_class(**settings),
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[norms],
        **extra,
    )
    trainer.train()
    return {"loss": losses, "grad_norm": norms.found}


def common(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "trl"),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }


def grouped(method: Method) -> dict[str, Any]:
    return {
        "num_generations": GROUP,
        "max_completion_length": MAX_COMPLETION,
        "num_iterations": method.updates_per_rollout,
        "shuffle_dataset": False,
        "temperature": 1.0,
    }


def renamed(row: dict[str, Any], method: Method) -> dict[str, Any]:
    """TRL calls a response a completion, and has a margin in place of scores."""
    row = dict(row)
    if method.data == "scored":
        row["margin"] = float(row.pop("chosen_score") - row.pop("rejected_score"))
    return {"completion" if key == "response" else key: value for key, value in row.items()}


def rewarded(rows: list[dict[str, Any]]) -> Any:
    table = {
        (row["prompt"], tuple(ids)): reward
        for row in rows
        for ids, reward in zip(row["completions"], row["rewards"], strict=True)
    }

    def reward(prompts: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [table[prompt, tuple(ids)] for prompt, ids in zip(prompts, completion_ids, strict=True)]

    return reward


def in_order(base: type, losses: list[float], rows: list[dict[str, Any]] | None, name: str) -> type:
    """The trainer, with data in file order, its losses noted, and completions taken from ``rows``."""

    class Ordered(base):
        _tag_names = ()

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            losses.append(float(loss))
            return loss

        if rows is None:

            def _get_train_sampler(self, dataset: Any = None) -> Any:
                return SequentialSampler(self.train_dataset)

        else:

            def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
                known = {tuple(self.processing_class(row["prompt"])["input_ids"]): row["completions"] for row in rows}
                seen: dict[tuple[int, ...], int] = {}
                found = []
                for ids in map(tuple, prompt_ids):
                    found.append(known[ids][seen.get(ids, 0)])
                    seen[ids] = seen.get(ids, 0) + 1
                return (found, None) if name == "GRPOTrainer" else found

    Ordered.__name__ = base.__name__
    return Ordered


def main(folder: Path, names: list[str]) -> None:
    found: dict[str, Any] = {}
    for name in names:
        try:
            found[name] = run(folder, METHODS[name])
        except Exception:  # of a TRL that differs: the table says so, the other methods go on
            found[name] = {"error": traceback.format_exc()}
        (folder / "trl.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
