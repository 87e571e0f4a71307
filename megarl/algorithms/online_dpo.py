"""Online DPO (2402.04792), and its relatives by ``preference.loss`` (online IPO, ...): sample two responses to each
prompt, or more, take the best and the worst by reward for a pair, and learn from it as from data.

Rewards may lose something for length and for responses that reach the limit (``reward``); ``preference.ties`` says what
becomes of pairs of equal rewards. bco_pair has no running shift here.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from megarl import advantages
from megarl.algorithms.credit import scores_of
from megarl.algorithms.onpolicy import mean_metrics, prepare
from megarl.config import Config, PreferenceConfig
from megarl.data.records import MicroBatch
from megarl.losses.mismatch import mismatch
from megarl.losses.preference import REFERENCE_FREE, preference_tokens
from megarl.observe.run import Run
from megarl.parallel.mesh import Mesh


def train(cfg: Config, run: Run, mesh: Mesh) -> None:
    """One rollout a step; one optimizer update for every ``train_global_batch_size`` of its pairs, ``ppo_epochs``
    times."""
    parts = prepare(cfg, run, mesh, reference=cfg.preference.loss not in REFERENCE_FREE)
    loss = partial(pairs_of_rollouts, cfg=cfg.preference)
    for step in parts.each_step():
        with run.phase("step"):
            rollout = parts.sampler.rollout(parts.stream.next, step)
            scores = scores_of(cfg.reward, rollout)
            pairs = advantages.choose_pairs(scores, rollout.groups, ties=cfg.preference.ties)
            batches = rollout.deal(cfg.train.train_global_batch_size, pairs)
            samples = [sample for batch in batches for sample in batch]
            for sample in samples:
                sample.score = scores[sample.row].item()
            parts.ref_logps(samples)
            parts.old_logps(samples, updates=len(batches) * cfg.train.ppo_epochs)  # for the mismatch alone
            with run.phase("train"):
                history = [
                    parts.policy.step(batch, loss, loss_agg_mode="seq-mean-token-mean", together=2)
                    for _ in range(cfg.train.ppo_epochs)
                    for batch in batches
                ]
            metrics = rollout.metrics() | {"reward/pairs": float(len(pairs))} | mean_metrics(history)
            metrics = parts.finish(step, metrics)
        parts.report(step, metrics, rollout)
    parts.sampler.close()


def pairs_of_rollouts(logps: Tensor, batch: MicroBatch, cfg: PreferenceConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The preference loss, and how far vLLM was from the policy."""
    loss, metrics = preference_tokens(logps, batch, cfg)
    assert batch.rollout_logps is not None, "vLLM gives log-probabilities with what it samples"
    before = logps if batch.old_logps is None else batch.old_logps
    return loss, metrics | mismatch(before, batch.rollout_logps, batch.fresh)
