"""Supervised fine-tuning: maximise the likelihood of responses, given their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from megarl.checkpoint.checkpoints import Checkpoints
from megarl.config import Config
from megarl.config.sizes import longest_in_microbatch
from megarl.data.packing import balance
from megarl.data.prompts import PromptStream
from megarl.data.records import Sample
from megarl.data.sft import load_examples
from megarl.data.tokenizer import load_tokenizer
from megarl.losses.sft import sft
from megarl.model.engine import Engine
from megarl.model.family import read_spec
from megarl.observe.run import Run
from megarl.parallel.mesh import Mesh

Item = TypeVar("Item")


def train(cfg: Config, run: Run, mesh: Mesh) -> None:
    """`train_global_batch_size` examples a step, for `max_num_epochs`, or `max_num_steps` if that is less."""
    with run.phase("load"):
        spec = read_spec(cfg.model.path)
        longest = min(spec.max_position_embeddings, longest_in_microbatch(cfg) + 1)  # the last token is only a target
        examples = load_examples(cfg.data, load_tokenizer(cfg.model), longest)
        run.dropped(examples.dropped, kept=len(examples))
        stream = PromptStream(examples, cfg.run.seed, cfg.data.shuffle)
        steps = steps_of(cfg, len(examples))
        policy = Engine(cfg, mesh, spec, temperature=1.0, total_updates=steps)
        checkpoints = Checkpoints(cfg, run, mesh, policy=policy, stream=stream)
        checkpoints.resume()
    for step in checkpoints.steps(steps):
        with run.phase("step"):
            drawn = stream.next(cfg.train.train_global_batch_size)
            batch = [Sample(e.id, 0, e.tokens, e.prompt_length, loss_mask=e.loss_mask) for e in drawn]
            lengths = [len(sample.tokens) for sample in batch]
            mine = deal(batch, [policy.flops.cost(length) for length in lengths], mesh)
            with run.phase("train"):
                metrics = policy.step(mine, sft, loss_agg_mode=cfg.loss.loss_agg_mode)
            checkpoints.save_if_due(step)
        run.report(step, steps, {f"actor/{name}": value for name, value in metrics.items()}, lengths)


def steps_of(cfg: Config, num_examples: int) -> int:
    """Updates of a run over ``num_examples`` examples, ``train_global_batch_size`` of them each."""
    steps = max(1, cfg.run.max_num_epochs * num_examples // cfg.train.train_global_batch_size)
    return min(steps, cfg.run.max_num_steps or steps)


def deal(items: Sequence[Item], costs: Sequence[float], mesh: Mesh) -> list[Item]:
    """This replica's share of a step's items: about as much work as any other's."""
    return [items[i] for i in balance(costs, mesh.dp_size)[mesh.dp_rank]]


def due(step: int, period: int) -> bool:
    """Whether something that happens every ``period`` steps (0: never) happens after this one."""
    return period > 0 and step % period == 0
