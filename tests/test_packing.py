"""Packing: plans by hand and by property, and the tensors of a small microbatch written out."""

import timeit

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megarl.data.packing import balance, microbatches_of, pack, packs_of, token_weights
from megarl.data.records import Sample
from megarl.model.flops import ModelFlops

CPU = torch.device("cpu")
lengths_of = st.lists(st.integers(1, 50), min_size=1, max_size=60)


def test_balance_by_hand():
    # Longest first to the lightest: 8 | 7 | then 6 to the 7? No: to the empty third, 5 to 6, 4 to 7.
    assert balance([4, 8, 6, 7, 5], 3) == [[1], [0, 3], [2, 4]]


@given(lengths_of, st.integers(1, 8))
def test_balance_deals_everything_once_and_evenly(lengths, parts):
    groups = balance(lengths, parts)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    totals = [sum(lengths[i] for i in group) for group in groups]
    # Graham's bound against the largest of the two lower bounds of any deal.
    best = max(max(lengths), -(-sum(lengths) // parts))
    assert max(totals) <= 4 / 3 * best + max(lengths) / 3


@given(lengths_of, st.integers(50, 200))
def test_microbatches_respect_the_budget(lengths, budget):
    groups = microbatches_of(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in group) <= budget for group in groups)


def test_as_few_ranks_share_a_sequence_as_hold_it():
    """Of four ranks with 16 positions each. 60 positions take all four (60 to a multiple of 8 is 64 = 4 x 16), 30 take
    two (32 = 2 x 16), and those of up to 16 one each, the dearer ones to the ranks that have less to do."""
    lengths = [60, 30, 16, 12, 10, 10]
    packs = packs_of([[n] for n in lengths], 16, lengths, ranks=4, dynamic=True)
    assert [(one.items, one.size, one.first) for one in packs] == [
        ([0], 4, 0),
        ([1], 2, 0),
        # Ranks have 15 + 15, 30, 15 and 15 positions' work by now. 16 goes to the third, 12 to the fourth, 10 too (that
        # has 27 then), in a pack of its own, and the last one to the first.
        ([5], 1, 0),
        ([2], 1, 2),
        ([3], 1, 3),
        ([4], 1, 3),
    ]
    assert [one.is_on(1) for one in packs] == [True, True, False, False, False, False]
    whole = packs_of([[n] for n in lengths], 16, lengths, ranks=4)
    assert {(one.size, one.first) for one in whole} == {(4, 0)}


def test_a_short_sequence_that_is_all_the_work_is_shared():
    """One sequence of 16 fits each rank. On one of them the other would wait: half of the work is 8."""
    (one,) = packs_of([[16]], 16, [16.0], ranks=2, dynamic=True)
    assert one.size == 2
    assert [one.size for one in packs_of([[16], [16]], 16, [16.0, 16.0], ranks=2, dynamic=True)] == [1, 1]


@given(lengths_of, st.sampled_from([1, 2, 4, 8]), st.booleans())
def test_packs_have_every_sequence_once_and_fit(lengths, ranks, dynamic):
    packs = packs_of([[n] for n in lengths], 56, lengths, ranks, dynamic)
    assert sorted(i for one in packs for i in one.items) == list(range(len(lengths)))
    for one in packs:
        each = 2 * one.size if one.size > 1 else 1
        assert 0 < sum(-(-lengths[i] // each) * each for i in one.items) <= 56 * one.size
    for rank in range(ranks):  # two ranks that share a pack meet at the same number of packs
        mine = [one for one in packs if one.is_on(rank)]
        assert [one.size for one in mine] == sorted((one.size for one in mine), reverse=True)
        for at, one in enumerate(mine):
            for other in range(one.first, one.first + one.size):
                assert [p for p in packs if p.is_on(other)][at] is one
    work = [sum(lengths[i] / one.size for one in packs if one.is_on(rank) for i in one.items) for rank in range(ranks)]
    assert max(work) <= 2 * sum(lengths) / ranks + 1e-9  # no sequence is more than a fair share


def test_a_sequence_over_the_budget_is_refused():
    with pytest.raises(ValueError, match="51 tokens does not fit a microbatch of 50"):
        microbatches_of([3, 51], 50)


def test_equal_tokens_are_not_equal_work():
    """One sequence of 8 and four of 4. Where attention is all there is, a sequence of n costs n^2 / 2: 12 tokens each
    would be (8^2 + 4^2) / 2 = 40 against 3 x 4^2 / 2 = 24; the even deal is 32 and 32."""
    lengths, flops = [8, 4, 4, 4, 4], ModelFlops(matmul_parameters=0, full_attention=1)
    costs = [flops.cost(n) for n in lengths]
    assert costs == [32, 8, 8, 8, 8]
    assert balance(lengths, 2) == [[0, 3], [1, 2, 4]]
    assert balance(costs, 2) == [[0], [1, 2, 3, 4]]
    assert microbatches_of(lengths, 16, costs) == [[0], [1, 2, 3, 4]]
    # Where four of 4 do not fit a microbatch, tokens are dealt evenly after all.
    assert microbatches_of(lengths, 15, costs) == [[0, 3], [1, 2, 4]]


def test_work_is_even_over_32_replicas_in_milliseconds():
    """Llama-70B's sizes, 4,096 long-tailed lengths of up to 32k: the dearest replica within 3 % of the mean."""
    generator = torch.Generator().manual_seed(0)
    tail = torch.randn(4096, generator=generator).mul(0.9).add(8.6).exp()
    lengths = tail.clamp(64, 32768).int().tolist()
    flops = ModelFlops(matmul_parameters=70_000_000_000, full_attention=4 * 80 * 64 * 128)

    def plan() -> list[list[int]]:
        return balance([flops.cost(n) for n in lengths], 32)

    totals = [sum(flops.cost(lengths[i]) for i in group) for group in plan()]
    assert max(totals) / (sum(totals) / 32) <= 1.03
    by_tokens = [sum(flops.cost(lengths[i]) for i in group) for group in balance(lengths, 32)]
    assert max(totals) < max(by_tokens)
    assert min(timeit.repeat(plan, number=1, repeat=5)) < 0.05


def test_pack_written_out():
    a = Sample("a", 0, [10, 11, 12, 13], 2, rollout_logps=torch.tensor([-0.1, -0.2]), advantage=2.0)
    b = Sample("b", 0, [20, 21, 22], 1, rollout_logps=torch.tensor([-0.3, -0.4]), advantage=-1.0)
    batch = pack([a, b], CPU, multiple=4)
    assert batch.cu_seqlens == [0, 3, 8]  # b's two positions and three of padding behind it
    assert batch.tokens.tolist() == [10, 11, 12, 20, 21, 0, 0, 0]
    assert batch.targets.tolist() == [11, 12, 13, 21, 22, 0, 0, 0]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert batch.loss_mask.tolist() == [False, True, True, True, True, False, False, False]
    assert batch.advantages.tolist() == [0, 2, 2, -1, -1, 0, 0, 0]
    torch.testing.assert_close(batch.rollout_logps, torch.tensor([0, -0.1, -0.2, -0.3, -0.4, 0, 0, 0]))
    assert batch.old_logps is None
    x = torch.arange(8.0)
    assert batch.per_sequence(x).tolist() == [1 + 2, 3 + 4]
    assert [part.tolist() for part in batch.response_of(x)] == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    "mode, weights, count",
    [
        ("token-mean", [1, 1, 1, 0], 3),
        ("seq-mean-token-mean", [0.5, 0.5, 1, 0], 2),
        ("seq-mean-token-sum", [1, 1, 1, 0], 2),
        ("seq-mean-token-sum-norm", [0.1, 0.1, 0.1, 0], 2),
    ],
)
def test_token_weights_by_hand(mode, weights, count):
    """Two responses of 2 and 1 tokens, and a sequence without any, which counts nowhere."""
    mask, sequence = torch.tensor([True, True, True, False]), torch.tensor([0, 0, 1, 2])
    got, total = token_weights(mask, sequence, torch.tensor([2, 1, 0]), mode, max_response_length=10)
    torch.testing.assert_close(got, torch.tensor(weights, dtype=torch.float32))
    assert total == count


def test_a_fully_masked_pack_has_weight_zero():
    batch = pack([Sample("a", 0, [1, 2], prompt_length=2)], CPU)
    assert batch.count == 0 and batch.weights.sum() == 0 and not batch.loss_mask.any()


def test_a_hole_in_a_response_is_in_no_loss_and_no_count():
    """Two tokens of the policy around two of a tool. What the tool's positions hold is not carried along."""
    nan = float("nan")
    sample = Sample(
        "a",
        0,
        [10, 11, 12, 13, 14],
        1,
        loss_mask=torch.tensor([True, False, False, True]),
        advantages=torch.tensor([3.0, nan, 9.0, 4.0]),
        rollout_logps=torch.tensor([-0.1, nan, -0.3, -0.4]),
        values=torch.tensor([1.0, 2.0, nan, 4.0]),
        returns=torch.tensor([5.0, nan, 7.0, 8.0]),
    )
    other = Sample("b", 0, [20, 21], 1, advantage=-1.0, rollout_logps=torch.zeros(1), values=torch.zeros(1))
    other.returns = torch.zeros(1)
    batch = pack([sample, other], CPU, loss_agg_mode="seq-mean-token-mean")
    assert batch.loss_mask.tolist() == [True, False, False, True, True]
    assert batch.advantages.tolist() == [3, 0, 0, 4, -1]
    torch.testing.assert_close(batch.rollout_logps, torch.tensor([-0.1, 0, 0, -0.4, 0]))
    assert batch.old_values.tolist() == [1, 0, 0, 4, 0] and batch.returns.tolist() == [5, 0, 0, 8, 0]
    assert batch.weights.tolist() == [0.5, 0, 0, 0.5, 1] and batch.count == 2
    assert batch.lengths.tolist() == [2, 1]
    x = torch.arange(5.0)
    assert batch.per_sequence(x).tolist() == [3, 4] and batch.per_token(torch.tensor([7, 8])).tolist() == [7] * 4 + [8]
    assert [part.tolist() for part in batch.response_of(x)] == [[0, 1, 2, 3], [4]]


def test_a_response_that_is_all_hole_does_not_count():
    sample = Sample("a", 0, [1, 2, 3], 1, loss_mask=torch.tensor([False, False]))
    batch = pack([sample], CPU, loss_agg_mode="seq-mean-token-mean")
    assert batch.count == 0 and batch.weights.sum() == 0 and batch.lengths.tolist() == [0]


def test_experts_and_padding_by_hand():
    """Two sequences of 2 and 1 positions, padded to 2 each; the second has no response, so that it counts for nothing.
    Of one layer and two experts a token."""
    experts = torch.tensor([[[5, 3]], [[4, 7]]], dtype=torch.uint8)
    one = Sample("a", 0, [1, 2, 3], 1, routed_experts=experts)
    other = Sample("b", 0, [8, 9], 2, routed_experts=torch.tensor([[[6, 2]]], dtype=torch.uint8))
    batch = pack([one, other], CPU, each=2)
    assert batch.routed_experts.tolist() == [[[5, 3]], [[4, 7]], [[6, 2]], [[0, 1]]]  # padding goes to the first ones
    assert batch.padding.tolist() == [False, False, True, True] and batch.num_positions == 2
    assert pack([Sample("a", 0, [1, 2], 1)], CPU).routed_experts is None
    with pytest.raises(ValueError, match="prompt b, sample 0: vLLM reported the experts of 0 positions, it has 1"):
        pack([one, Sample("b", 0, [8, 9], 1)], CPU)
