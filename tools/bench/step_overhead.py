"""Training loop overhead: a GRPO step of megarl against a bare loop that does the same work.

    OMP_NUM_THREADS=1 .venv/bin/python tools/bench/step_overhead.py [--steps 12]

The two sides share one process, one rank and one torch thread, and take turns: megarl makes a step, stands still, the
bare loop makes one. Compared are the fastest steps, after two of warm-up; the goal is a ratio of at most 1.15.

megarl is its own unchanged loop (`megarl.algorithms.grpo.train`), with all that a run has: reward workers, packing,
megatron's schedule and optimizer, health checks, console, metrics.jsonl and TensorBoard. The bare loop is the shortest
code for the algorithm alone: `vllm.LLM`, rewards in place, transformers' Qwen2ForCausalLM on a rectangle of tokens (a
hand-written model was at most 2 % faster), autograd, clipping, torch's fused AdamW, and vLLM's own `reload_weights`.

Equal on both sides: weights, prompts, seeds, lengths (every prompt 12 tokens, every response 48), microbatches, fp32,
vLLM's settings. It is checked, not assumed: in the first step both sample the same tokens, and get the same rewards
and the same gradient norm; in every step the bare loop's log-probs are those vLLM sampled with.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import megarl_side
import torch
import torch.nn.functional as F
import workload
from torch import Tensor
from transformers import AutoTokenizer, Qwen2ForCausalLM
from workload import MICROBATCHES, NEW_TOKENS, PROMPT_TOKENS, PROMPTS, SAMPLES

from megarl.rewards.exact import exact_reward
from megarl.rollout.vllm_process import SharedProcess, set_environment

WARM_UP = 2
PHASES = ("generate", "train", "sync")


class BareLoop:
    """GRPO without a framework. `step` returns what it measured; `seconds` has the last step's phases."""

    def __init__(self, folder: Path) -> None:
        path = str(folder / "model")
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.policy = Qwen2ForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(), lr=workload.LEARNING_RATE, weight_decay=0.0, fused=True
        )
        self.seconds: dict[str, float] = {}
        # vLLM changes the process that it runs in; this keeps its changes from megarl's side.
        set_environment("cpu")
        self.process = SharedProcess("cpu")
        with self.process.vllm(), self.process.starting():
            from vllm import LLM

            self.llm = LLM(
                path,
                skip_tokenizer_init=True,
                dtype="float32",
                enforce_eager=True,
                max_model_len=PROMPT_TOKENS + NEW_TOKENS,
                max_num_seqs=PROMPTS * SAMPLES,
                max_num_batched_tokens=workload.MAX_BATCHED_TOKENS,
                kv_cache_memory_bytes=2**28,
                logprobs_mode="processed_logprobs",
            )

    def step(self, records: list[dict[str, str]], seed: int) -> dict[str, float]:
        self.seconds = {}
        with self.process.vllm():
            start = time.perf_counter()
            with self.phase("generate"):
                torch.manual_seed(seed)
                tokens, rollout_logps = self.generate([record["prompt"] for record in records])
            responses = tokens[:, PROMPT_TOKENS:]
            texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
            rewards = exact_reward(texts, [record["answer"] for record in records for _ in range(SAMPLES)])
            groups = torch.tensor(rewards).view(PROMPTS, SAMPLES)
            centred = groups - groups.mean(1, keepdim=True)
            advantages = (centred / (groups.std(1, keepdim=True) + 1e-6)).view(-1, 1)  # [sequences, 1]
            with self.phase("train"):
                logps, grad_norm = self.train(tokens, advantages)
            with self.phase("sync"):
                weights = iter(self.policy.state_dict().items())
                self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
                self.llm.reset_prefix_cache()
            self.seconds["step"] = time.perf_counter() - start
        mismatch = (logps - rollout_logps).abs().max().item()
        return {"reward/mean": groups.mean().item(), "actor/grad_norm": grad_norm, "mismatch": mismatch}

    def generate(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Tokens [sequences, prompt + response] and log-probs [sequences, response]."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            n=SAMPLES, max_tokens=NEW_TOKENS, temperature=1.0, logprobs=0, flat_logprobs=True, detokenize=False
        )
        ids = [{"prompt_token_ids": row} for row in self.tokenizer(prompts)["input_ids"]]
        outputs = self.llm.generate(ids, sampling, use_tqdm=False)
        samples = [(out.prompt_token_ids, sample) for out in outputs for sample in out.outputs]
        tokens = torch.tensor([[*prompt, *sample.token_ids] for prompt, sample in samples])
        return tokens, torch.tensor([sample.logprobs.logprobs for _, sample in samples])

    def train(self, tokens: Tensor, advantages: Tensor) -> tuple[Tensor, float]:
        """One PPO update; the log-probs [sequences, response] before it, and the norm of its gradient."""
        self.optimizer.zero_grad()
        kept = []
        for part, advantage in zip(tokens.chunk(MICROBATCHES), advantages.chunk(MICROBATCHES), strict=True):
            targets = part[:, PROMPT_TOKENS:]
            logits = self.policy(part[:, :-1], use_cache=False, logits_to_keep=NEW_TOKENS).logits
            logps = -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
            ratio = (logps - logps.detach()).exp()
            loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
            (loss.sum() / (len(tokens) * NEW_TOKENS)).backward()
            kept.append(logps.detach())
        grad_norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        return torch.cat(kept), grad_norm.item()

    def close(self) -> None:
        """End vLLM, and with it the process groups: call it last."""
        with self.process.vllm():
            self.llm.llm_engine.engine_core.shutdown()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


