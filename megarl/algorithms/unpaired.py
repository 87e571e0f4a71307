"""Learning from single responses with a label, desirable or not: KTO and BCO (`megarl.losses.unpaired`).

Both compare a response's reward with a number from the whole step: KTO with the policy's distance from the reference on
responses to other prompts, BCO with a running mean of rewards. It takes a forward pass without gradient, before the
update.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import AutoTokenizer

from megarl.algorithms.onpolicy import attach
from megarl.algorithms.preference import named
from megarl.algorithms.sft import deal, steps_of
from megarl.checkpoint.checkpoints import Checkpoints
from megarl.config import Config
from megarl.data.prompts import PromptStream
from megarl.data.records import Sample
from megarl.data.unpaired import Labelled, load_unpaired
from megarl.losses.unpaired import RewardShift, kl_baseline, mismatched, unpaired_tokens
from megarl.model.engine import Engine, HostWeights
from megarl.model.family import read_spec
from megarl.observe.run import Run
from megarl.parallel.collectives import gather_objects
from megarl.parallel.mesh import Mesh


def train(cfg: Config, run: Run, mesh: Mesh) -> None:
    """`train_global_batch_size` responses a step, for `max_num_epochs`, or `max_num_steps` if that is less."""
    with run.phase("load"):
        spec = read_spec(cfg.model.path)
        longest = min(spec.max_position_embeddings, cfg.train.train_mb_tokens + 1)
        examples = load_unpaired(cfg.data, AutoTokenizer.from_pretrained(cfg.model.path), longest)
        run.dropped(examples.dropped, kept=len(examples))
        stream = PromptStream(examples, cfg.run.seed, cfg.data.shuffle)
        steps = steps_of(cfg, len(examples))
        policy = Engine(cfg, mesh, spec, temperature=1.0, total_updates=steps)
        reference = HostWeights(policy.model)
        shift = RewardShift(cfg.preference.bco_shift)
        checkpoints = Checkpoints(cfg, run, mesh, policy=policy, stream=stream, shift=shift)
        checkpoints.resume()
    for step in checkpoints.steps(steps):
        with run.phase("step"):
            drawn = stream.next(cfg.train.train_global_batch_size)
            batch = [sample_of(e) for e in deal(drawn, [len(e.tokens) for e in drawn], mesh)]
            others = []
            if cfg.preference.loss == "kto":
                pairs = mismatched_samples(drawn, longest)
                others = deal(pairs, [len(sample.tokens) for sample in pairs], mesh)
            with run.phase("ref_logps"), policy.holding(reference):
                attach("ref_logps", policy, [*batch, *others])
            with run.phase("baseline"):
                if cfg.preference.loss == "kto":
                    baseline = kl_baseline(ratios(policy, others, mesh))
                else:
                    labels = gather_objects([bool(sample.desirable) for sample in batch], mesh.dp_group)
                    desirable = torch.tensor([label for part in labels for label in part], dtype=torch.bool)
                    shift.update(cfg.preference.beta * ratios(policy, batch, mesh), desirable)
                    baseline = torch.tensor(shift.value)
            loss = partial(unpaired_tokens, cfg=cfg.preference, baseline=baseline.item())
            with run.phase("train"):
                metrics = policy.step(batch, loss, loss_agg_mode="seq-mean-token-mean")
            checkpoints.save_if_due(step)
        run.report(
            step, steps, by_class(named(metrics | {"baseline": baseline.item()})), [len(e.tokens) for e in drawn]
        )


def sample_of(example: Labelled) -> Sample:
    return Sample(example.id, 0, example.tokens, example.prompt_length, desirable=example.desirable)


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


def ratios(policy: Engine, samples: list[Sample], mesh: Mesh) -> Tensor:
    """log pi(y) - log pi_ref(y) of the whole step's samples, of which these are this replica's; fp32, on the host."""
    now = policy.logps(samples)
    mine = [(logps - sample.ref_logps).sum().item() for logps, sample in zip(now, samples, strict=True)]
    return torch.tensor([ratio for part in gather_objects(mine, mesh.dp_group) for ratio in part])


def by_class(metrics: dict[str, float]) -> dict[str, float]:
    """Rewards as means over the responses of their own class, instead of over all."""
    share = metrics.pop("actor/desirable")
    out = dict(metrics)
    for name, part in (("rewards/desirable", share), ("rewards/undesirable", 1 - share)):
        out[name] = metrics[name] / part if part else 0.0
    return out
