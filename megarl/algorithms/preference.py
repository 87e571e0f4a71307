"""Learning from preference pairs: DPO and its relatives, of which `megarl.losses.preference` has one function each.

A pair is never divided: both of its responses are in one microbatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from megarl.algorithms.reference import Reference, labels_of, ratios
from megarl.algorithms.sft import deal, steps_of
from megarl.checkpoint.checkpoints import Checkpoints
from megarl.config import Config
from megarl.config.sizes import longest_in_microbatch
from megarl.data.preferences import Pair, load_pairs, need_scores
from megarl.data.prompts import PromptStream
from megarl.data.reading import DataError
from megarl.data.records import Sample
from megarl.data.tokenizer import load_tokenizer
from megarl.losses.preference import NEEDS_REWARDS, REFERENCE_FREE, longpo_tokens, preference_tokens
from megarl.losses.unpaired import RewardShift
from megarl.model.engine import Engine
from megarl.model.family import read_spec
from megarl.observe.run import Run
from megarl.parallel.mesh import Mesh


def train(cfg: Config, run: Run, mesh: Mesh) -> None:
    """`train_global_batch_size` pairs a step, for `max_num_epochs`, or `max_num_steps` if that is less."""
    name = cfg.preference.loss
    make = short_samples if name == "longpo" else samples_of
    with run.phase("load"):
        spec = read_spec(cfg.model.path)
        longest = min(spec.max_position_embeddings, longest_in_microbatch(cfg, 2) + 1)  # a microbatch holds a pair
        pairs = load_pairs(cfg.data, load_tokenizer(cfg.model), longest)
        if name in NEEDS_REWARDS:
            need_scores(pairs, cfg.data, f"preference.loss = {name}")
        run.dropped(pairs.dropped, kept=len(pairs))
        stream = PromptStream(pairs, cfg.run.seed, cfg.data.shuffle)
        steps = steps_of(cfg, len(pairs))
        policy = Engine(cfg, mesh, spec, temperature=1.0, total_updates=steps)
        reference = None
        if name not in REFERENCE_FREE:
            reference = Reference(cfg, policy, run, mesh, [sample for pair in pairs for sample in make(pair)])
        shift = RewardShift(cfg.preference.bco_shift)
        checkpoints = Checkpoints(cfg, run, mesh, policy=policy, stream=stream, shift=shift)
        checkpoints.resume()
    loss = partial(longpo_tokens if name == "longpo" else preference_tokens, cfg=cfg.preference)
    for step in checkpoints.steps(steps):
        with run.phase("step"):
            drawn = stream.next(cfg.train.train_global_batch_size)
            costs = [policy.flops.forward([len(pair.chosen), len(pair.rejected)]) for pair in drawn]
            mine = deal(drawn, costs, mesh)
            batch = [sample for pair in mine for sample in make(pair)]
            if reference:
                reference.attach(batch)
            if name == "bco_pair" and cfg.preference.bco_shift != "none":
                with run.phase("baseline"):
                    shift.update(cfg.preference.beta * ratios(policy, batch, mesh), labels_of(batch, mesh))
                loss = partial(preference_tokens, cfg=cfg.preference, shift=shift.value)
            if name == "longpo":
                batch = on_long_prompts(mine, batch)
                loss = partial(longpo_tokens, cfg=cfg.preference, prompt_lengths={p.id: p.prompt_length for p in mine})
            with run.phase("train"):
                metrics = policy.step(batch, loss, loss_agg_mode="seq-mean-token-mean", together=2)
            checkpoints.save_if_due(step)
        run.report(step, steps, named(metrics), [len(tokens) for p in drawn for tokens in (p.chosen, p.rejected)])


def samples_of(pair: Pair) -> list[Sample]:
    """Chosen, then rejected."""
    sides = ((pair.chosen, pair.chosen_score), (pair.rejected, pair.rejected_score))
    return [
        Sample(pair.id, i, tokens, pair.prompt_length, score=score, desirable=i == 0)
        for i, (tokens, score) in enumerate(sides)
    ]


def short_samples(pair: Pair) -> list[Sample]:
    """LongPO: the same responses to the short prompt, which is what the reference reads."""
    if pair.reference_prompt is None:
        raise DataError(f"pair {pair.id} has no short prompt for longpo (data.reference_prompt_key)")
    short, at = pair.reference_prompt, pair.prompt_length
    return [
        Sample(pair.id, i, short + tokens[at:], len(short)) for i, tokens in enumerate((pair.chosen, pair.rejected))
    ]


def on_long_prompts(pairs: Sequence[Pair], short: Sequence[Sample]) -> list[Sample]:
    """LongPO: what the policy reads, with the reference's log-probabilities of the same responses. Of the chosen side
    the prompt is learnt as well: all but its first token is response, of which the reference says nothing."""
    out = []
    for sample, pair in zip(short, [pair for pair in pairs for _ in range(2)], strict=True):
        assert sample.ref_logps is not None, "the reference has read the short prompts"
        tokens, start = (pair.chosen, 1) if sample.index == 0 else (pair.rejected, pair.prompt_length)
        before = sample.ref_logps.new_zeros(pair.prompt_length - start)
        out.append(Sample(pair.id, sample.index, tokens, start, ref_logps=torch.cat([before, sample.ref_logps])))
    return out


def named(metrics: dict[str, float]) -> dict[str, float]:
    """``rewards/...`` keep their names, which TRL's dashboards have too; the rest are the actor's."""
    return {name if "/" in name else f"actor/{name}": value for name, value in metrics.items()}
