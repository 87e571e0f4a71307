"""Reward modelling (2203.02155, section 3.4; Bradley and Terry, 1952): a scalar head learns to score the chosen
response of a pair above the rejected one. A response's score is the model's number behind its last token, EOS.

The model is written as transformers' classifier of one label, which `megarl` reads again as a critic or reward model.
"""

from __future__ import annotations

from functools import partial

from megarl.algorithms.preference import named
from megarl.algorithms.sft import deal, steps_of
from megarl.checkpoint.checkpoints import Checkpoints
from megarl.config import Config
from megarl.config.sizes import longest_in_microbatch
from megarl.data.preferences import Pair, load_pairs, need_scores
from megarl.data.prompts import PromptStream
from megarl.data.records import Sample
from megarl.data.tokenizer import load_tokenizer
from megarl.losses.reward_model import bradley_terry_tokens
from megarl.model.engine import Engine
from megarl.model.family import read_spec
from megarl.observe.run import Run
from megarl.parallel.mesh import Mesh


def train(cfg: Config, run: Run, mesh: Mesh) -> None:
    """`train_global_batch_size` pairs a step, for `max_num_epochs`, or `max_num_steps` if that is less."""
    with run.phase("load"):
        spec = read_spec(cfg.model.path).with_scalar_head()
        longest = min(spec.max_position_embeddings, longest_in_microbatch(cfg, 2))  # a microbatch holds a pair
        pairs = load_pairs(cfg.data, load_tokenizer(cfg.model), longest)
        if cfg.preference.margin_from_scores:
            need_scores(pairs, cfg.data, "preference.margin_from_scores = true")
        run.dropped(pairs.dropped, kept=len(pairs))
        stream = PromptStream(pairs, cfg.run.seed, cfg.data.shuffle)
        steps = steps_of(cfg, len(pairs))
        model = Engine(cfg, mesh, spec, temperature=1.0, total_updates=steps)
        checkpoints = Checkpoints(cfg, run, mesh, policy=model, stream=stream)
        checkpoints.resume()
    loss = partial(bradley_terry_tokens, cfg=cfg.preference)
    for step in checkpoints.steps(steps):
        with run.phase("step"):
            drawn = stream.next(cfg.train.train_global_batch_size)
            costs = [model.flops.forward([len(pair.chosen), len(pair.rejected)]) for pair in drawn]
            batch = [sample for pair in deal(drawn, costs, mesh) for sample in scored(pair)]
            with run.phase("train"):
                metrics = model.step(batch, loss, loss_agg_mode="seq-mean-token-mean", together=2)
            checkpoints.save_if_due(step)
        run.report(step, steps, named(metrics), [len(tokens) for p in drawn for tokens in (p.chosen, p.rejected)])


def scored(pair: Pair) -> list[Sample]:
    """Chosen, then rejected; in place of a response one token more, so that its value is of the state behind EOS."""
    sides = ((pair.chosen, pair.chosen_score), (pair.rejected, pair.rejected_score))
    return [Sample(pair.id, i, [*tokens, 0], len(tokens), score=score) for i, (tokens, score) in enumerate(sides)]
