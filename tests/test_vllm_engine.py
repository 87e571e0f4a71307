"""One vLLM engine in this process, and (in one torchrun start) engines of several ranks, against transformers."""

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megarl.config import RolloutConfig
from megarl.rollout.vllm_engine import Completion, RolloutError, Sampling, VLLMEngine
from tests.distributed import tiny_models

ROLLOUT = RolloutConfig(kv_cache_gb=0.02, max_num_seqs=8, sleep_level=2)
MAX_LEN = 64
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5], [3], list(range(40, 57)), [77, 78]]
SAMPLING = Sampling(n=4, max_tokens=12)
REPLACED = [(torch, "set_num_threads"), (torch, "Event"), (torch.cuda, "Stream"), (torch.Tensor, "pin_memory")]


@dataclass
class Started:
    engine: VLLMEngine
    model_dir: Path
    other_dir: Path
    process_before: dict[str, object]
    process_after: dict[str, object]
    of_first_engine: list[list[Completion]]


def process_state() -> dict[str, object]:
    """What of this process a trainer relies on."""
    attributes = {f"{owner.__name__}.{name}": getattr(owner, name) for owner, name in REPLACED}
    return attributes | {
        "random": (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()),
        "threads": (torch.get_num_threads(), os.sched_getaffinity(0)),
        "torch": (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_float32_matmul_precision()),
        "environment": [os.environ.get(name) for name in ("LD_PRELOAD", "LD_LIBRARY_PATH", "LOCAL_WORLD_SIZE", "RANK")],
    }


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    model_dir = tiny_models.qwen2(tmp_path_factory.mktemp("model"), seed=0)
    other_dir = tiny_models.qwen2(tmp_path_factory.mktemp("other"), seed=1)
    before = process_state()
    engine = make(model_dir)
    of_first_engine = engine.generate(PROMPTS, SAMPLING, seed=3)
    engine.close()
    engine = make(model_dir)  # a second one in the same process
    engine.load_weights(weights(model_dir).items())
    yield Started(engine, model_dir, other_dir, before, process_state(), of_first_engine)
    engine.close()


@pytest.fixture
def engine(started: Started) -> VLLMEngine:
    """The engine, awake and with its first weights."""
    started.engine.wake()
    started.engine.load_weights(weights(started.model_dir).items())
    return started.engine


def make(model_dir: Path) -> VLLMEngine:
    return VLLMEngine(str(model_dir), ROLLOUT, dtype="fp32", device_type="cpu", max_model_len=MAX_LEN, seed=0)


