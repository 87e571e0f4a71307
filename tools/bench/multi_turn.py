"""Conversations with tools that take their time: each on its own, as `megarl.rollout.local` runs them, against all in
step, a batch for every turn.

    python tools/bench/multi_turn.py [--rounds 5] [--conversations 64] [--turns 3] [--wait 0.3]

Both sides have one engine (`VLLMEngine.session`), the same prompts, lengths (log-normal, 8 to 130 tokens a turn), tool
waits (exponential, of mean `--wait` seconds) and number of tokens; the second generates a turn of all conversations,
waits for the slowest tool, and goes on. They take turns in one run. Prints tokens/s of each round, and the ratio of the
medians.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import torch

from megarl.config import RolloutConfig
from megarl.data.prompts import Prompt
from megarl.data.records import Sample
from megarl.rewards.runner import RewardResult
from megarl.rollout.conversation import AsyncEngine, Sampling, Transcript
from megarl.rollout.local import Batch, Talks
from megarl.rollout.vllm_engine import VLLMEngine
from megarl.rollout.vllm_session import Request

PROMPT_LENGTH, OBSERVATION_LENGTH, VOCABULARY, MAX_LEN = 16, 8, 500, 512


def tiny_model(path: Path) -> str:
    """A Qwen2 of 1 M parameters that never ends by itself."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(
        **sizes, num_hidden_layers=4, vocab_size=VOCABULARY, max_position_embeddings=MAX_LEN, eos_token_id=None
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    return str(path)


class Plan:
    """What every conversation does: lengths of its turns, and how long its tools take."""

    def __init__(self, conversations: int, turns: int, wait_s: float) -> None:
        generator = random.Random(0)
        self.lengths = [
            [max(8, min(130, round(generator.lognormvariate(3.2, 0.7)))) for _ in range(turns)]
            for _ in range(conversations)
        ]
        self.waits = [[generator.expovariate(1 / wait_s) for _ in range(turns - 1)] for _ in range(conversations)]
        tokens = [[generator.randrange(VOCABULARY) for _ in range(PROMPT_LENGTH)] for _ in range(conversations)]
        self.prompts = [Prompt(str(i), prompt, "", None, {"at": i}) for i, prompt in enumerate(tokens)]

    @property
    def tokens(self) -> int:
        return sum(map(sum, self.lengths))


class NoReward:
    """Scores nothing: what rewards cost is another bench's."""

    async def score(self, prompt: Prompt, samples: Sequence[Sample]) -> list[RewardResult]:
        return [RewardResult(0.0, {}, None) for _ in samples]

    def close(self) -> None:
        """Nothing is open."""


def each_on_its_own(talks: Talks, plan: Plan) -> int:
    prompts = deque(enumerate(plan.prompts))
    scored = Batch(talks).run(prompts, Sampling(max_tokens=MAX_LEN), seed=1, want=len(plan.prompts))
    return sum(row.written_length for row, _ in scored)


def in_step(engine: VLLMEngine, plan: Plan) -> int:
    """A batch a turn."""
    texts = [list(prompt.tokens) for prompt in plan.prompts]
    count = 0
    with engine.session(1) as session:
        for turn in range(len(plan.lengths[0])):
            lengths = [Sampling(max_tokens=own[turn]) for own in plan.lengths]
            session.add([Request(str(i), text, lengths[i], None) for i, text in enumerate(texts)])
            while session.busy:
                for name, completion in session.advance().items():
                    count += len(completion.tokens)
                    texts[int(name)] += completion.tokens + [1] * OBSERVATION_LENGTH
            if turn < len(plan.waits[0]):
                time.sleep(max(waits[turn] for waits in plan.waits))  # they run side by side
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--conversations", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--wait", type=float, default=0.3, help="mean seconds of a tool")
    args = parser.parse_args()
    torch.set_num_threads(1)
    plan = Plan(args.conversations, args.turns, args.wait)

    async def conversation(engine: AsyncEngine, prompt: Prompt) -> Sample:
        at, transcript = prompt.fields["at"], Transcript(prompt)
        for turn, length in enumerate(plan.lengths[at]):
            transcript.wrote(await engine.generate(transcript.tokens, length))
            if turn < len(plan.waits[at]):
                await asyncio.sleep(plan.waits[at][turn])
                transcript.observed([1] * OBSERVATION_LENGTH)
        return transcript.sample()

    with tempfile.TemporaryDirectory() as folder:
        rollout = RolloutConfig(kv_cache_gb=0.2, max_num_seqs=args.conversations, seed_per_request=False)
        engine = VLLMEngine(
            tiny_model(Path(folder)), rollout, dtype="fp32", device_type="cpu", max_model_len=MAX_LEN, seed=0
        )
        talks = Talks(engine, conversation, NoReward(), abort_on_error=True, seed_per_request=False)
        sides = {"own": lambda: each_on_its_own(talks, plan), "step": lambda: in_step(engine, plan)}
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for round_, (name, side) in itertools.product(range(args.rounds + 1), sides.items()):
            started = time.perf_counter()
            tokens = side()
            seconds = time.perf_counter() - started
            assert tokens == plan.tokens, (name, tokens, plan.tokens)
            if round_:  # the first warms up
                rates[name].append(tokens / seconds)
        engine.close()
    for name, words in (("own", "each on its own"), ("step", "all in step")):
        print(f"{words:16} {' '.join(f'{rate:7.0f}' for rate in rates[name])} tokens/s")
    own, step = (statistics.median(rates[name]) for name in ("own", "step"))
    print(f"{plan.tokens} tokens; medians {own:.0f} : {step:.0f}, ratio {own / step:.2f}")


if __name__ == "__main__":
    main()
