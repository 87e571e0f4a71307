"""Cases that `RankPool` runs: conversations with one vLLM engine over all ranks."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoTokenizer

from megarl.config import RewardConfig, RewardFunction, RolloutConfig, load
from megarl.data.prompts import Prompt, PromptStream
from megarl.data.records import Sample
from megarl.environments.dialogue import Dialogue
from megarl.environments.episode import EpisodeLimits
from megarl.environments.making import make
from megarl.observe.timers import Phases
from megarl.parallel.mesh import build_mesh
from megarl.rewards.runner import RewardResult
from megarl.rollout.conversation import AsyncEngine, Conversation, Sampling, Transcript, single_turn
from megarl.rollout.local import HEARTBEAT_S, Batch, Scored, Talks
from megarl.rollout.sampler import Sampler
from megarl.rollout.scoring import Scorer
from megarl.rollout.vllm_engine import VLLMEngine

EVEN = [RewardFunction("tests.fixtures.digits:even")]


class Instant:
    """Scores at once, so that which groups end first does not depend on how busy the machine is."""

    async def score(self, prompt: Prompt, samples: Sequence[Sample]) -> list[RewardResult]:
        return [RewardResult(0.0, {}, None) for _ in samples]


async def slow_tool(engine: AsyncEngine, prompt: Prompt) -> Sample:
    """Waits so long between two turns that the engine's other ranks have to be told."""
    transcript = Transcript(prompt)
    transcript.wrote(await engine.generate(transcript.tokens, 2))
    await asyncio.sleep(2.5 * HEARTBEAT_S)
    transcript.observed([5, 6])
    transcript.wrote(await engine.generate(transcript.tokens, 2))
    return transcript.sample()


async def gives_up(engine: AsyncEngine, prompt: Prompt) -> Sample:
    """Asks for much, does not wait for it, and asks for less."""
    transcript = Transcript(prompt)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(engine.generate(transcript.tokens, 40), 0.001)
    transcript.wrote(await engine.generate(transcript.tokens, 2))
    return transcript.sample()


async def raises(engine: AsyncEngine, prompt: Prompt) -> Sample:
    if prompt.id == "p1":
        raise KeyError("no such tool")
    return await single_turn(engine, prompt)


def hesitant(dialogue: Dialogue, **of_the_recipe: Any) -> Conversation:
    """An environment whose tool takes 1 s. Training needs it from the third prompt on, the held-out one four times."""

    async def conversation(engine: AsyncEngine, prompt: Prompt) -> Sample:
        transcript = Transcript(prompt)
        for _ in range({"p0": 0, "p1": 0, "p2": 1, "held out": 4}.get(prompt.id, 2)):
            transcript.wrote(await engine.generate(transcript.tokens, 1))
            await asyncio.sleep(1.0)
        transcript.wrote(await engine.generate(transcript.tokens, 1))
        return transcript.sample()

    return conversation


def plain(scored: Scored) -> list[dict[str, Any]]:
    """Rows and samples as values that can be compared and sent."""
    out = []
    for row, sample in sorted(scored, key=lambda entry: (entry[0].prompt, entry[0].index)):
        lists = {
            name: None if tensor is None else tensor.tolist()
            for name, tensor in (
                ("logps", sample.rollout_logps),
                ("versions", sample.versions),
                ("mask", sample.loss_mask),
            )
        }
        out.append(
            {"prompt": row.prompt, "index": row.index, "tokens": sample.tokens, "prompt_length": sample.prompt_length}
            | {"measures": sample.measures, "error": row.result.error, "reason": row.finish_reason}
            | lists
        )
    return out


def conversations(model: str, other: str) -> dict[str, Any]:
    """What came of several batches; {} on other ranks than the first."""
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    if world > 1:
        dist.init_process_group("gloo")
    settings = RolloutConfig(tensor_parallel_size=world, kv_cache_gb=0.02, max_num_seqs=8)
    engine = VLLMEngine(model, settings, dtype="fp32", device_type="cpu", max_model_len=64, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    scorer = Scorer(RewardConfig(functions=EVEN, workers=1), tokenizer) if rank == 0 else None
    texts = [f"{a}+{a + 1}=" for a in range(6)]
    prompts = [Prompt(f"p{i}", tokenizer.encode(text), text, "0", {}) for i, text in enumerate(texts)]
    calls = {"pattern": r"([0-9+*-]+)=", "reply": "{result}", "stop": ["="]}
    dialogue = Dialogue(tokenizer, use_chat_template=False)
    calculator = make("calculator", calls, dialogue, EpisodeLimits(max_turns=4))
    talks = Talks(engine, calculator, scorer, abort_on_error=False, seed_per_request=True)

    def run(conversation: Conversation, count: int, sampling: Sampling, want: int | None = None) -> Scored:
        talks.conversation = conversation
        return Batch(talks).run(deque(enumerate(prompts[:count])), sampling, 1, want=want or count)

    out = {"calculator": plain(run(calculator, 6, Sampling(n=2, max_tokens=40)))}
    out["slow"] = plain(run(slow_tool, 2, Sampling(max_tokens=12)))
    out["gives_up"] = plain(run(gives_up, 2, Sampling(max_tokens=48)))
    out["raises"] = plain(run(raises, 3, Sampling(max_tokens=4)))

    scorers = talks.scorer, Instant() if rank == 0 else None
    talks.conversation, talks.scorer = single_turn, scorers[1]
    kept = Batch(talks)
    waiting = deque(enumerate(prompts))
    first = kept.run(waiting, Sampling(max_tokens=40), 2, want=2, more=4)
    out["first"], out["under_way"] = plain(first), [number for number, _ in kept.under_way]
    engine.sleep()
    engine.wake_weights()
    engine.load_weights(load_file(Path(other) / "model.safetensors").items())
    engine.wake_kv_cache()
    talks.version = 1
    # Another batch in between, as a validation would be.
    out["between"] = plain(Batch(talks).run(deque(enumerate(prompts[:1])), Sampling(max_tokens=4), 3, want=1))
    out["second"] = plain(kept.run(deque(), Sampling(max_tokens=40), 4, want=4))
    talks.scorer = scorers[0]
    out["greedy"] = plain(run(calculator, 3, Sampling(max_tokens=12, temperature=0)))
    kept.discard()
    engine.generate([[5, 6]], Sampling(max_tokens=2), seed=0)  # nothing is left in the scheduler that would disturb it
    talks.close()
    if scorer:
        scorer.close()
    engine.close()
    return out if rank == 0 else {}


def clocks(recipe: str, overrides: list[str]) -> tuple[list[list[tuple[int, str | None]]], list[str]]:
    """Two steps and a validation in between: the prompts of each step's samples and how they ended; what went wrong in
    the validation."""
    cfg = load([recipe, *overrides])
    tokenizer = AutoTokenizer.from_pretrained(cfg.model.path)
    prompts = [Prompt(f"p{i}", tokenizer.encode(text), text, "0", {}) for i, text in enumerate(["1+1=", "2+2="] * 3)]
    stream = PromptStream(prompts, seed=0, shuffle=False)
    sampler = Sampler(cfg, build_mesh(cfg), tokenizer, Phases(), prompts)
    sampler.engine.wake()
    steps = [sampler.rollout(stream.next, 1)]
    sampler.engine.wake()
    _, errors = sampler.validate([replace(prompts[0], id="held out")])
    steps.append(sampler.rollout(stream.next, 2))
    sampler.close()
    return [[(row.prompt, row.finish_reason) for row in step.rows] for step in steps], errors
