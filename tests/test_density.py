"""BCO's classifier of prompts."""

import pytest
import torch

from megarl.data.density import desirable_probability, prompt_vectors
from megarl.losses.unpaired import density_ratio


def test_a_prompt_is_the_relative_frequencies_of_its_tokens():
    (row,) = prompt_vectors([[7, 7, 9, 11]])
    assert sorted(row[row > 0].tolist()) == pytest.approx([0.25, 0.25, 0.5, 1.0])  # the last is the constant


def test_prompts_that_say_nothing_get_the_share_of_desirable_ones():
    p = desirable_probability([[5, 6]] * 8, [True] * 6 + [False] * 2)
    # The constant is free of the ridge, and so fits the share exactly; the other weights are of no use.
    assert p.tolist() == pytest.approx([0.75] * 8, abs=1e-5)
    assert density_ratio(p)[0].item() == pytest.approx(3.0, rel=1e-3)


def test_prompts_that_tell_get_another_weight():
    prompts = [[5, 6, 7]] * 50 + [[50, 60, 70]] * 50
    p = desirable_probability(prompts, [True] * 45 + [False] * 5 + [True] * 10 + [False] * 40)
    assert p[0] > 0.6 > 0.4 > p[99] and torch.equal(p[0].expand(50), p[:50])
