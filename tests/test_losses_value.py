"""The critic's loss, by hand."""

import pytest
import torch

from megarl.config import LossConfig
from megarl.data.packing import pack
from megarl.data.records import Sample
from megarl.losses.value import value


def loss_of(predicted, returns, old, cfg):
    n = len(predicted)
    sample = Sample("p", 0, [0] * (n + 1), 1, values=torch.tensor(old), returns=torch.tensor(returns))
    values = torch.tensor(predicted, dtype=torch.float64, requires_grad=True)
    loss, metrics = value(values, pack([sample], torch.device("cpu")), cfg)
    loss.sum().backward()
    return loss.tolist(), values.grad.tolist(), metrics


@pytest.mark.parametrize(
    "predicted, target, loss, gradient",
    [
        (1.25, 2.0, 0.5 * 0.75**2, -0.75),  # within 1 +- 0.5
        (3.0, 2.0, 0.5 * 1.0**2, 1.0),  # left upwards, past R: (3 - 2)^2 is more than (1.5 - 2)^2, and pulls back
        (1.75, 2.0, 0.5 * 0.5**2, 0.0),  # left upwards, towards R: clipped at 1.5, no gradient
        (0.0, 2.0, 0.5 * 2.0**2, -2.0),  # left downwards, away from R: keeps its gradient
        (0.25, 0.0, 0.5 * 0.5**2, 0.0),  # left downwards, towards R: clipped at 0.5
    ],
)
def test_value_loss_around_an_old_value_of_one(predicted, target, loss, gradient):
    losses, gradients, metrics = loss_of([predicted], [target], [1.0], LossConfig(value_clip=0.5))
    assert losses == pytest.approx([loss]) and gradients == pytest.approx([gradient])
    assert metrics["vf_clipfrac"].tolist() == [float(gradient == 0)]


def test_without_a_clip_it_is_half_the_squared_error():
    losses, gradients, metrics = loss_of([3.0, -1.0], [1.0, 1.0], [0.0, 0.0], LossConfig(value_clip=None))
    assert losses == [2.0, 2.0] and gradients == [2.0, -2.0]
    assert "vf_clipfrac" not in metrics and metrics["vf_loss"].tolist() == [2.0, 2.0]
