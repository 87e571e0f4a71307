"""The table of a step's samples: which groups stay, and how several rollouts become one."""

from dataclasses import replace

import pytest
import torch

from megarl.advantages import reinforce_pp
from megarl.algorithms.credit import Step, scores_of
from megarl.config import AdvantageConfig, RewardConfig
from megarl.data.prompts import Prompt
from megarl.data.records import Sample
from megarl.model.flops import ModelFlops
from megarl.rewards.runner import RewardResult
from megarl.rollout.table import EmptyStepError, Rollout, Row, inputs_of, not_empty, row_of
from tests.byte_tokenizer import byte_tokenizer


def scored(total, **parts):
    return RewardResult(total, parts, None)


def rollout(rewards, first_prompt=0, lengths=None, limit=10, here=lambda row: True):
    """Groups by prompt; everything sampled here, but for what ``here`` says no to."""
    rows = [
        Row(first_prompt + p, k, f"p{p}", 2, length, length, "length" if length == limit else "stop", scored(r))
        for p, group in enumerate(rewards)
        for k, (r, length) in enumerate(zip(group, (lengths or [[4] * len(g) for g in rewards])[p], strict=True))
    ]
    mine = {i: Sample(row.prompt_id, row.index, [0] * 6, 2) for i, row in enumerate(rows) if here(i)}
    return Rollout(rows, [], mine, None, limit, ModelFlops(1, 1))


def test_groups_of_equal_rewards_are_left_out():
    kept = rollout([[1, 1], [0, 1], [0, 0], [0.5, 0]]).mixed()
    assert kept.prompts == [1, 3] and kept.rewards.tolist() == [0, 1, 0.5, 0]
    assert [sample.prompt_id for sample in kept.mine.values()] == ["p1", "p1", "p3", "p3"]


def test_bounds_leave_out_what_is_too_hard_or_too_easy():
    groups = [[0, 0, 0, 0, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [0.0, 0, 0, 0, 0.5]]
    assert rollout(groups).mixed(0.2, 0.6).prompts == [0, 1]
    assert rollout(groups).mixed(low=0.5).prompts == [1, 2]


def test_several_rollouts_are_one_under_new_numbers():
    first = rollout([[1, 1], [0, 1]], here=lambda row: row % 2 == 0).mixed()
    both = Rollout.joined([first, rollout([[1, 0], [0, 1]])])
    assert both.groups.tolist() == [0, 0, 1, 1, 2, 2] and both.num_gen_batches == 2
    assert sorted(both.mine) == [0, 2, 3, 4, 5]  # row 1 was sampled elsewhere


def test_a_draw_without_any_scored_group_is_no_loss_where_others_were_drawn():
    """What a dynamic sampler joins: nothing from the first draw, two groups from the second."""
    none = replace(rollout([]), errors=["it raised"])
    both = Rollout.joined([none.mixed(), rollout([[1, 0], [0, 1]])])
    assert both.prompts == [0, 1] and both.errors == ["it raised"] and both.num_gen_batches == 2
    with pytest.raises(EmptyStepError, match="no group of this step could be scored; the first of 1 errors: it raised"):
        not_empty(none)


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, [1.0, 1.0, 1.0]),
        ({"overlong_buffer_len": 4, "overlong_buffer_penalty": 2.0}, [1.0, 0.0, -1.0]),  # 2 x 2/4 and 2 x 4/4
        ({"missing_eos_penalty": 0.5}, [1.0, 1.0, 0.5]),
        ({"length_penalty": 0.1}, [0.4, 0.2, 0.0]),
    ],
)
def test_penalties_by_hand(settings, expected):
    """Of 6, 8 and 10 tokens, where 10 is the limit."""
    table = rollout([[1.0, 1.0, 1.0]], lengths=[[6, 8, 10]])
    assert scores_of(RewardConfig(**settings), table).tolist() == pytest.approx(expected)


def test_penalties_leave_out_what_the_policy_read():
    """Ten tokens each, of which it wrote 6, 8 and 10; a limit of turns or time counts as one."""
    table = rollout([[1.0, 1.0, 1.0]], lengths=[[10, 10, 10]])
    reasons = ("stop", "turns", "timeout")
    table.rows = [
        replace(row, written_length=written, finish_reason=reason)
        for row, written, reason in zip(table.rows, (6, 8, 10), reasons, strict=True)
    ]
    assert scores_of(RewardConfig(length_penalty=0.1), table).tolist() == pytest.approx([0.4, 0.2, 0.0])
    assert scores_of(RewardConfig(overlong_buffer_len=4), table).tolist() == pytest.approx([1.0, 0.5, 0.0])
    assert scores_of(RewardConfig(missing_eos_penalty=0.5), table).tolist() == [1.0, 0.5, 0.5]


