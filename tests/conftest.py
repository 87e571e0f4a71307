"""Fixtures that many tests share: ranks that stay, and tiny Hugging Face models of every family."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import RankPool


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """What a test's in-process run leaves in the environment (the launcher's variables) is not the next test's."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "moe_intermediate_size": 48,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
}
# What families have beside, small.
TINY_OF = {
    "qwen3_moe": {
        "head_dim": 32,
        "moe_intermediate_size": 48,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": _LATENT | {"q_lora_rank": None, "n_routed_experts": 8, "num_experts_per_tok": 3},
    "deepseek_v3": _LATENT
    | {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4, "num_mtp_layers": 0},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
}


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Four processes that import megatron-core once."""
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_hf("qwen2", tie_word_embeddings=True)``: a directory with a random model of that family, made once a
    session."""
    made: dict[str, Path] = {}

    def make(family: str, **changes: Any) -> Path:
        key = f"{family}-{sorted(changes.items())}"
        if key not in made:
            made[key] = _save_random(family, tmp_path_factory.mktemp(family), changes)
        return made[key]

    return make


def _save_random(family: str, path: Path, changes: dict[str, Any]) -> Path:
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(len(family))
    config = CONFIG_MAPPING[family](**TINY | TINY_OF.get(family, {}) | changes)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        # norms at 1 and biases, sinks and the experts' bias at 0 would hide a mistake
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("experts.gate_up_proj_bias"):
                tensor.uniform_(-9, 9)  # beyond gpt-oss' clamp at 7
            elif name.endswith("e_score_correction_bias"):
                tensor.uniform_(-0.3, 0.3)
            elif (tensor.dim() == 1 and not name.endswith("inv_freq")) or name.endswith("_bias"):
                tensor.uniform_(0.5, 1.5)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 that vLLM can serve (head size 32), with a tokenizer of single characters."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    path = tmp_path_factory.mktemp("chat-model")
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *"0123456789+-*= "])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen2Config(
        **sizes,
        num_hidden_layers=2,
        vocab_size=len(vocabulary),
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    return path
