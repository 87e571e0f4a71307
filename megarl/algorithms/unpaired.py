"""Learning from single responses with a label, desirable or not: KTO and BCO (`megarl.losses.unpaired`).

Both compare a response's reward with a number from the whole step: KTO with the policy's distance from the reference on
responses to other prompts, BCO with a running mean of rewards. It takes a forward pass without gradient, before the
update.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from megarl.algorithms.preference import named
from megarl.algorithms.reference import Reference, labels_of, ratios
from megarl.algorithms.sft import deal, steps_of
from megarl.checkpoint.checkpoints import Checkpoints
from megarl.config import Config
from megarl.config.sizes import longest_in_microbatch
from megarl.data.density import desirable_probability
from megarl.data.prompts import PromptStream
from megarl.data.records import Sample
from megarl.data.tokenizer import load_tokenizer
from megarl.data.unpaired import Labelled, load_unpaired
from megarl.losses.unpaired import RewardShift, density_ratio, kl_baseline, mismatched, unpaired_tokens
from megarl.model.engine import Engine
from megarl.model.family import read_spec
from megarl.observe.run import Run
from megarl.parallel.mesh import Mesh


def train(cfg: Config, run: Run, mesh: Mesh) -> None:
    """`train_global_batch_size` responses a step, for `max_num_epochs`, or `max_num_steps` if that is less."""
    with run.phase("load"):
        spec = read_spec(cfg.model.path)
        longest = min(spec.max_position_embeddings, longest_in_microbatch(cfg) + 1)
        examples = load_unpaired(cfg.data, load_tokenizer(cfg.model), longest)
        run.dropped(examples.dropped, kept=len(examples))
        stream = PromptStream(examples, cfg.run.seed, cfg.data.shuffle)
        steps = steps_of(cfg, len(examples))
        policy = Engine(cfg, mesh, spec, temperature=1.0, total_updates=steps)
        reference = Reference(cfg, policy, run, mesh, [sample_of(example) for example in examples])
        shift = RewardShift(cfg.preference.bco_shift)
        density = density_of(examples) if cfg.preference.bco_density_ratio else None
        checkpoints = Checkpoints(cfg, run, mesh, policy=policy, stream=stream, shift=shift)
        checkpoints.resume()
    for step in checkpoints.steps(steps):
        with run.phase("step"):
            drawn = stream.next(cfg.train.train_global_batch_size)
            cost = policy.flops.cost
            batch = [sample_of(e) for e in deal(drawn, [cost(len(e.tokens)) for e in drawn], mesh)]
            others = []
            if cfg.preference.loss == "kto":
                pairs = mismatched_samples(drawn, longest)
                others = deal(pairs, [cost(len(sample.tokens)) for sample in pairs], mesh)
            reference.attach([*batch, *others])
            with run.phase("baseline"):
                if cfg.preference.loss == "kto":
                    baseline = kl_baseline(ratios(policy, others, mesh))
                else:
                    shift.update(cfg.preference.beta * ratios(policy, batch, mesh), labels_of(batch, mesh))
                    baseline = torch.tensor(shift.value)
            loss = partial(unpaired_tokens, cfg=cfg.preference, baseline=baseline.item(), density=density)
            with run.phase("train"):
                metrics = policy.step(batch, loss, loss_agg_mode="seq-mean-token-mean")
            checkpoints.save_if_due(step)
        run.report(
            step, steps, by_class(named(metrics | {"baseline": baseline.item()})), [len(e.tokens) for e in drawn]
        )


def sample_of(example: Labelled) -> Sample:
    return Sample(example.id, 0, example.tokens, example.prompt_length, desirable=example.desirable)


def density_of(examples: Sequence[Labelled]) -> dict[str, float]:
    """Each example's weight in bco, if it is undesirable."""
    prompts = [example.tokens[: example.prompt_length] for example in examples]
    ratio = density_ratio(desirable_probability(prompts, [example.desirable for example in examples]))
    return {example.id: weight for example, weight in zip(examples, ratio.tolist(), strict=True)}


def mismatched_samples(drawn: Sequence[Labelled], longest: int) -> list[Sample]:
    """Each prompt of the step with another's response, cut where both together are longer than ``longest`` tokens."""
    others = mismatched([example.id for example in drawn])
    return [
        Sample(
            example.id,
            0,
            [*example.tokens[: example.prompt_length], *drawn[j].tokens[drawn[j].prompt_length :]][:longest],
            example.prompt_length,
        )
        for example, j in zip(drawn, others, strict=True)
    ]


def by_class(metrics: dict[str, float]) -> dict[str, float]:
    """Rewards as means over the responses of their own class, instead of over all."""
    share = metrics.pop("actor/desirable")
    out = dict(metrics)
    for name, part in (("rewards/desirable", share), ("rewards/undesirable", 1 - share)):
        out[name] = metrics[name] / part if part else 0.0
    return out
