"""What a rank of a vLLM engine keeps of a tensor: every row of a vocabulary reaches the rank whose part it is in."""

from __future__ import annotations

import pytest

from megarl.model.family import EMBEDDING
from megarl.rollout.vllm_layout import kept_by
from megarl.weights.plan import Box
from tests.test_rules import spec_of


@pytest.mark.parametrize(
    ("vocab_size", "tp_size", "boxes"),
    [
        (256, 2, [Box(0, 128), Box(128, 256)]),
        (100, 2, [Box(0, 64), Box(64, 100)]),  # vLLM pads to 128
        # Padded to 64: the second rank's rows are all padding, yet vLLM waits for the tensor.
        (40, 2, [Box(0, 32), Box(32, 40)]),
        (20, 2, [Box(0, 20), Box(19, 20)]),
    ],
)
def test_vocabulary(vocab_size, tp_size, boxes):
    spec = spec_of("llama", vocab_size=vocab_size)
    [embedding] = [tensor for tensor in spec.tensors() if tensor.name == EMBEDDING]
    kept = kept_by(spec, tp_size)
    assert [kept(rank, embedding, "model.embed_tokens.weight") for rank in range(tp_size)] == boxes
