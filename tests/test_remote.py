"""A push to a vLLM server, a process of its own."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megarl.config import RolloutConfig
from megarl.rollout import client
from megarl.rollout.auth import token_of
from megarl.rollout.vllm_engine import Sampling, VLLMEngine
from tests.distributed import remote_cases, tiny_models
from tests.distributed.push_ranks import PROMPTS, random_model
from tests.distributed.servers import generate, served, serving
from tests.standin import StandIn


def recipe(folder: Path) -> Path:
    data, path = folder / "data.jsonl", folder / "recipe.yaml"
    data.touch()
    path.write_text(
        "algorithm: sft\ncluster: {device: cpu}\nmodel: {dtype: fp32}\n"
        f"data: {{path: {data}, max_prompt_length: 32}}\nrollout: {{max_response_length: 32}}\n"
        "train: {train_global_batch_size: 4}\n"
    )
    return path


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_server_gets_the_trainers_weights(ranks, tmp_path: Path) -> None:
    new = tiny_models.qwen2(tmp_path / "new", seed=1)
    model = AutoModelForCausalLM.from_pretrained(new, dtype=torch.float32)
    prompt = [5, 6, 7, 9]

    def error() -> float:
        tokens, logps = generate(url, prompt, temperature=1.0)
        return (tiny_models.reference_logps(model, prompt, tokens) - torch.tensor(logps)).abs().max().item()

    with serving(tiny_models.qwen2(tmp_path / "served", seed=0), tmp_path / "server.log") as url:
        assert error() > 0.1  # it still has other weights
        overrides = ["cluster.gpus_per_node=2", "parallel.pipeline_model_parallel_size=2"]
        ranks.run(remote_cases.pushed, 2, recipe=str(recipe(tmp_path)), model=str(new), overrides=overrides, urls=[url])
        assert error() < 1e-5


def test_every_pipeline_stage_sends_its_own_weights(ranks, tiny_hf, tmp_path: Path) -> None:
    """With TP 2 and PP 2, from the first rank of each stage, in a group of its own; bit for bit what the file has. One
    of two servers dies in the middle of the second stage's share: the other is sent everything again."""
    new = tiny_hf("qwen2")
    expected = load_file(new / "model.safetensors")
    last = {name for name in expected if name.startswith(("model.layers.2.", "model.layers.3.", "model.norm", "lm_h"))}
    lives, dies = StandIn(), StandIn(dies_at=len(expected) - len(last) + 1)  # each tensor is a bucket
    layout = ["tensor_model_parallel_size=2", "sequence_parallel=true", "pipeline_model_parallel_size=2"]
    found = ranks.run(
        remote_cases.sent,
        4,
        recipe=str(recipe(tmp_path)),
        model=str(new),
        overrides=["cluster.gpus_per_node=4", *(f"parallel.{setting}" for setting in layout)],
        urls=sorted([lives.url, dies.url]),
        token="secret",
    )
    assert [had for *had, _ in found] == [[[lives.url]] * 2] * 4 and dies.dead
    assert [set(names) for *_, names in found] == [expected.keys() - last, set(), last, set()]
    assert lives.version == "1" and lives.weights.keys() == expected.keys()
    assert all(torch.equal(lives.weights[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_server_samples_as_an_engine_here_does(ranks, tmp_path: Path) -> None:
    """Latent attention and experts: all that a push has to put right again after vLLM's own processing."""
    old, new = (random_model("deepseek_v3", tmp_path / str(seed), seed) for seed in range(2))
    with serving(old, tmp_path / "server.log") as url:
        ranks.run(
            remote_cases.pushed,
            2,
            recipe=str(recipe(tmp_path)),
            model=str(new),
            overrides=["cluster.gpus_per_node=2", "parallel.expert_model_parallel_size=2"],
            urls=[url],
        )
        remote = [generate(url, prompt, temperature=0) for prompt in PROMPTS]
        with urllib.request.urlopen(f"{url}/metrics") as page:
            counted = [float(number) for number in client._TOKENS.findall(page.read().decode())]
        # By which clients see that a server moves: what it has read and written.
        assert sorted(counted) == sorted(map(float, (sum(map(len, PROMPTS)), sum(len(tokens) for tokens, _ in remote))))
    rollout = RolloutConfig(kv_cache_gb=0.05, max_num_seqs=8)
    engine = VLLMEngine(str(old), rollout, dtype="fp32", device_type="cpu", max_model_len=64, seed=0)
    engine.load_weights(load_file(new / "model.safetensors").items())
    groups = engine.generate(PROMPTS, Sampling(max_tokens=12, temperature=0), seed=0)
    engine.close()
    model = AutoModelForCausalLM.from_pretrained(new, dtype=torch.float32)
    for prompt, (tokens, logps), (here,) in zip(PROMPTS, remote, groups, strict=True):
        assert tokens == here.tokens
        assert logps == pytest.approx(here.logps, abs=1e-5)
        assert logps == pytest.approx(tiny_models.reference_logps(model, prompt, tokens).tolist(), abs=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_servers_that_die_before_and_in_a_push_are_left_out_of_it(ranks, tmp_path: Path) -> None:
    """Three servers, then two, then one: it has the weights, generates, and its version is the last push's."""
    new = tiny_models.qwen2(tmp_path / "new", seed=1)
    old = tiny_models.qwen2(tmp_path / "served", seed=0)
    path = recipe(tmp_path)
    sizes = ["rollout.max_num_seqs=8", "rollout.kv_cache_gb=0.02", "train.train_global_batch_size=512"]
    settings = [
        "algorithm=grpo",
        f"model.path={old}",
        f"run.root={tmp_path}",
        "rollout.mode=remote",
        "run.name=recipe",
        *sizes,
    ]
    with served(path, *settings, count=3) as servers:
        token = token_of(tmp_path / "recipe" / "engines")
        first, second, last = servers
        had = ranks.run(
            remote_cases.pushed_while_servers_die,
            2,
            recipe=str(path),
            model=str(new),
            overrides=["cluster.gpus_per_node=2", "parallel.pipeline_model_parallel_size=2"],
            urls=[server["url"] for server in servers],
            token=token,
            victims=[first["pid"], second["pid"]],
        )
        urls = [server["url"] for server in servers]
        assert had == [[urls, urls[1:], urls[2:]]] * 2
        tokens, logps = generate(last["url"], [5, 6, 7, 9], temperature=1.0, token=token)
    model = AutoModelForCausalLM.from_pretrained(new, dtype=torch.float32)
    assert logps == pytest.approx(tiny_models.reference_logps(model, [5, 6, 7, 9], tokens).tolist(), abs=1e-5)
