"""Per-token estimators of KL(policy || reference) from samples of the policy (Schulman,
joschu.net/blog/kl-approx.html)."""

from __future__ import annotations

import torch
from torch import Tensor

# e^20 per token is far outside any clip range; beyond e^88 fp32 overflows. A clamped ratio has no gradient.
MAX_LOG_RATIO = 20.0


def kl(
    logps: Tensor, ref_logps: Tensor, kl_type: str, gradient: str = "estimator", old_logps: Tensor | None = None
) -> Tensor:
    """[T] estimates, with gradient through ``logps``. Writing d = logps - ref_logps:

    ====  ==================  =======================================  ==========
    name  value                                                        derivative
    ====  ==================  =======================================  ==========
    k1    d                   unbiased, may be negative                1
    k2    d^2 / 2             biased                                   d
    k3    exp(-d) - 1 + d     unbiased and never negative; GRPO's      1 - exp(-d)
                              (2402.03300, eq. 4)
    ====  ==================  =======================================  ==========

    The gradient of the divergence itself is E[d grad logps] (2506.09477). As a loss, k1 has gradient zero in
    expectation, k2 the right one, k3 that of KL(reference || policy) to first order. ``gradient`` says which to take:

    ``estimator``       the derivative in the table.
    ``score_function``  the value in the table, with estimate + derivative as its slope: the estimate times
                        exp(logps - logps'), logps' without gradient, differentiates to that (2506.09477; NeMo-RL). Of
                        k3 it is exactly d, so that value k3 comes with k2's gradient; of k1 it is d + 1.
    ``importance``      value and slope weighed by q = policy / old policy, for samples of ``old_logps`` after updates
                        (DeepSeek-V3.2, 2512.02556; TRL's use_bias_correction_kl). Without ``old_logps`` q is 1.

    k3 of a reference that is e^20 times likelier is capped there: its exponential would swamp the step. Such a token
    has no ``estimator`` gradient, and d as the others'. Raises ValueError for another name.
    """
    d = logps - ref_logps
    value = _estimate(d, kl_type)
    if gradient == "estimator":
        return value
    if gradient not in ("score_function", "importance"):
        raise ValueError(f"kl_gradient {gradient!r} is none of estimator, score_function, importance")
    slope = {"k1": d + 1, "k2": d.square() / 2 + d, "k3": d}[kl_type]
    if gradient == "importance" and old_logps is not None:
        weight = (logps - old_logps).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        value, slope = weight * value, weight * slope
    return value.detach() + slope.detach() * (logps - logps.detach())


def _estimate(d: Tensor, kl_type: str) -> Tensor:
    if kl_type == "k1":
        return d
    if kl_type == "k2":
        return d.square() / 2
    if kl_type == "k3":
        d = d.clamp(min=-MAX_LOG_RATIO)
        return torch.expm1(-d) + d
    raise ValueError(f"kl_type {kl_type!r} is none of k1, k2, k3")
