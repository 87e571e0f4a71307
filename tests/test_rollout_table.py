"""The table of a step's samples: which groups stay, and how several rollouts become one."""

from dataclasses import replace

import pytest

from megarl.algorithms.credit import scores_of
from megarl.config import RewardConfig
from megarl.data.records import Sample
from megarl.rewards.runner import RewardResult
from megarl.rollout.table import EmptyStepError, Rollout, Row, not_empty


def rollout(rewards, first_prompt=0, lengths=None, limit=10, here=lambda row: True):
    """Groups by prompt; everything sampled here, but for what ``here`` says no to."""
    rows = [
        Row(first_prompt + p, k, f"p{p}", 2, length, "length" if length == limit else "stop", RewardResult(r, {}, None))
        for p, group in enumerate(rewards)
        for k, (r, length) in enumerate(zip(group, (lengths or [[4] * len(g) for g in rewards])[p], strict=True))
    ]
    mine = {i: Sample(row.prompt_id, row.index, [0] * 6, 2) for i, row in enumerate(rows) if here(i)}
    return Rollout(rows, [], mine, None, limit)


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
