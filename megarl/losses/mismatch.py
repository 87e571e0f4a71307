"""How far the engine that sampled is from the model that trains: the health check of every weight push.

Both measures are NeMo-RL's, over response tokens, of d = trainer's log-probability - engine's. With equal weights they
show rounding only: on a CPU in fp32 about 1e-12 and 1 + 1e-6; in bf16 a ``gen_kl_error`` below 1e-3 is healthy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megarl.config import WeightSyncConfig

MISMATCH_METRICS = ("gen_kl_error", "token_mult_prob_error", "rollout_probs_diff_mean")
FRESH = "fresh_fraction"


class MismatchError(RuntimeError):
    """vLLM does not compute what megatron computes."""


def mismatch(trainer_logps: Tensor, rollout_logps: Tensor, fresh: Tensor) -> dict[str, Tensor]:
    """[T] each: k3 estimate of KL(engine || trainer), exp |d|, and the absolute difference of probabilities.

    Tokens of older weights than the trainer's, which are not ``fresh``, would show how far it has moved since: they
    are 0, and `of_fresh` makes the means of all tokens means of fresh ones.
    """
    d = (trainer_logps - rollout_logps).detach()
    measures = {
        "gen_kl_error": torch.expm1(d) - d,
        "token_mult_prob_error": d.abs().exp(),
        "rollout_probs_diff_mean": (trainer_logps.detach().exp() - rollout_logps.exp()).abs(),
    }
    return {name: torch.where(fresh, x, 0) for name, x in measures.items()} | {FRESH: fresh.float()}


def of_fresh(means: dict[str, float]) -> dict[str, float]:
    """Means in which the measures are of fresh tokens alone; without these where there is no such token."""
    share = means.get(FRESH, 1.0)
    rest = {name: mean for name, mean in means.items() if name not in (FRESH, *MISMATCH_METRICS)}
    measured = {name: means[name] / share for name in MISMATCH_METRICS if name in means} if share else {}
    return rest | measured


def check_mismatch(metrics: dict[str, float], cfg: WeightSyncConfig) -> None:
    """Raise MismatchError where a step's mismatch is over the configured threshold."""
    for name, limit in (
        ("gen_kl_error", cfg.max_gen_kl_error),
        ("token_mult_prob_error", cfg.max_token_mult_prob_error),
    ):
        # A step in which only the critic learns measures nothing.
        if limit is not None and name in metrics and not metrics[name] <= limit:
            raise MismatchError(
                f"{name} is {metrics[name]:.3e}, over weight_sync.max_{name}={limit:g}: vLLM samples from another "
                "distribution than the trainer computes. Look at the weights it got (a wrong rule, a push cut short), "
                "at sampling that only vLLM applies (rollout.top_p, rollout.top_k, a temperature that differs), and at "
                "dtypes (rollout.dtype against model.dtype)"
            )
