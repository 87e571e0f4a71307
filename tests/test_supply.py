"""Prompts of groups that go on from step to step: none is lost, none comes twice."""

import pytest

from megarl.data.prompts import Prompt, PromptStream
from megarl.rollout.supply import Supply

ITEMS = [Prompt(f"p{i}", [i], str(i), None, {}) for i in range(12)]


def names(entries):
    return [(number, prompt.id) for number, prompt in entries]


def test_what_no_engine_came_to_is_given_first():
    stream = PromptStream(ITEMS, seed=0, shuffle=False)
    supply = Supply(ITEMS, engines=2)
    taken = supply.take(6, stream.next)
    assert names(taken) == [(i, f"p{i}") for i in range(6)]
    # Engine 0 had 0, 2, 4 and began two of them; engine 1 had 1, 3, 5, began one, which is under way.
    supply.settle(taken, [2, 1], [[], [taken[1]]])
    assert names(supply.under_way[1]) == [(1, "p1")]
    again = supply.take(5, stream.next)
    assert names(again) == [(3, "p3"), (4, "p4"), (5, "p5"), (6, "p6"), (7, "p7")]
    supply.settle(again, [3, 2], [[], []])
    assert names(supply.take(1, stream.next)) == [(8, "p8")]


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_resumed_run_begins_anew_what_was_under_way(steps):
    """Two engines of share 1 with one group more under way each; over the run every prompt is finished exactly once."""
    stream, supply = PromptStream(ITEMS, seed=0, shuffle=True), Supply(ITEMS, engines=2)
    finished = []
    for step in range(5):
        if step == steps:
            state, position = supply.state_dict(), stream.state_dict()
            stream, supply = PromptStream(ITEMS, seed=0, shuffle=True), Supply(ITEMS, engines=2)
            stream.load_state_dict(position)
            supply.load_state_dict(state)
        need = max(2 - len(going) for going in supply.under_way)
        taken = supply.take(2 * need, stream.next)
        under_way = []
        for engine in range(2):  # finishes its newest group, as if the older one were the straggler
            groups = sorted([*supply.under_way[engine], *taken[engine::2]], key=lambda entry: entry[0])
            finished.append(groups.pop())
            under_way.append(groups)
        supply.settle(taken, [need, need], under_way)
    ids = [prompt.id for _, prompt in finished]
    waiting = supply.state_dict()["prompts"]
    assert len(ids) == len(set(ids)) == 10 and not set(ids) & set(waiting)
    drawn = stream.position + 12 * stream.epoch  # 5 steps of 2, and 2 under way
    assert len(ids) + len(waiting) == drawn
