"""The rule by which groups start, and what a step is given: with conversations that only wait."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.data.prompts import Prompt, PromptStream
from megarl.rollout.stream import Loop, Stream, StreamError

PROMPTS = [Prompt(f"train.jsonl:{i}", [i], str(i), None, {}) for i in range(7)]


@pytest.fixture(scope="module")
def loop():
    loop = Loop("test-stream")
    yield loop
    loop.close()


class Engine:
    """Samples one token a group, of the version that it has when the group ends; how long that takes is random."""

    def __init__(self, seed: int, batch: int, max_staleness: int) -> None:
        self.random = random.Random(seed)
        self.batch, self.max_staleness = batch, max_staleness
        self.version = 0
        self.started: list[int] = []

    async def __call__(self, index: int, prompt: Prompt) -> tuple[str, int, int]:
        assert index < (self.max_staleness + self.version + 1) * self.batch, (index, self.version)
        self.started.append(index)
        began = self.version
        for _ in range(self.random.choice([0, 0, 1, 3, 20])):
            await asyncio.sleep(0)
        return prompt.id, began, self.version


def train(loop, streams, engine, steps):
    """What each step is given, by its groups' places."""
    out = []
    for step in range(steps):
        parts = [stream.want(engine.batch).result(10) for stream in streams]
        out.append({place: group for part in parts for place, group in part.items()})
        engine.version = step + 1
        for stream in streams:
            stream.advance()
    return out


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000), batch=st.integers(1, 5), staleness=st.integers(0, 3), replicas=st.sampled_from([1, 2, 3])
)
def test_order_bound_and_each_group_once(loop, seed, batch, staleness, replicas):
    steps, engine = 6, Engine(seed, batch, staleness)
    shares = [(replica, replicas) for replica in range(replicas)]
    streams = [Stream(loop, engine, batch=batch, max_staleness=staleness, share=share) for share in shares]
    for stream in streams:
        stream.begin(PromptStream(PROMPTS, 3, True).next, steps)
    given = train(loop, streams, engine, steps)
    for stream in streams:
        stream.stop()
    wanted = PromptStream(PROMPTS, 3, True)
    for step, groups in enumerate(given):
        assert [groups[place][0] for place in range(batch)] == [prompt.id for prompt in wanted.next(batch)]
        assert all(0 <= step - began <= staleness and began <= ended <= step for _, began, ended in groups.values())
    assert sorted(engine.started) == list(range(steps * batch))  # each number once, none left out, none for no step


def test_no_group_starts_ahead_of_its_time(loop):
    """B = 2, max_staleness = 1: four groups start at once, and two more with every update."""
    engine = Engine(0, 2, 1)
    stream = Stream(loop, engine, batch=2, max_staleness=1)
    stream.begin(PromptStream(PROMPTS, 0, False).next, 9)
    loop.run(asyncio.sleep(0.01)).result()
    assert engine.started == [0, 1, 2, 3]
    stream.want(2).result(5)
    loop.run(asyncio.sleep(0.01)).result()
    assert engine.started == [0, 1, 2, 3]  # taken, but not yet trained on
    engine.version = 1
    stream.advance()
    loop.run(asyncio.sleep(0.01)).result()
    assert engine.started == [0, 1, 2, 3, 4, 5]
    stream.stop()


def test_the_last_steps_start_nothing_ahead(loop):
    """Three steps of B = 2 with max_staleness = 4, the second of which takes a batch more (dynamic sampling)."""
    engine = Engine(0, 2, 4)
    stream = Stream(loop, engine, batch=2, max_staleness=4)
    stream.begin(PromptStream(PROMPTS, 0, False).next, 3)
    for version, (batches, started) in enumerate([(1, 6), (2, 6), (1, 8)]):
        engine.version = version
        for _ in range(batches):
            stream.want(2).result(5)
        assert len(engine.started) == started
        stream.advance()
    assert engine.started == list(range(8))
    stream.stop()


def test_a_step_that_needs_more_groups_gets_the_next_ones(loop):
    """Dynamic sampling with max_staleness = 0: the second batch of a step starts when it is asked for."""
    started = []

    async def work(index, prompt):
        started.append(index)
        return index

    stream = Stream(loop, work, batch=2, max_staleness=0)
    stream.begin(PromptStream(PROMPTS, 0, False).next, 9)
    assert stream.want(2).result(5) == {0: 0, 1: 1}
    assert stream.want(2).result(5) == {0: 2, 1: 3}
    stream.advance()
    assert stream.want(2).result(5) == {0: 4, 1: 5} and started == list(range(6))


def test_an_error_is_raised_with_the_prompts_id_by_the_step_that_needs_the_group(loop):
    async def work(index, prompt):
        if index == 3:
            raise OSError("the tool is gone")
        return index

    stream = Stream(loop, work, batch=2, max_staleness=1)
    stream.begin(PromptStream(PROMPTS, 0, False).next, 9)
    assert stream.want(2).result(5) == {0: 0, 1: 1}
    with pytest.raises(StreamError, match=r"prompt train\.jsonl:3: OSError: the tool is gone"):
        stream.want(2).result(5)
    stream.stop()


def test_a_straggler_delays_its_own_step_alone(loop):
    """Group 1 waits for a signal; those of later steps are done meanwhile."""
    release, done = asyncio.Event(), []

    async def work(index, prompt):
        if index == 1:
            await release.wait()
        done.append(index)
        return index

    stream = Stream(loop, work, batch=2, max_staleness=1)
    stream.begin(PromptStream(PROMPTS, 0, False).next, 9)
    first = stream.want(2)
    loop.run(asyncio.sleep(0.01)).result()
    assert done == [0, 2, 3] and not first.done()
    loop.call(release.set)
    assert first.result(5) == {0: 0, 1: 1}
    assert stream.want(2).result(5) == {0: 2, 1: 3}
    stream.stop()


def test_a_stream_that_begins_again_goes_on_with_the_data(loop):
    """What was in work is forgotten: as many prompts as steps were given are gone, whatever was drawn ahead."""

    async def work(index, prompt):
        return prompt.id

    cursor = PromptStream(PROMPTS, 0, False)
    ahead = PromptStream(PROMPTS, 0, False)
    stream = Stream(loop, work, batch=2, max_staleness=2)
    stream.begin(ahead.next, 9)
    taken = [stream.want(2).result(5) for _ in range(2)]
    assert [group for groups in taken for group in groups.values()] == [p.id for p in cursor.next(4)]
    again = PromptStream(PROMPTS, 0, False)
    again.load_state_dict(cursor.state_dict())
    stream.begin(again.next, 7)
    assert list(stream.want(2).result(5).values()) == ["train.jsonl:4", "train.jsonl:5"]
    stream.stop()
