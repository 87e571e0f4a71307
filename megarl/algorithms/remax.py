"""ReMax (2310.10505): REINFORCE, with the reward of the policy's own greedy response to a prompt as the baseline. The
greedy responses are sampled by the same engines right before the others, and not trained on."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from megarl import advantages
from megarl.algorithms.credit import give, scores_of, step_of
from megarl.algorithms.onpolicy import mean_metrics, prepare
from megarl.config import Config, RewardConfig
from megarl.losses.policy import grpo
from megarl.observe.run import Run
from megarl.parallel.mesh import Mesh
from megarl.rollout.table import Rollout


def train(cfg: Config, run: Run, mesh: Mesh) -> None:
    """Algorithm 1. A prompt without a scored greedy response is left out of the step."""
    parts = prepare(cfg, run, mesh, reference=bool(cfg.loss.kl_loss_coef))
    loss = partial(grpo, cfg=cfg.loss)
    for step in parts.each_step():
        with run.phase("step"):
            rollout, greedy = parts.sampler.rollout_with_greedy(parts.stream.next, step)
            batches = rollout.deal(cfg.train.train_global_batch_size)
            samples = [sample for batch in batches for sample in batch]
            parts.ref_logps(samples)
            parts.old_logps(samples, updates=len(batches) * cfg.train.ppo_epochs)
            with run.phase("adv"):
                known = step_of(cfg, rollout, samples, mesh)
                baseline = greedy_scores(cfg.reward, rollout, greedy)
                metrics = rollout.metrics() | {"reward/greedy": baseline.mean().item()}
                difference = advantages.remax(known.scores, baseline, max_difference=cfg.advantage.max_difference)
                metrics |= give(known, known.mine(difference))
            with run.phase("train"):
                history = [
                    parts.policy.step(batch, loss, loss_agg_mode=cfg.loss.loss_agg_mode)
                    for _ in range(cfg.train.ppo_epochs)
                    for batch in batches
                ]
            metrics = parts.finish(step, metrics | mean_metrics(history))
        parts.report(step, metrics, rollout)
    parts.sampler.close()


def greedy_scores(cfg: RewardConfig, rollout: Rollout, greedy: Rollout) -> Tensor:
    """[N] of each sample the score of its prompt's greedy response: with the same penalties as the sample's own."""
    scores = dict(zip(greedy.groups.tolist(), scores_of(cfg, greedy).tolist(), strict=True))
    return torch.tensor([scores[row.prompt] for row in rollout.rows])