def test_rewards_see_what_the_policy_wrote_and_what_the_environment_measured():
    tokenizer = byte_tokenizer()
    tokens = [tokenizer.encode(text, add_special_tokens=False) for text in ("2+2=", "ask", "<4>", "4")]
    mask = torch.tensor([True] * 3 + [False] * 3 + [True])
    sample = Sample(
        "p",
        1,
        [token for part in tokens for token in part],
        4,
        loss_mask=mask,
        finish_reason="stop",
        measures={"tool_calls": 1.0},
    )
    prompt = Prompt("p", tokens[0], "2+2=", "4", {"level": 3, "tool_calls": "the record's own"})
    (entry,) = inputs_of(prompt, [sample], tokenizer)
    assert (entry.prompt_id, entry.sample_index) == ("p", 1)
    assert entry.columns == {
        "level": 3,
        "tool_calls": 1.0,
        "completions": "ask4",
        "transcripts": "ask<4>4",
        "completion_ids": tokens[1] + tokens[3],
        "prompts": "2+2=",
        "answers": "4",
        "finish_reasons": "stop",
    }
    row = row_of(5, sample, scored(1.0))
    assert (row.response_length, row.written_length, row.cut) == (7, 4, False)


def test_metrics_of_turns_tools_and_rewards_that_only_some_have():
    table = rollout([[1.0, 0.0, 1.0]])
    measures = ({"num_turns": 1, "tool_calls": 0, "tool_failures": 0}, {"num_turns": 4, "tool_calls": 3}, {})
    measures[1]["tool_failures"] = 1
    results = (scored(1.0, math=1.0), scored(0.0, math=0.0), scored(1.0, code=1.0))
    table.rows = [replace(row, measures=m, result=r) for row, m, r in zip(table.rows, measures, results, strict=True)]
    metrics = table.metrics()
    assert (metrics["num_turns/mean"], metrics["num_turns/max"]) == (2.5, 4)
    assert (metrics["tool_call_counts/mean"], metrics["tool_call_counts/max"]) == (1.5, 3)
    assert metrics["tool_call_counts/failure_ratio"] == pytest.approx(1 / 3)
    assert (metrics["reward/math"], metrics["reward/code"]) == (0.5, 1.0)
    assert not any(name.startswith("environment/") for name in metrics)
    table.rows = [replace(row, measures={"success": i}) for i, row in enumerate(table.rows)]
    assert table.metrics()["environment/success"] == 1.0


def test_advantages_go_to_the_tokens_that_the_policy_wrote():
    """One sample alone: 2 tokens, a hole of 2, 1 token; a reward of 3 and k1 of 1 a written token, times 0.5.

    Rewards are -0.5, -0.5, 2.5 over the written tokens; to go at gamma 1/2: 2.5, then -0.5 + 1.25, then -0.5 + 0.375.
    Of these the mean is 1.0417 and the standard deviation (Bessel's) 1.3369: that is what whitening leaves.
    """
    mask = torch.tensor([True, True, False, False, True])
    old, reference = torch.tensor([-1.0, -1, 9, 9, -1]), torch.tensor([-2.0, -2, -9, -9, -2])
    sample = Sample("p", 0, [0] * 7, 2, loss_mask=mask, old_logps=old, ref_logps=reference, row=0)
    step = Step(
        AdvantageConfig(gamma=0.5),
        torch.tensor([3.0]),
        torch.tensor([0]),
        torch.tensor([False]),
        [sample],
        None,
        kl_coef=0.5,
    )
    assert step.token_rewards.tolist() == [[-0.5, -0.5, 0.0, 0.0, 2.5]]
    whitened = [(x - 1.0416667) / 1.3369 for x in (-0.125, 0.75, 2.5)]
    got = reinforce_pp(step.token_rewards, step.mask, gamma=0.5)[0]
    assert got[mask].tolist() == pytest.approx(whitened, abs=1e-3)
    assert got[~mask].tolist() == [0.0, 0.0]
