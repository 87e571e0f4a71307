"""PPO with a critic (1707.06347; of language models: 1909.08593, 2203.02155): a value before every token, generalised
advantages from them, and PPO's clipped surrogate for the policy. The critic learns the returns of the same samples."""

from __future__ import annotations

from functools import partial

from megarl import advantages
from megarl.algorithms.credit import give, mean_kl, spread, step_of
from megarl.algorithms.onpolicy import attach, mean_metrics, number_of_steps, prepare
from megarl.algorithms.redeal import Redeal
from megarl.config import Config
from megarl.config.critic import critic_as_policy
from megarl.losses.policy import grpo
from megarl.losses.value import value
from megarl.model.engine import Engine
from megarl.model.family import read_spec
from megarl.observe.run import Run
from megarl.parallel.mesh import Mesh, another_layout


def train(cfg: Config, run: Run, mesh: Mesh) -> None:
    """As `megarl.algorithms.grpo`, with the critic's update before the policy's. In the first
    ``critic.critic_warmup_steps`` steps the critic alone learns."""
    parts = prepare(cfg, run, mesh, reference=bool(cfg.loss.kl_loss_coef or cfg.advantage.kl_coef))
    with run.phase("load"):
        critic = critic_of(cfg, mesh, number_of_steps(cfg, len(parts.stream.items))[1])
        share = Redeal(mesh, critic.mesh, critic.flops.cost)
    credit = cfg.advantage
    policy_loss, value_loss = partial(grpo, cfg=cfg.loss), partial(value, cfg=cfg.loss)
    for step in parts.each_step(critic=critic):
        with run.phase("step"):
            rollout = parts.sampler.rollout(parts.stream.next, step)
            batches = rollout.deal(cfg.train.train_global_batch_size)
            samples = [sample for batch in batches for sample in batch]
            parts.ref_logps(samples)
            parts.old_logps(samples, updates=len(batches) * cfg.train.ppo_epochs)
            with run.phase("values"):
                dealt = [sample for batch in share.give(batches) for sample in batch]
                attach("values", critic, dealt)
                share.take_back("values", dealt, samples)
            with run.phase("adv"):
                known = step_of(cfg, rollout, samples, mesh, parts.kl.kl_coef)
                values = advantages.pad([sample.values.cpu() for sample in samples])
                advantage, returns = advantages.gae(
                    known.token_rewards, values, known.mask, gamma=credit.gamma, gae_lambda=credit.gae_lambda
                )
                for sample, row in zip(samples, returns, strict=True):
                    sample.returns = row[: sample.response_length]
                metrics = rollout.metrics() | spread("critic/values", values[known.mask], known)
                metrics |= give(known, known.whiten(advantage) if credit.normalize_advantages else advantage)
                if parts.kl.kl_coef:
                    metrics |= {"critic/kl": mean_kl(known), "critic/kl_coef": parts.kl.kl_coef}
                    parts.kl.update(metrics["critic/kl"], len(rollout.rows))
            updates = [batch for _ in range(cfg.train.ppo_epochs) for batch in batches]
            with run.phase("train"):
                learnt = share.give(batches)
                critics = [critic.step(batch, value_loss) for _ in range(cfg.train.ppo_epochs) for batch in learnt]
                metrics |= mean_metrics(critics, "critic")
                if step > cfg.critic.critic_warmup_steps:
                    mode = cfg.loss.loss_agg_mode
                    policies = [parts.policy.step(batch, policy_loss, loss_agg_mode=mode) for batch in updates]
                    metrics |= mean_metrics(policies)
            metrics = parts.finish(step, metrics)
        parts.report(step, metrics, rollout)
    parts.sampler.close()


def critic_of(cfg: Config, mesh: Mesh, updates: int) -> Engine:
    """The critic: a model of its own with a scalar head, from its own checkpoint (the policy's, without one), with its
    own optimizer; in the policy's layout, or with ``critic.own_layout`` in another of the same ranks."""
    own = critic_as_policy(cfg)
    layout = another_layout(own, mesh) if cfg.critic.own_layout else mesh
    return Engine(own, layout, read_spec(own.model.path).with_scalar_head(), temperature=1.0, total_updates=updates)
