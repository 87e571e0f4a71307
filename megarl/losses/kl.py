"""Per-token estimators of KL(policy || reference) from samples of the policy (Schulman,
joschu.net/blog/kl-approx.html)."""

from __future__ import annotations

import torch
from torch import Tensor


def kl(logps: Tensor, ref_logps: Tensor, kl_type: str) -> Tensor:
    """[T] estimates, with gradient through ``logps``. Writing d = logps - ref_logps:

    ====  ==================  ==========================================================
    k1    d                   unbiased, may be negative; as a loss its gradient is zero in expectation
    k2    d^2 / 2             biased value, the gradient of KL in expectation
    k3    exp(-d) - 1 + d     unbiased and never negative; GRPO's (2402.03300, eq. 4)
    ====  ==================  ==========================================================

    k3 of a reference that is e^20 times likelier is capped there: its exponential would swamp the step. Such a token
    has no KL gradient. Raises ValueError for another name.
    """
    d = logps - ref_logps
    if kl_type == "k1":
        return d
    if kl_type == "k2":
        return d.square() / 2
    if kl_type == "k3":
        d = d.clamp(min=-20)
        return torch.expm1(-d) + d
    raise ValueError(f"kl_type {kl_type!r} is none of k1, k2, k3")
