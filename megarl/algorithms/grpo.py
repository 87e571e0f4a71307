"""GRPO (DeepSeekMath, 2402.03300): sample a group of responses to each prompt, score them, and make those above their
group's mean likelier, by PPO's clipped surrogate. With ``advantage.normalize_by_std=false`` and
``loss.loss_agg_mode=seq-mean-token-sum-norm`` it is Dr. GRPO (2503.20783).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

from torch import Tensor
from transformers import AutoTokenizer

from megarl import advantages
from megarl.algorithms.sft import due, save_if_due
from megarl.config import Config
from megarl.data.prompts import Prompt, PromptStream, load_prompts
from megarl.data.records import Sample
from megarl.losses.mismatch import MISMATCH_METRICS, check_mismatch
from megarl.losses.policy import grpo
from megarl.model.engine import Engine, HostWeights
from megarl.model.family import read_spec
from megarl.observe.run import Run
from megarl.parallel.mesh import Mesh
from megarl.rollout.sampler import Sampler
from megarl.weights.sync import push, to_engines


def train(cfg: Config, run: Run, mesh: Mesh) -> None:
    """One rollout a step; one optimizer update for every ``train_global_batch_size`` of its samples, ``ppo_epochs``
    times."""
    with run.phase("load"):
        tokenizer = AutoTokenizer.from_pretrained(cfg.model.path)
        prompts = load_prompts(cfg.data, tokenizer)
        run.dropped(prompts.dropped, kept=len(prompts))
        held_out = load_prompts(cfg.data, tokenizer, validation=True) if cfg.data.val_path else []
        held_out = held_out[: cfg.validation.max_val_samples]
        stream = PromptStream(prompts, cfg.run.seed, cfg.data.shuffle)
        steps, updates = number_of_steps(cfg, len(prompts))
        sampler = Sampler(cfg, mesh, tokenizer, run.phases)
        spec = read_spec(cfg.model.path)
        policy = Engine(cfg, mesh, spec, temperature=cfg.rollout.temperature, total_updates=updates)
        reference = HostWeights(policy.model) if cfg.loss.kl_loss_coef else None
        deal = to_engines(policy.spec, mesh, cfg.rollout.tensor_parallel_size)
        weights = policy.stream(cfg.weight_sync.bucket_size_mb << 20, deal)
        push(weights, sampler.engine, verify=cfg.weight_sync.verify)
    if held_out and cfg.validation.val_at_start:
        run.report(0, steps, validate(run, sampler, held_out, step=0))

    loss = partial(grpo, cfg=cfg.loss)
    for step in range(1, steps + 1):
        with run.phase("step"):
            rollout = sampler.rollout(stream.next(cfg.rollout.num_prompts_per_step), step)
            advantage = advantages.grpo(rollout.rewards, rollout.groups, **dataclasses.asdict(cfg.advantage))
            batches = rollout.deal(advantage, cfg.train.train_global_batch_size)
            if reference:
                with run.phase("ref_logps"), policy.holding(reference):
                    attach("ref_logps", policy, batches)
            if len(batches) * cfg.train.ppo_epochs > 1:  # with a single update the policy is its own old policy
                with run.phase("old_logps"):
                    attach("old_logps", policy, batches)
            with run.phase("train"):
                history = [
                    policy.step(batch, loss, loss_agg_mode=cfg.loss.loss_agg_mode)
                    for _ in range(cfg.train.ppo_epochs)
                    for batch in batches
                ]
            last = step == steps
            save_if_due(cfg, run, policy, step, last=last)  # while vLLM sleeps: there is room for whole tensors
            with run.phase("sync"):
                push(weights, sampler.engine, verify=cfg.weight_sync.verify)
            metrics = rollout.metrics() | spread(advantage) | actor_metrics(history)
            if held_out and (due(step, cfg.validation.val_period) or (last and cfg.validation.val_at_end)):
                metrics |= validate(run, sampler, held_out, step)
        run.report(step, steps, metrics, rollout.lengths, epochs=cfg.train.ppo_epochs)
        run.events(step, rollout.errors)
        check_mismatch(metrics, cfg.weight_sync)
    sampler.close()


def validate(run: Run, sampler: Sampler, held_out: Sequence[Prompt], step: int) -> dict[str, float]:
    """Metrics of the held-out prompts under the weights that were pushed last."""
    with run.phase("validate"):
        metrics, errors = sampler.validate(held_out)
    run.events(step, errors)
    return metrics


def number_of_steps(cfg: Config, num_prompts: int) -> tuple[int, int]:
    """(rollout steps, optimizer updates) of the run."""
    per_step = cfg.rollout.num_prompts_per_step
    steps = max(1, cfg.run.max_num_epochs * num_prompts // per_step)
    steps = min(steps, cfg.run.max_num_steps or steps)
    samples = per_step * cfg.rollout.num_generations_per_prompt
    return steps, steps * cfg.train.ppo_epochs * -(-samples // cfg.train.train_global_batch_size)


def attach(name: str, policy: Engine, batches: list[list[Sample]]) -> None:
    """Compute log-probabilities with the policy's present weights and keep them on the samples as ``name``."""
    samples = [sample for batch in batches for sample in batch]
    for sample, logps in zip(samples, policy.logps(samples), strict=True):
        setattr(sample, name, logps)


def actor_metrics(history: list[dict[str, float]]) -> dict[str, float]:
    """Means over the step's updates. The mismatch is the rollout's, so it keeps its own names."""
    means = {name: sum(update[name] for update in history) / len(history) for name in history[0]}
    return {name if name in MISMATCH_METRICS else f"actor/{name}": value for name, value in means.items()}


def spread(advantage: Tensor) -> dict[str, float]:
    return {f"critic/advantages/{name}": getattr(advantage, name)().item() for name in ("mean", "max", "min")}
