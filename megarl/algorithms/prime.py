"""PRIME (2502.01456): process rewards from a model that is trained on outcomes alone, online. With each step's samples
it learns to tell right responses from wrong ones by beta log(pi / pi_ref), summed over tokens; of a token, that is the
reward. Advantages compare both rewards with the other samples of the group; then PPO's clip.

The paper keeps prompts that are neither too easy nor too hard: ``rollout.dynamic_sampling``, its bounds 0.2 and 0.8.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from megarl import advantages
from megarl.algorithms.credit import Step, give, step_of
from megarl.algorithms.onpolicy import another_model, attach, mean_metrics, number_of_steps, prepare
from megarl.config import Config
from megarl.data.records import Sample
from megarl.losses.policy import grpo
from megarl.losses.reward_model import implicit_process_reward_tokens
from megarl.model.engine import Engine
from megarl.observe.run import Run
from megarl.parallel.mesh import Mesh
from megarl.rewards import RewardError
from megarl.rollout.table import Rollout


def train(cfg: Config, run: Run, mesh: Mesh) -> None:
    """Algorithm 1, with the reward model's update before the policy's. Outcomes are the step's rewards, in [0, 1]."""
    parts = prepare(cfg, run, mesh, reference=bool(cfg.loss.kl_loss_coef))
    with run.phase("load"):
        updates = number_of_steps(cfg, len(parts.stream.items))[1]
        prm = another_model(cfg, mesh, cfg.prime.path, cfg.prime.optimizer, updates)
        anchor = prm.weights()
    policy_loss, prm_loss = partial(grpo, cfg=cfg.loss), partial(implicit_process_reward_tokens, beta=cfg.prime.beta)
    for step in parts.each_step(prm=prm):
        with run.phase("step"):
            rollout = parts.sampler.rollout(parts.stream.next, step)
            batches = rollout.deal(cfg.train.train_global_batch_size)
            samples = [sample for batch in batches for sample in batch]
            parts.old_logps(samples, updates=len(batches) * cfg.train.ppo_epochs)
            known = step_of(cfg, rollout, samples, mesh)
            check_outcomes(known.scores, rollout)
            with run.phase("prm"):
                for sample in samples:
                    sample.score = known.scores[sample.row].item()
                with prm.holding(anchor):
                    attach("ref_logps", prm, samples)
                learnt = [prm.step(batch, prm_loss, loss_agg_mode="seq-mean-token-mean") for batch in batches]
                advantage = advantages_of(cfg, known, process_rewards(prm, samples, cfg.prime.beta))
            parts.ref_logps(samples)  # the policy's reference, in the place of the reward model's
            metrics = rollout.metrics() | mean_metrics(learnt, "prm") | give(known, advantage)
            with run.phase("train"):
                history = [
                    parts.policy.step(batch, policy_loss, loss_agg_mode=cfg.loss.loss_agg_mode)
                    for _ in range(cfg.train.ppo_epochs)
                    for batch in batches
                ]
            metrics = parts.finish(step, metrics | mean_metrics(history))
        parts.report(step, metrics, rollout)
    parts.sampler.close()


def check_outcomes(outcomes: Tensor, rollout: Rollout) -> None:
    """The process reward model's targets are probabilities. Raises RewardError for one that is none."""
    outside = [row for row, inside in zip(rollout.rows, (0 <= outcomes) & (outcomes <= 1), strict=True) if not inside]
    if outside:
        first = outside[0]
        score = outcomes[rollout.rows.index(first)].item()
        raise RewardError(
            f"prompt {first.prompt_id}, sample {first.index}: prime's outcome is {score:g}, outside [0, 1]; "
            f"so are {len(outside) - 1} others of this step. Change reward.functions, their weights, or the penalties "
            "in reward"
        )


def process_rewards(prm: Engine, samples: Sequence[Sample], beta: float) -> Tensor:
    """[n, L]: beta log(pi / pi_ref) of the model as it is now."""
    now = prm.logps(list(samples))
    then = [sample.ref_logps for sample in samples]
    return advantages.pad([beta * (a - b).cpu() for a, b in zip(now, then, strict=True) if b is not None])


def advantages_of(cfg: Config, step: Step, rewards: Tensor) -> Tensor:
    """[n, L]; a group's samples may be on several replicas, which tell each other their means."""
    advantage = advantages.prime(
        rewards,
        step.scores,
        step.groups,
        step.mask,
        gamma=cfg.advantage.gamma,
        process_coef=cfg.prime.process_coef,
        outcome_coef=cfg.prime.outcome_coef,
        here=step.here,
        means=step.everywhere(advantages.process_means(rewards, step.mask)),
    )
    return step.whiten(advantage) if cfg.advantage.normalize_advantages else advantage
