"""What a conversation makes of its turns."""

from __future__ import annotations

import asyncio

import pytest
import torch

from megarl.data.prompts import Prompt
from megarl.rollout.conversation import Completion, Transcript, single_turn

PROMPT = Prompt("train.jsonl:3", [5, 6], "ab", None, {})


class Scripted:
    """An engine that gives the same answers in turn."""

    def __init__(self, *answers: Completion, max_tokens: int) -> None:
        self.answers, self.max_tokens = list(answers), max_tokens
        self.asked: list[tuple[list[int], int]] = []

    async def ready(self):
        pass

    async def generate(self, tokens, max_tokens, *, stop_token_ids=()):
        self.asked.append((tokens, max_tokens))
        return self.answers.pop(0)


def test_a_single_turn_is_the_whole_response():
    engine = Scripted(Completion([7, 1], [-0.5, -0.25], "stop", versions=[3, 4]), max_tokens=9)
    sample = asyncio.run(single_turn(engine, PROMPT))
    assert engine.asked == [([5, 6], 9)]
    assert (sample.prompt_id, sample.tokens, sample.prompt_length) == ("train.jsonl:3", [5, 6, 7, 1], 2)
    assert sample.rollout_logps.tolist() == [-0.5, -0.25] and sample.versions.tolist() == [3, 4]
    assert sample.loss_mask is None and sample.finish_reason == "stop"


def test_observations_are_outside_the_mask_and_as_old_as_the_turn_before():
    transcript = Transcript(PROMPT)
    transcript.wrote(Completion([7], [-1.0], "stop", versions=[2]))
    transcript.observed([8, 9])
    assert transcript.tokens == [5, 6, 7, 8, 9] and transcript.response_length == 3
    transcript.wrote(Completion([1], [-2.0], "length", versions=[3]))
    sample = transcript.sample({"environment_reward": 0.5})
    assert sample.loss_mask.tolist() == [True, False, False, True]
    assert sample.rollout_logps.tolist() == [-1, 0, 0, -2] and sample.versions.tolist() == [2, 2, 2, 3]
    assert sample.measures == {"environment_reward": 0.5} and sample.finish_reason == "length"


def test_experts_are_those_of_the_last_turn_and_any_for_what_nobody_read():
    """Of two layers and two experts a token. The second turn has read prompt, first turn and observation: 4 tokens."""
    transcript = Transcript(PROMPT)
    transcript.wrote(Completion([7], [-1.0], "stop", torch.full((2, 2, 2), 9)))
    transcript.observed([8])
    routed = torch.arange(16).reshape(4, 2, 2)
    transcript.wrote(Completion([1], [-2.0], "stop", routed))
    assert torch.equal(transcript.sample().routed_experts, routed)
    transcript.observed([4, 4])  # of which the last is never read
    experts = transcript.sample().routed_experts
    assert len(experts) == len(transcript.tokens) - 1 == 6
    assert experts[4:].tolist() == [[[0, 1], [0, 1]]] * 2


def test_a_conversation_that_is_nothing_or_half_known_is_refused():
    with pytest.raises(ValueError, match=r"train\.jsonl:3: a conversation ended without a token"):
        Transcript(PROMPT).sample()
    transcript = Transcript(PROMPT)
    transcript.wrote(Completion([7], [-1.0], "stop"))
    transcript.wrote(Completion([7], [-1.0], "stop", versions=[2]))
    with pytest.raises(ValueError, match="some turns know their versions"):
        transcript.sample()
