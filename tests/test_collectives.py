"""What a sample is made of arrives bit for bit."""

import dataclasses

import torch

from megarl.data.records import Sample
from megarl.parallel.collectives import _packed, _rebuild

# Something of every field; a new field has to be added here.
FULL = Sample(
    prompt_id="train.jsonl:17",
    index=3,
    tokens=[5, 2**31 - 1, 0, 7],
    prompt_length=1,
    rollout_logps=torch.tensor([-0.1, -0.2, -0.3]),
    old_logps=torch.tensor([-1.0, float("-inf"), float("nan")]),
    ref_logps=torch.tensor([-2.0, -2.5, -3.0], dtype=torch.bfloat16),
    loss_mask=torch.tensor([True, False, True]),
    advantage=0.5,
    advantages=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
    values=torch.zeros(3),
    returns=torch.empty(0),
    score=0.25,
    desirable=False,
    row=11,
)


def equal(a: Sample, b: Sample) -> bool:
    for field in dataclasses.fields(Sample):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, torch.Tensor):
            if x.dtype != y.dtype or x.shape != y.shape or not torch.equal(x.nan_to_num(), y.nan_to_num()):
                return False
        elif x != y:
            return False
    return True


def test_every_field_survives():
    bare = Sample("p", 0, [1, 2], 1)
    headers, bodies = zip(*map(_packed, [FULL, bare, FULL]), strict=True)
    body = torch.cat([torch.from_numpy(part) for part in bodies])
    arrived = _rebuild(list(headers), body)
    assert all(equal(a, b) for a, b in zip(arrived, [FULL, bare, FULL], strict=True))
    assert len(body) < 200  # bytes: tokens and tensors alone
