"""TRL's side of grpo_vs_trl.py: ``trl_side.py <folder> <steps>``, in TRL's own virtual environment.

Defaults of TRL that would be other work than megarl's are set: no bf16, no gradient checkpointing, no shuffling, one
generation for one update. What TRL measures of a step it keeps to itself (``report_to="none"``).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from gate import Gate
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from workload import LEARNING_RATE, MICROBATCHES, NEW_TOKENS, PROMPTS, SAMPLES, sums

from megarl.rewards.exact import exact_reward  # which needs the standard library only


class Pauses(TrainerCallback):
    """Stands still between steps, and counts what is sampled in them."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.tokens = 0

    def reward(
        self, completions: list[str], answer: list[str], completion_ids: list[list[int]], **columns: Any
    ) -> list[float]:
        self.tokens += sum(len(ids) for ids in completion_ids)
        return exact_reward(completions, answer)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            self.pause()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pause()

    def pause(self) -> None:
        tokens, self.tokens = self.tokens, 0
        self.gate.pause(tokens)


def main(folder: Path, steps: int) -> None:
    pauses = Pauses()
    args = GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32"},
        max_steps=steps,
        per_device_train_batch_size=PROMPTS * SAMPLES // MICROBATCHES,
        gradient_accumulation_steps=MICROBATCHES,
        num_generations=SAMPLES,
        max_completion_length=NEW_TOKENS,
        shuffle_dataset=False,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        dataloader_pin_memory=False,
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = GRPOTrainer(
        model=str(folder / "model"),
        args=args,
        reward_funcs=pauses.reward,
        train_dataset=Dataset.from_list(sums(steps * PROMPTS)),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[pauses],
    )
    trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
