"""FP8's rounding: counted by hand, and against torch's own conversion."""

import pytest
import torch

from megarl.model.precision import BLOCK, as_plain, underflow


def test_underflow_by_hand() -> None:
    """448 is e4m3's largest, so that the scale is 1; its smallest step is 2^-9, and half of it rounds to the even 0."""
    x = torch.tensor([[448.0, 1.0, 2.0**-9, 1.01 * 2.0**-10, 2.0**-10, 1e-6, 0.0, 0.0]])
    assert underflow(x, None) == 2 / 8


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_one_scale_as_torch_rounds(scale: float) -> None:
    torch.manual_seed(0)
    x = scale * torch.randn(64, 96).exp() * torch.randn(64, 96)
    x[3] *= 1e4
    rounded = (x * (448 / x.abs().max())).to(torch.float8_e4m3fn).float()
    share = ((rounded == 0) & (x != 0)).float().mean()
    assert share > 0.01
    assert underflow(x, None) == pytest.approx(share.item(), abs=1e-6)


@pytest.mark.parametrize("recipe", ["blockwise", "mxfp8"])
def test_blocks_keep_what_one_scale_loses(recipe: str) -> None:
    """One value of 1e6 takes its own block's small values along, and no other's."""
    block = BLOCK[recipe]
    assert block is not None
    x = torch.full((4, 3 * block), 0.1)
    x[0, 0] = 1e6
    assert underflow(x, None) == pytest.approx((x.numel() - 1) / x.numel())
    assert underflow(x, block) == pytest.approx((block - 1) / x.numel())


def test_the_last_block_may_be_short() -> None:
    assert underflow(torch.tensor([[1.0, 1e-9] * 20]), 32) == 0.5


def test_plain_parameters_stay_what_they_are() -> None:
    x = torch.nn.Parameter(torch.ones(3))
    assert as_plain(x).data_ptr() == x.data_ptr() and not as_plain(x).requires_grad
