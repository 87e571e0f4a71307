"""A Megatron checkpoint whose stored arguments say another model than config.json is refused, argument by argument."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from megarl.cli import main
from megarl.convert.arguments import disagreements
from megarl.model.family import read_spec
from tests.convert_cases import assert_same, load_hf, make_hf

# As Megatron-LM's parser leaves them, for the models of `tests/convert_cases.py`: 4 heads, 2 groups, hidden size 32.
COMMON = {"num_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "normalization": "RMSNorm", "swiglu": True}
COMMON |= {"norm_epsilon": 1e-6, "rotary_base": 10000, "rotary_percent": 1.0, "add_bias_linear": False}
COMMON |= {"apply_layernorm_1p": False, "moe_mlp_glu_interleave_size": None, "attention_output_gate": False}
LLAMA = COMMON | {"group_query_attention": True, "num_query_groups": 2, "kv_channels": 8, "ffn_hidden_size": 48}
LLAMA |= {"untie_embeddings_and_output_weights": True, "qk_layernorm": False, "use_rope_scaling": False}
LLAMA |= {"num_experts": None, "moe_router_topk": 2, "q_lora_rank": None, "multi_latent_attention": False}


def said(family: str, args: dict, folder: Path, **changes: object) -> list[str]:
    spec = read_spec(make_hf(folder / "hf", family, **changes))
    return disagreements({"args": args}, spec)


@pytest.mark.parametrize(
    "changed, expected",
    [
        ({}, []),
        ({"num_attention_heads": 8}, ["args.num_attention_heads is 8, config.json says 4"]),
        ({"kv_channels": 16}, ["args.kv_channels is 16, config.json says 8"]),
        ({"num_query_groups": 4}, ["args.num_query_groups is 4, config.json says 2"]),
        ({"group_query_attention": False}, ["args.group_query_attention is False, config.json says True"]),
        ({"ffn_hidden_size": 64}, ["args.ffn_hidden_size is 64, config.json says 48"]),
        ({"rotary_base": 500000}, ["args.rotary_base is 500000, config.json says 10000.0"]),
        ({"norm_epsilon": 1e-5}, ["args.norm_epsilon is 1e-05, config.json says 1e-06"]),
        ({"use_rope_scaling": True}, ["args.use_rope_scaling is True, config.json says False"]),
        ({"apply_layernorm_1p": True}, ["args.apply_layernorm_1p is True: no rule is for such weights"]),
        ({"moe_mlp_glu_interleave_size": 32}, ["args.moe_mlp_glu_interleave_size is 32: no rule is for such weights"]),
        ({"attention_output_gate": True}, ["args.attention_output_gate is True: no rule is for such weights"]),
        ({"num_layers": 4, "swiglu": False}, ["num_layers is 4", "swiglu is False"]),
    ],
)
def test_each_argument(changed: dict, expected: list[str], tmp_path: Path) -> None:
    found = said("llama", LLAMA | changed, tmp_path)
    assert len(found) == len(expected) and all(part in line for part, line in zip(expected, found, strict=True)), found


def test_arguments_that_are_not_there_or_mean_nothing(tmp_path: Path) -> None:
    """Without grouping Megatron-LM leaves num_query_groups at 1; without a softmax router_pre_softmax is not used."""
    assert said("llama", {}, tmp_path / "a") == []
    ungrouped = LLAMA | {"group_query_attention": False, "num_query_groups": 1}
    assert said("llama", ungrouped, tmp_path / "b", num_key_value_heads=4) == []
    sigmoid = {"moe_router_score_function": "sigmoid", "moe_router_pre_softmax": True, "num_query_groups": 1}
    assert said("deepseek_v3", sigmoid, tmp_path / "c") == []
    assert said("mixtral", {"moe_router_pre_softmax": True}, tmp_path / "d") == [
        "args.moe_router_pre_softmax is True, config.json says False"
    ]


def test_the_command_refuses_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Read from common.pt, where Megatron-LM keeps a Namespace with objects of its own in it."""
    source = make_hf(tmp_path / "source", "llama")
    assert main(["convert", "hf2mcore", str(source), str(tmp_path / "megatron")]) == 0
    common = tmp_path / "megatron" / "release" / "common.pt"
    state = torch.load(common)
    for changed, code in (({}, 0), ({"num_attention_heads": 2, "kv_channels": 16}, 1)):
        torch.save(state | {"args": argparse.Namespace(odd=Path("a"), **LLAMA | changed)}, common)
        target = tmp_path / f"back{code}"
        assert main(["convert", "mcore2hf", str(tmp_path / "megatron"), str(target)]) == code
    message = capsys.readouterr().err
    assert f"{common.parent}: args.num_attention_heads is 2, config.json says 4" in message
    assert f"{common.parent}: args.kv_channels is 16, config.json says 8" in message
    assert not target.exists()
    assert_same(load_hf(source), load_hf(tmp_path / "back0"))
