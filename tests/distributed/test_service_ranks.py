"""Rewards by models behind real vLLM servers: a judge that is asked in chat, a reward model at /classify."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

from megarl.observe.metrics import read_metrics
from megarl.parallel.ports import free_port
from megarl.rewards.judge import judge_reward
from megarl.rewards.reward_model import reward_model_reward
from megarl.rewards.service import ServiceError
from tests.byte_tokenizer import byte_tokenizer
from tests.distributed import train_cases
from tests.distributed.servers import ON_CPU, _wait_until_it_answers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
RECIPE = Path(__file__).parents[2] / "examples" / "agentic" / "cpu_judge.yaml"
PROMPTS, COMPLETIONS = ["1+1=", "2+2=", "3+3="], ["2", "five", "6, of course"]


def byte_model(path: Path, kind: type) -> Path:
    """A random Qwen2 that reads bytes."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen2Config(
        **sizes,
        num_hidden_layers=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0,
        num_labels=1,
    )
    kind(config).save_pretrained(path)
    return path


@contextlib.contextmanager
def serving(model: Path, log: Path, *more: str) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    settings = {"VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"} | ON_CPU
    with log.open("w") as file:
        process = subprocess.Popen([*command, *more], env=os.environ | settings, stdout=file, stderr=subprocess.STDOUT)
    try:
        _wait_until_it_answers(f"http://127.0.0.1:{port}", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def test_a_reward_model_gives_what_transformers_computes(tmp_path: Path) -> None:
    model = byte_model(tmp_path / "model", Qwen2ForSequenceClassification)
    columns = {"model": "rm", "timeout_s": 60.0}
    with serving(model, tmp_path / "log", "--runner", "pooling", "--served-model-name", "rm") as url:
        plain = reward_model_reward(COMPLETIONS, PROMPTS, url=url, **columns)
        chat = reward_model_reward(COMPLETIONS, PROMPTS, url=url, chat=True, **columns)
        (wrong,) = reward_model_reward(["a"], ["b"], url=url, model="another", timeout_s=60.0)
    assert isinstance(wrong, ServiceError) and "404" in str(wrong)
    tokenizer, own = byte_tokenizer(), AutoModelForSequenceClassification.from_pretrained(model).eval()
    talks = [
        f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{completion}<|im_end|>\n"
        for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    texts = [prompt + completion for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]
    for got, wanted in ((plain, texts), (chat, talks)):
        for score, text in zip(got, wanted, strict=True):
            tokens = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
            assert score == pytest.approx(own(tokens).logits.item(), abs=1e-4), text


def test_a_judge_is_asked_and_grpo_learns_from_its_verdicts(ranks, tiny_chat_model, tmp_path: Path) -> None:
    judge = byte_model(tmp_path / "judge", Qwen2ForCausalLM)
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{a}+1=", "answer": str(a + 1)}) + "\n" for a in range(8)))
    choices = {"max_tokens": 4, "structured_outputs": {"choice": ["A", "B", "C"]}}
    options = {"pattern": "([ABC])", "scores": {"A": 1.0, "B": 0.5, "C": 0.0}, "timeout_s": 60.0, "body": choices}
    with serving(judge, tmp_path / "log", "--served-model-name", "judge") as url:
        columns = {"prompts": PROMPTS, "answers": ["2", "4", "6"]}
        verdicts = judge_reward(COMPLETIONS, url=url, model="judge", **options, **columns)
        again = judge_reward(COMPLETIONS, url=url, model="judge", **options, **columns)
        settings = [f"model.path={tiny_chat_model}", f"data.path={data}", f"run.root={tmp_path}", "run.max_num_steps=2"]
        settings += ["run.max_num_epochs=2"]  # of one step each
        settings += ["checkpoint.save_at_end=false", "rollout.kv_cache_gb=0.02"]
        settings += [f"reward.functions={_functions(url, options)}"]
        assert ranks.run(train_cases.train, 1, recipe=str(RECIPE), overrides=settings) == ["done"]
    assert verdicts == again and set(verdicts) <= {0.0, 0.5, 1.0}  # greedy, so that it says the same twice
    records = read_metrics(tmp_path / "cpu_judge")
    assert [record["step"] for record in records] == [1, 2]
    assert all(record["reward/errors"] == 0 and 0 <= record["reward/judge"] <= 1 for record in records)
    assert min(record["actor/grad_norm"] for record in records) > 0


def _functions(url: str, options: dict) -> str:
    args = {"url": url, "model": "judge", "n": 2, "template": "Is {completion} what {prompt} makes?"} | options
    return json.dumps([{"name": "judge", "args": args}])
