"""Learning from preference pairs: DPO and its relatives, of which `megarl.losses.preference` has one function each.

A pair is never divided: both of its responses are in one microbatch. The reference is the policy as it was at the
start; its weights wait in host memory and change places with the policy's for a forward pass.
"""

from __future__ import annotations

from functools import partial

from transformers import AutoTokenizer

from megarl.algorithms.onpolicy import attach
from megarl.algorithms.sft import deal, steps_of
from megarl.checkpoint.checkpoints import Checkpoints
from megarl.config import Config
from megarl.data.preferences import Pair, load_pairs
from megarl.data.prompts import PromptStream
from megarl.data.records import Sample
from megarl.losses.preference import REFERENCE_FREE, preference_tokens
from megarl.model.engine import Engine, HostWeights
from megarl.model.family import read_spec
from megarl.observe.run import Run
from megarl.parallel.mesh import Mesh


def train(cfg: Config, run: Run, mesh: Mesh) -> None:
    """`train_global_batch_size` pairs a step, for `max_num_epochs`, or `max_num_steps` if that is less."""
    with run.phase("load"):
        spec = read_spec(cfg.model.path)
        longest = min(spec.max_position_embeddings, cfg.train.train_mb_tokens // 2 + 1)  # a microbatch holds a pair
        pairs = load_pairs(cfg.data, AutoTokenizer.from_pretrained(cfg.model.path), longest)
        run.dropped(pairs.dropped, kept=len(pairs))
        stream = PromptStream(pairs, cfg.run.seed, cfg.data.shuffle)
        steps = steps_of(cfg, len(pairs))
        policy = Engine(cfg, mesh, spec, temperature=1.0, total_updates=steps)
        reference = None if cfg.preference.loss in REFERENCE_FREE else HostWeights(policy.model)
        checkpoints = Checkpoints(cfg, run, mesh, policy=policy, stream=stream)
        checkpoints.resume()
    loss = partial(preference_tokens, cfg=cfg.preference)
    for step in checkpoints.steps(steps):
        with run.phase("step"):
            drawn = stream.next(cfg.train.train_global_batch_size)
            lengths = [len(pair.chosen) + len(pair.rejected) for pair in drawn]
            batch = [sample for pair in deal(drawn, lengths, mesh) for sample in samples_of(pair)]
            if reference:
                with run.phase("ref_logps"), policy.holding(reference):
                    attach("ref_logps", policy, batch)
            with run.phase("train"):
                metrics = policy.step(batch, loss, loss_agg_mode="seq-mean-token-mean", together=2)
            checkpoints.save_if_due(step)
        run.report(step, steps, named(metrics), [len(tokens) for p in drawn for tokens in (p.chosen, p.rejected)])


def samples_of(pair: Pair) -> list[Sample]:
    """Chosen, then rejected."""
    sides = ((pair.chosen, pair.chosen_score), (pair.rejected, pair.rejected_score))
    return [Sample(pair.id, i, tokens, pair.prompt_length, score=score) for i, (tokens, score) in enumerate(sides)]


def named(metrics: dict[str, float]) -> dict[str, float]:
    """``rewards/...`` keep their names, which TRL's dashboards have too; the rest are the actor's."""
    return {name if "/" in name else f"actor/{name}": value for name, value in metrics.items()}