def weights(model_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(model_dir / "model.safetensors")


def worst_difference(model_dir: Path, groups: list[list[Completion]], temperature: float = 1.0) -> float:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    return max(
        (tiny_models.reference_logps(model, prompt, s.tokens, temperature) - torch.tensor(s.logps)).abs().max().item()
        for prompt, group in zip(PROMPTS, groups, strict=True)
        for s in group
    )


def test_the_process_stays_the_trainers(started: Started) -> None:
    """After two engines, a generation and a load: torch as it was, no generator, thread or variable touched."""
    assert started.process_after == started.process_before


def test_a_second_engine_in_the_process_generates_the_same(started: Started, engine: VLLMEngine) -> None:
    assert engine.generate(PROMPTS, SAMPLING, seed=3) == started.of_first_engine


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_are_those_of_the_sampled_distribution(started: Started, engine: VLLMEngine, temperature: float) -> None:
    groups = engine.generate(PROMPTS, replace(SAMPLING, temperature=temperature), seed=1)
    assert worst_difference(started.model_dir, groups, temperature) < 1e-5


def test_top_p_and_top_k_renormalise_the_logps(engine: VLLMEngine) -> None:
    """With two tokens left to choose from, the two log-probs at the first position add up to probability 1."""
    samples = engine.generate([PROMPTS[0]], Sampling(n=64, max_tokens=1, top_k=2), seed=0)[0]
    first = {sample.tokens[0]: sample.logps[0] for sample in samples}
    assert len(first) == 2
    assert np.exp(list(first.values())).sum() == pytest.approx(1, abs=1e-5)
    nucleus = engine.generate([PROMPTS[0]], Sampling(n=64, max_tokens=1, top_p=0.3), seed=0)[0]
    kept = {sample.tokens[0]: sample.logps[0] for sample in nucleus}
    assert len(kept) < 64
    assert np.exp(list(kept.values())).sum() <= 1 + 1e-5


def test_the_seed_decides(engine: VLLMEngine) -> None:
    first = engine.generate(PROMPTS, SAMPLING, seed=1)
    torch.rand(7)
    assert engine.generate(PROMPTS, SAMPLING, seed=1) == first
    assert engine.generate(PROMPTS, SAMPLING, seed=2) != first


def test_with_seeds_of_their_own_prompts_may_be_divided_over_engines(engine: VLLMEngine) -> None:
    """All together, or one by one in another order: the same tokens. More tokens than vLLM reads at once (2,048 of
    80 x 60), so that some prompts would be read in parts, which a generator on a CPU could not follow."""
    prompts = [[3 + (k * 7 + i) % 90 for i in range(60)] for k in range(80)]
    seeds = [1000 * k for k in range(80)]
    sampling = Sampling(n=2, max_tokens=3)
    together = engine.generate(prompts, sampling, seeds)
    for k in (79, 0, 41):
        (alone,) = engine.generate([prompts[k]], sampling, [seeds[k]])
        assert [c.tokens for c in alone] == [c.tokens for c in together[k]]
        logps = [np.concatenate([c.logps for c in group]) for group in (alone, together[k])]
        assert np.allclose(*logps, atol=1e-5)
    again = engine.generate(prompts, sampling, [seed + 1 for seed in seeds])
    assert [c.tokens for c in again[5]] != [c.tokens for c in together[5]]
    assert again[5][0].tokens == together[5][1].tokens  # a group's samples have neighbouring seeds


def test_greedy_is_the_argmax_and_may_be_asked_for_n(started: Started, engine: VLLMEngine) -> None:
    groups = engine.generate(PROMPTS, Sampling(n=3, max_tokens=6, temperature=0), seed=0)
    model = AutoModelForCausalLM.from_pretrained(started.model_dir, dtype=torch.float32)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        assert len(group) == 3 and group[0] == group[1] == group[2]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *group[0].tokens]])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == group[0].tokens
    assert worst_difference(started.model_dir, groups) < 1e-5


def test_stop_tokens_end_a_response_and_belong_to_it(engine: VLLMEngine) -> None:
    stops = {tiny_models.EOS, 20, 30, 40}  # the model's own end of sequence, and what the caller adds
    sampling = Sampling(n=24, max_tokens=40, stop_token_ids=[20, 30, 40])
    samples = [sample for group in engine.generate(PROMPTS, sampling, seed=0) for sample in group]
    for sample in samples:
        assert len(sample.tokens) == len(sample.logps)
        assert not stops & set(sample.tokens[:-1])
        assert (sample.tokens[-1] in stops) == (sample.finish_reason == "stop")
        assert sample.finish_reason == "stop" or len(sample.tokens) == 40
    assert {sample.tokens[-1] for sample in samples if sample.finish_reason == "stop"} == stops


def test_a_response_ends_where_the_model_does(engine: VLLMEngine) -> None:
    sample = engine.generate([[5] * (MAX_LEN - 2)], Sampling(max_tokens=10, temperature=0), seed=0)[0][0]
    assert (len(sample.tokens), sample.finish_reason) == (2, "length")


def test_reloading_weights(started: Started, engine: VLLMEngine) -> None:
    first = engine.generate(PROMPTS, SAMPLING, seed=1)
    engine.load_weights(weights(started.other_dir).items())
    other = engine.generate(PROMPTS, SAMPLING, seed=1)
    assert worst_difference(started.other_dir, other) < 1e-5
    assert worst_difference(started.model_dir, other) > 0.1
    engine.load_weights(reversed(weights(started.model_dir).items()))  # any order
    assert engine.generate(PROMPTS, SAMPLING, seed=1) == first


