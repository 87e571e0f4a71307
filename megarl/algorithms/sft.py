"""Supervised fine-tuning: maximise the likelihood of responses, given their prompts."""

from __future__ import annotations

from transformers import AutoTokenizer

from megarl.config import Config
from megarl.data.packing import balance
from megarl.data.prompts import PromptStream
from megarl.data.records import Sample
from megarl.data.sft import load_examples
from megarl.losses.sft import sft
from megarl.model.engine import Engine
from megarl.model.family import read_spec
from megarl.observe.run import Run
from megarl.parallel.mesh import Mesh
from megarl.weights.convert import save_hf


def train(cfg: Config, run: Run, mesh: Mesh) -> None:
    """`train_global_batch_size` examples a step, for `max_num_epochs`, or `max_num_steps` if that is less."""
    with run.phase("load"):
        examples = load_examples(cfg.data, AutoTokenizer.from_pretrained(cfg.model.path))
        stream = PromptStream(examples, cfg.run.seed, cfg.data.shuffle)
        batch_size = cfg.train.train_global_batch_size
        steps = max(1, cfg.run.max_num_epochs * len(examples) // batch_size)
        steps = min(steps, cfg.run.max_num_steps or steps)
        policy = Engine(cfg, mesh, read_spec(cfg.model.path), temperature=1.0, total_updates=steps)
    for step in range(1, steps + 1):
        with run.phase("step"):
            batch = [Sample(e.id, 0, e.tokens, e.prompt_length) for e in stream.next(batch_size)]
            share = balance([len(sample.tokens) for sample in batch], mesh.dp_size)[mesh.dp_rank]
            with run.phase("train"):
                metrics = policy.step([batch[i] for i in share], sft, loss_agg_mode=cfg.loss.loss_agg_mode)
        lengths = [len(sample.tokens) for sample in batch]
        run.report(step, steps, {f"actor/{name}": value for name, value in metrics.items()}, lengths)
        last = step == steps
        if due(step, cfg.checkpoint.save_period) or (last and cfg.checkpoint.save_at_end):
            save(cfg, run, policy, "final" if last else f"step_{step:06d}")


def due(step: int, period: int) -> bool:
    """Whether something that happens every ``period`` steps (0: never) happens after this one."""
    return period > 0 and step % period == 0


def save(cfg: Config, run: Run, policy: Engine, name: str) -> None:
    """Write the policy as a Hugging Face directory under the run's folder."""
    with run.phase("save"):
        bucket = cfg.weight_sync.bucket_size_mb << 20
        save_hf(policy.stream(bucket), run.dir / "hf" / name, carry_from=cfg.model.path)