class Duel:
    """Makes the bare step after each of megarl's, and keeps the seconds of both."""

    def __init__(self, bare: BareLoop, steps: int) -> None:
        self.bare = bare
        self.records = workload.sums(steps * PROMPTS)
        self.seconds: dict[str, list[dict[str, float]]] = {"megarl": [], "bare": []}

    def __call__(self, step: int, seconds: float, metrics: dict[str, float]) -> None:
        tokens = megarl_side.response_tokens(metrics)
        assert tokens == PROMPTS * SAMPLES * NEW_TOKENS, f"megarl sampled {tokens} tokens"
        theirs = {name: metrics[f"timing_s/{name}"] for name in PHASES} | {"step": seconds}
        records = self.records[(step - 1) * PROMPTS : step * PROMPTS]
        measured = self.bare.step(records, seed=step * 10_007)  # `Sampler` seeds so, where run.seed is 0
        assert measured["mismatch"] < 1e-4, f"vLLM does not sample from the bare loop's weights: {measured}"
        if step == 1:
            for name in ("reward/mean", "actor/grad_norm"):
                ours, bare = metrics[name], measured[name]
                assert abs(ours - bare) <= 1e-3 * abs(bare), f"not the same work: {name} {ours} and {bare}"
        gc.collect()  # nobody pays for the other's garbage
        if step > WARM_UP:
            self.seconds["megarl"].append(theirs)
            self.seconds["bare"].append(self.bare.seconds)
        print(f"step {step}: megarl {seconds:.3f} s, bare {self.bare.seconds['step']:.3f} s", file=sys.stderr)

    def table(self) -> str:
        """Seconds by phase, and the ratio of the fastest."""
        lines = [f"{'seconds':<18}{'megarl min':>12}{'median':>9}{'bare min':>11}{'median':>9}{'ratio of min':>15}"]
        for name in (*PHASES, "everything else", "step"):
            megarl, bare = ([phase(name, step) for step in self.seconds[side]] for side in ("megarl", "bare"))
            lines.append(
                f"{name:<18}{min(megarl):>12.4f}{statistics.median(megarl):>9.4f}"
                f"{min(bare):>11.4f}{statistics.median(bare):>9.4f}{min(megarl) / min(bare):>15.3f}"
            )
        best = [min(step["step"] for step in self.seconds[side]) for side in ("megarl", "bare")]
        return "\n".join([*lines, f"loop overhead: {best[0] / best[1]:.3f}x"])


def phase(name: str, step: dict[str, float]) -> float:
    """Seconds of a phase in one step; everything else is what no phase has."""
    return step["step"] - sum(step[known] for known in PHASES) if name == "everything else" else step[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="measured steps of each side")
    steps = parser.parse_args().steps + WARM_UP
    if os.environ.get("OMP_NUM_THREADS") != "1":
        sys.exit("set OMP_NUM_THREADS=1: it must be in the environment before torch starts")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        workload.make(folder, steps)
        with (folder / "console.txt").open("w") as console, contextlib.redirect_stdout(console):
            with contextlib.closing(BareLoop(folder)) as bare:
                duel = Duel(bare, steps)
                megarl_side.train(folder, duel)
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    print(f"{steps - WARM_UP} steps of {PROMPTS} x {SAMPLES} responses; load of the machine {load}")
    print(duel.table())


if __name__ == "__main__":
    main()
