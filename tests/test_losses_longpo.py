"""LongPO on packed pairs: the preference of responses, the likelihood of the whole chosen sequence."""

import math

import pytest
import torch

from megarl.algorithms.preference import on_long_prompts, short_samples
from megarl.config import PreferenceConfig
from megarl.data.packing import pack
from megarl.data.preferences import Pair
from megarl.losses.preference import longpo_tokens

PAIR = Pair("p", [3, 4, 5, 6, 1], [3, 4, 5, 7, 8, 1], 3, reference_prompt=[4])  # prompt 3 4 5, responses 6 1 and 7 8 1


def test_the_reference_reads_the_short_prompt():
    chosen, rejected = short_samples(PAIR)
    assert (chosen.tokens, rejected.tokens, chosen.prompt_length) == ([4, 6, 1], [4, 7, 8, 1], 1)


def test_longpo_by_hand():
    """beta = 1, lambda = 2. D_w = -1 + 2 = 1, D_l = -3 + 1.5 = -1.5; the chosen sequence costs 1.3 / 4."""
    short = short_samples(PAIR)
    short[0].ref_logps, short[1].ref_logps = torch.tensor([-1.5, -0.5]), torch.tensor([-0.5, -0.5, -0.5])
    batch = pack(on_long_prompts([PAIR], short), torch.device("cpu"), loss_agg_mode="seq-mean-token-mean")
    # Chosen: two tokens of prompt, two of response. Rejected: two of prompt, which do not count, three of response.
    logps = torch.tensor([-0.1, -0.2, -0.6, -0.4, -9.0, -9.0, -1.0, -1.0, -1.0], requires_grad=True)
    cfg = PreferenceConfig(loss="longpo", beta=1.0, longpo_lambda=2.0)
    loss, metrics = longpo_tokens(logps, batch, cfg, {"p": 3})
    total = (batch.weights * torch.where(batch.loss_mask, loss, 0)).sum() / batch.count
    total.backward()
    assert total.item() == pytest.approx(2 * math.log1p(math.exp(-2.5)) + 1.3 / 4)
    pull = 2 / (1 + math.exp(2.5))
    assert logps.grad.tolist() == pytest.approx([-0.25, -0.25, -0.25 - pull, -0.25 - pull, 0, 0, pull, pull, pull])
    assert metrics["rewards/margins"][0].item() == pytest.approx(2.5)
