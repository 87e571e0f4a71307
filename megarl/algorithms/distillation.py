"""On-policy distillation (GKD, 2306.13649; MiniLLM, 2306.08543): the policy learns, from a larger model's
log-probabilities of its own samples, to minimise KL(policy || teacher). A token's advantage is log pi_teacher - log
pi_old; discounts, groups and rewards have no part in it, and rewards are only reported.
"""

from __future__ import annotations

from functools import partial

from megarl import advantages
from megarl.algorithms.credit import give, step_of
from megarl.algorithms.onpolicy import another_model, attach, mean_metrics, prepare
from megarl.config import Config
from megarl.data.reading import DataError
from megarl.data.tokenizer import load_tokenizer
from megarl.losses.policy import grpo
from megarl.observe.run import Run
from megarl.parallel.mesh import Mesh


def train(cfg: Config, run: Run, mesh: Mesh) -> None:
    """As `megarl.algorithms.grpo`, with the teacher in place of rewards."""
    check_tokenizers(cfg)
    parts = prepare(cfg, run, mesh, reference=bool(cfg.loss.kl_loss_coef))
    with run.phase("load"):
        teacher = another_model(cfg, mesh, cfg.teacher.path)  # without an optimizer
    loss = partial(grpo, cfg=cfg.loss)
    for step in parts.each_step():
        with run.phase("step"):
            rollout = parts.sampler.rollout(parts.stream.next, step)
            batches = rollout.deal(cfg.train.train_global_batch_size)
            samples = [sample for batch in batches for sample in batch]
            parts.ref_logps(samples)
            with run.phase("old_logps"):
                attach("old_logps", parts.policy, samples)
            with run.phase("teacher_logps"):
                taught = [logps.cpu() for logps in teacher.logps(samples)]
            known = step_of(cfg, rollout, samples, mesh)
            old = advantages.pad([sample.old_logps.cpu() for sample in samples])
            metrics = rollout.metrics() | give(known, advantages.distillation(old, advantages.pad(taught), known.mask))
            metrics["actor/teacher_kl"] = -metrics["critic/advantages/mean"]  # k1, over tokens of the step
            with run.phase("train"):
                history = [
                    parts.policy.step(batch, loss, loss_agg_mode=cfg.loss.loss_agg_mode)
                    for _ in range(cfg.train.ppo_epochs)
                    for batch in batches
                ]
            metrics = parts.finish(step, metrics | mean_metrics(history))
        parts.report(step, metrics, rollout)
    parts.sampler.close()


def check_tokenizers(cfg: Config) -> None:
    """The teacher reads what the policy wrote: a token has to mean the same to both."""
    student, teacher = (load_tokenizer(cfg.model, path).get_vocab() for path in (None, cfg.teacher.path))
    if student != teacher:
        other = sorted(token for token in student.keys() | teacher.keys() if student.get(token) != teacher.get(token))
        raise DataError(
            f"teacher.path = {cfg.teacher.path} has another tokenizer than model.path = {cfg.model.path}: "
            f"{len(other)} tokens differ, such as {other[0]!r}; distillation by log-probabilities needs the same one"
        )
