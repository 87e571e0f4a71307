"""How likely a prompt is to be that of a desirable response: BCO's classifier of prompts (2404.04656).

Contract: a pure function of tokens and labels, the same on every rank. A prompt is a vector of its tokens' relative
frequencies, hashed into a fixed number of places; on these, logistic regression with a ridge of 1, as scikit-learn has
by default (TRL uses that on embeddings of an encoder). It sees which words the prompts of either
kind have, not what they mean.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

PLACES = 512
_PRIME = 2_654_435_761  # Knuth's multiplier: neighbouring token ids go to places far apart


def prompt_vectors(prompts: list[list[int]]) -> Tensor:
    """[n, PLACES + 1] float64, the last of them 1."""
    out = torch.zeros(len(prompts), PLACES + 1, dtype=torch.float64)
    out[:, -1] = 1
    for row, tokens in zip(out, prompts, strict=True):
        places = torch.tensor([token * _PRIME % 2**32 % PLACES for token in tokens])
        row.index_add_(0, places, torch.full((len(tokens),), 1 / max(len(tokens), 1), dtype=torch.float64))
    return out


def desirable_probability(prompts: list[list[int]], desirable: list[bool]) -> Tensor:
    """[n] P(desirable | prompt), in (0, 1)."""
    x, y = prompt_vectors(prompts), torch.tensor(desirable, dtype=torch.float64)
    weights = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weights], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x @ weights, y, reduction="sum") + weights[:-1].square().sum() / 2
        loss.backward()
        return loss

    solver.step(objective)
    return torch.sigmoid(x @ weights.detach())