def test_an_incomplete_load_is_an_error_and_the_next_one_repairs_it(started: Started, engine: VLLMEngine) -> None:
    first = engine.generate(PROMPTS, SAMPLING, seed=1)
    part = weights(started.other_dir)
    del part["model.layers.1.self_attn.v_proj.weight"]
    with pytest.raises(RolloutError, match=r"1 of \d+ weights did not arrive.*layers.1.self_attn.v_proj.weight"):
        engine.load_weights(part.items())
    with pytest.raises(RolloutError, match="no usable weights"):
        engine.generate(PROMPTS, SAMPLING, seed=1)
    engine.load_weights(weights(started.model_dir).items())
    assert engine.generate(PROMPTS, SAMPLING, seed=1) == first


def test_a_load_that_breaks_off_leaves_nothing_behind(started: Started, engine: VLLMEngine) -> None:
    first = engine.generate(PROMPTS, SAMPLING, seed=1)
    other = weights(started.other_dir)

    def breaks_off() -> Iterator[tuple[str, torch.Tensor]]:
        yield "model.layers.0.self_attn.q_proj.weight", other["model.layers.0.self_attn.q_proj.weight"]
        raise ConnectionError("a rank went away")

    with pytest.raises(ConnectionError, match="a rank went away"):
        engine.load_weights(breaks_off())
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(RolloutError, match=r"'model.layers.9.w' is not one of the model"):
        engine.load_weights([(name, other[name]), ("model.layers.9.w", other[name])])
    with pytest.raises(RolloutError, match="arrived twice"):
        engine.load_weights([(name, other[name])] * 2)
    engine.load_weights(weights(started.model_dir).items())
    assert engine.generate(PROMPTS, SAMPLING, seed=1) == first


def test_sleep_and_wake(started: Started, engine: VLLMEngine) -> None:
    first = engine.generate(PROMPTS, SAMPLING, seed=1)
    engine.sleep()
    with pytest.raises(RolloutError, match="sleeps"):
        engine.generate(PROMPTS, SAMPLING, seed=1)
    with pytest.raises(RolloutError, match="wake_weights"):
        engine.load_weights(weights(started.model_dir).items())
    engine.wake_weights()
    engine.wake_kv_cache()
    with pytest.raises(RolloutError, match="no usable weights"):  # level 2 has dropped them
        engine.generate(PROMPTS, SAMPLING, seed=1)
    engine.load_weights(weights(started.model_dir).items())
    assert engine.generate(PROMPTS, SAMPLING, seed=1) == first


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt 1 has 0 tokens"),
        ([5] * MAX_LEN, "has 64 tokens"),
        ([4, 131], "token ids from 4 to 131"),
        ([-1], "-1"),
    ],
)
def test_bad_prompts_are_refused_before_anything_runs(engine: VLLMEngine, prompt: list[int], message: str) -> None:
    with pytest.raises(RolloutError, match=message):
        engine.generate([[5], prompt], SAMPLING, seed=0)
    assert len(engine.generate([[5]], SAMPLING, seed=0)[0]) == SAMPLING.n


@pytest.mark.parametrize("wrong", [{"n": 0}, {"max_tokens": 0}, {"temperature": 0.001}, {"temperature": -1.0}])
def test_bad_sampling_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"at least 1|temperature"):
        Sampling(**wrong)  # type: ignore[arg-type]


def test_head_size_without_a_kernel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RolloutError, match=r"heads of size 16 .* knows \[32, 64"):
        make(tiny_models.qwen2(tmp_path, seed=0, heads=4))


def test_latent_size_without_a_kernel_is_refused(tiny_hf: Callable[..., Path]) -> None:
    with pytest.raises(RolloutError, match=r"a latent of size 40 .* knows \[576\]"):
        make(tiny_hf("deepseek_v3"))


def test_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RolloutError, match=r"no \*.safetensors"):
        make(tmp_path)


@pytest.mark.slow
def test_engines_of_several_ranks(tmp_path: Path) -> None:
    script = Path(__file__).parent / "distributed" / "vllm_ranks.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-6000:]
    assert run.stdout.count("all cases passed") == 2
