"""Policy gradients without a critic. GRPO (DeepSeekMath, 2402.03300): sample a group of responses to each prompt, score
them, and make those above their group's mean likelier, by PPO's clipped surrogate.

Its relatives differ in ``advantage`` (RLOO, REINFORCE++, Dr. GRPO: `megarl.algorithms.credit`), in ``loss`` (DAPO's
bounds, GSPO, CISPO: `megarl.losses.policy`) and in which samples count (``rollout.dynamic_sampling``, ``reward``).
"""

from __future__ import annotations

from functools import partial

from megarl.algorithms.credit import ESTIMATORS, give, mean_kl, step_of
from megarl.algorithms.onpolicy import mean_metrics, prepare
from megarl.config import Config
from megarl.losses.policy import grpo
from megarl.observe.run import Run
from megarl.parallel.mesh import Mesh


def train(cfg: Config, run: Run, mesh: Mesh) -> None:
    """One rollout a step; one optimizer update for every ``train_global_batch_size`` of its samples, ``ppo_epochs``
    times."""
    parts = prepare(cfg, run, mesh, reference=bool(cfg.loss.kl_loss_coef or cfg.advantage.kl_coef))
    loss = partial(grpo, cfg=cfg.loss)
    for step in parts.each_step():
        with run.phase("step"):
            rollout = parts.sampler.rollout(parts.stream.next, step)
            batches = rollout.deal(cfg.train.train_global_batch_size)
            samples = [sample for batch in batches for sample in batch]
            parts.ref_logps(samples)
            parts.old_logps(samples, updates=len(batches) * cfg.train.ppo_epochs)
            with run.phase("adv"):
                known = step_of(cfg, rollout, samples, mesh, parts.kl.kl_coef)
                metrics = rollout.metrics() | give(known, ESTIMATORS[cfg.advantage.adv_estimator](known))
                if parts.kl.kl_coef:
                    metrics |= {"critic/kl": mean_kl(known), "critic/kl_coef": parts.kl.kl_coef}
                    parts.kl.update(metrics["critic/kl"], len(rollout.rows))
            with run.phase("train"):
                history = [
                    parts.policy.step(batch, loss, loss_agg_mode=cfg.loss.loss_agg_mode)
                    for _ in range(cfg.train.ppo_epochs)
                    for batch in batches
                ]
            metrics = parts.finish(step, metrics | mean_metrics(history))
        parts.report(step, metrics, rollout)
    parts.sampler.close()
