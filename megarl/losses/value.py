"""The critic's loss. Values are of the state *before* each response token: the state that the policy chose it in."""

from __future__ import annotations

import torch
from torch import Tensor

from megarl.config import LossConfig
from megarl.data.records import MicroBatch


def value(values: Tensor, batch: MicroBatch, cfg: LossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """[T]: max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2) / 2, eps = ``value_clip``.

    OpenAI's PPO code and every system since; the maximum is the pessimistic one, so that a value which left the range
    away from R keeps its gradient. R is `advantages.gae`'s returns: from advantages before whitening. Without
    ``value_clip`` it is the squared error.
    """
    assert batch.returns is not None, "the loop computes returns before it trains the critic"
    values = torch.where(batch.loss_mask, values, 0)  # no gradient comes from what is masked, whatever is there
    error = (values - batch.returns).square()
    metrics = {"vpred_mean": values, "returns_mean": batch.returns}
    if cfg.value_clip is not None:
        assert batch.old_values is not None, "loss.value_clip is set, so the loop keeps the old values"
        near = torch.clamp(values, batch.old_values - cfg.value_clip, batch.old_values + cfg.value_clip)
        clipped = (near - batch.returns).square()
        metrics["vf_clipfrac"] = (clipped > error).float()
        error = torch.maximum(error, clipped)
    return error / 2, metrics | {"vf_loss": error / 2}
