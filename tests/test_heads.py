"""The chunked head against plain autograd on whole logits, in fp32, values and gradients."""

import math

import pytest
import torch

from megarl.model import heads
from megarl.model.heads import VocabShard, token_logprobs


@pytest.mark.parametrize("chunk, block", [(3, 4), (3, 100), (100, 5), (100, 17), (100, 100)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("padding", [0, 5])
def test_values_and_gradients_equal_autograd(chunk, block, temperature, padding, monkeypatch):
    monkeypatch.setattr(heads, "VOCABULARY_BLOCK", block)
    torch.manual_seed(0)
    n, h, v = 11, 8, 17
    targets = torch.randint(0, v, (n,))
    up, down = torch.randn(n), torch.randn(n)  # gradients that arrive at logps and entropy
    hidden, weight = torch.randn(n, h, requires_grad=True), torch.randn(v + padding, h, requires_grad=True)
    logps, entropy = token_logprobs(hidden, weight, targets, VocabShard(0, v, None), temperature, chunk)
    (logps @ up + entropy @ down).backward()

    plain_hidden, plain_weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    log_p = torch.log_softmax(plain_hidden @ plain_weight[:v].T / temperature, -1)
    expected, expected_entropy = log_p[torch.arange(n), targets], -(log_p.exp() * log_p).sum(-1)
    (expected @ up + expected_entropy @ down).backward()

    close = {"rtol": 1e-5, "atol": 2e-6}
    torch.testing.assert_close(logps, expected, **close)
    torch.testing.assert_close(entropy, expected_entropy, **close)
    torch.testing.assert_close(hidden.grad, plain_hidden.grad, **close)
    torch.testing.assert_close(weight.grad, plain_weight.grad, **close)


def test_no_selected_token():
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    logps, _ = token_logprobs(hidden, weight, torch.zeros(0, dtype=torch.int64), VocabShard(0, 6, None), 1.0, 8)
    logps.sum().backward()
    assert logps.shape == (0,) and weight.grad.abs().sum() == 0


@pytest.mark.parametrize("block", [1, 2, 3])
def test_logits_far_apart_do_not_overflow(block, monkeypatch):
    monkeypatch.setattr(heads, "VOCABULARY_BLOCK", block)
    hidden, weight = torch.tensor([[1e4]]), torch.tensor([[1.0], [0.0], [-1.0]])
    logps, entropy = token_logprobs(hidden, weight, torch.tensor([0]), VocabShard(0, 3, None), 1.0, 8)
    assert logps.item() == 0.0 and entropy.item() == 0.0


@pytest.mark.parametrize("block", [1, 3, 4])
def test_probabilities_that_bf16_and_fp32_cannot_hold(block, monkeypatch):
    """Logits 0, -96, -200 and -1024 behind a bf16 head: e^-96 is less than the least normal number of bf16 and fp32,
    the others are 0. Log-probs are the logits to the bit, entropy is 97 e^-96 at most, and d logp[k] / d hidden =
    w[k] - w[0], but for terms of 96^2 e^-96."""
    monkeypatch.setattr(heads, "VOCABULARY_BLOCK", block)
    weight = torch.tensor([[0.0, 1.0], [-96.0, 1.0], [-200.0, 1.0], [-1024.0, 1.0]], dtype=torch.bfloat16)
    hidden = torch.tensor([[1.0, 0.0]] * 4, dtype=torch.bfloat16, requires_grad=True)
    weight.requires_grad_()
    logps, entropy = token_logprobs(hidden, weight, torch.arange(4), VocabShard(0, 4, None), 1.0, 3)
    assert logps.tolist() == [0, -96, -200, -1024]
    assert all(0 <= value <= 97 * math.exp(-96) for value in entropy.tolist())
    (logps.sum() + entropy.sum()).backward()
    expected = torch.tensor([[0.0, 0], [-96, 0], [-200, 0], [-1024, 0]], dtype=torch.bfloat16)
    torch.testing.assert_close(hidden.grad, expected, rtol=0, atol=1e-36)
    # Four targets, one a row; each row takes its whole probability from token 0.
    expected = torch.tensor([[-3.0, 0], [1, 0], [1, 0], [1, 0]], dtype=torch.bfloat16)
    torch.testing.assert_close(weight.grad, expected, rtol=0, atol=1e-36)
