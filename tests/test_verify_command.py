"""`megarl verify` as a command: its exit codes, what it says, and that every recipe of examples/ can be made small."""

from __future__ import annotations

import functools
import json
import re
import time
from pathlib import Path

import pytest

from megarl.cli import main
from megarl.config import load
from megarl.verify import command, shrink
from megarl.verify.cases import cases_of
from megarl.verify.shrink import MODEL, one_rank, small_config, small_layout
from tests.distributed import verify_cases
from tests.public_models import DEEPSEEK_V3, LLAMA_70B, MODELS, QWEN2_05B, QWEN3_30B_A3B
from tests.test_architecture import RECIPES, ROOT

RECIPE = """
algorithm: {algorithm}
cluster: {{num_nodes: 2, gpus_per_node: 8}}
model: {{path: {model}}}
data: {{path: data/none.jsonl}}
optimizer: {{clip_grad: 1.0}}
parallel: {{{parallel}}}
"""
CP_TP = "tensor_model_parallel_size: 4, sequence_parallel: true, context_parallel_size: 2"
EP = "expert_model_parallel_size: 8"


@pytest.fixture
def verify(tmp_path, capsys, monkeypatch):
    """Run the command of a recipe on a public model: (exit code, what it printed)."""
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)

    def run(hf, parallel, *arguments, algorithm="grpo"):
        (tmp_path / "config.json").write_text(json.dumps(hf))
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(RECIPE.format(model=tmp_path, parallel=parallel, algorithm=algorithm))
        code = main(["verify", str(recipe), *arguments])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


@pytest.mark.slow
def test_a_good_recipe_gives_0(verify):
    code, said = verify(QWEN2_05B, "context_parallel_size: 2", "--max-ranks=2", "--no-vllm", algorithm="ppo")
    assert code == 0, said
    assert "as CP2 on 2 ranks on cpu, ppo" in said
    assert "left out: model.dtype bf16" in said and "left out: fp8_cfg" not in said
    for row in ("logits: megatron and transformers", "policy: gradients of", "critic: values", "critic: gradients of"):
        assert row in said


FIRST_WRONG = {  # (model, layout, the first parameter that differs)
    "loss scaled by CP": (LLAMA_70B, CP_TP, "policy: model.embed_tokens.weight"),
    "label shifted by one": (LLAMA_70B, CP_TP, "policy: model.embed_tokens.weight"),
    "norms not reduced over SP": (LLAMA_70B, CP_TP, "policy: model.layers.0.input_layernorm.weight"),
    "router gradient counted twice": (QWEN3_30B_A3B, EP, "policy: model.layers.0.mlp.gate.weight"),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", FIRST_WRONG)
def test_a_planted_bug_gives_1_and_the_first_parameter(verify, monkeypatch, bug):
    monkeypatch.setattr(command, "_rank", functools.partial(verify_cases.rank_with, bug))
    hf, parallel, first = FIRST_WRONG[bug]
    code, said = verify(hf, parallel, "--max-ranks=4", "--no-vllm")
    assert code == 1, said
    assert re.search(rf"DIFFERS: the first parameter of \d+ is {re.escape(first)}, by \d", said), said


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_it_within_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_rank", verify_cases.rank_that_is_killed)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1 of 2 ended by SIGKILL and said nothing"):
        command.run_ranks(2, tmp_path, "all", 1e-5, vllm=False)
    assert time.monotonic() - start < 120  # a minute of imports on a busy machine; it waited for half an hour once


def test_what_cannot_be_tried_gives_2(verify, tmp_path):
    code, said = verify(LLAMA_70B, CP_TP + ", pipeline_model_parallel_size: 2", "--max-ranks=4")
    assert code == 2 and "needs 8 ranks, more than --max-ranks 4" in said
    code, said = verify(LLAMA_70B, CP_TP, f"model.path={tmp_path / 'nowhere'}")
    assert code == 2 and "of the model its config.json is enough" in said


@pytest.mark.slow
@pytest.mark.parametrize("hf", [QWEN2_05B, QWEN3_30B_A3B, DEEPSEEK_V3], ids=lambda hf: hf["model_type"])
def test_the_model_is_compared_with_transformers_and_vllm(verify, hf):
    code, said = verify(hf, "", "--max-ranks=1")
    assert code == 0, said
    for row in ("logits: megatron and transformers", "log-probs: megatron and vLLM"):
        [line] = [line for line in said.splitlines() if row in line]
        assert "not compared" not in line
        assert 0 < float(line.split("│")[2]) < 1e-4


def test_what_of_a_recipe_is_not_compared(tmp_path):
    cfg = load([str(ROOT / "examples" / "deepseek_v3_grpo_fp8.yaml")], check_model=False)
    small = shrink.small_recipe(cfg, small_layout(cfg, 16), tmp_path, "cpu")
    said = [line.partition(":")[0] for line in shrink.left_out(cfg, small)]
    assert said[:2] == ["model.dtype bf16", "fp8_cfg"] and "optimizer.use_distributed_optimizer" in said
    assert shrink.left_out(small, small) == []


@pytest.mark.slow
def test_what_vllm_cannot_compute_here_is_said(verify, monkeypatch):
    """Heads of 24, for which its CPU attention has no kernel: no difference, and no failure."""
    monkeypatch.setitem(shrink._SIZES, "head_dim", 24)
    code, said = verify(QWEN3_30B_A3B, "", "--max-ranks=1")
    assert code == 0, said
    [line] = [line for line in said.splitlines() if "log-probs: megatron and vLLM" in line]
    assert "not compared" in line and "attention heads of size 24" in line


# Those of methods differ in their losses alone.
SMALL = [pytest.param(path, marks=[pytest.mark.slow] * (path.parent.name == "methods")) for path in RECIPES]


@pytest.mark.parametrize("path", SMALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_recipe_can_be_made_small(path: Path, tmp_path, monkeypatch):
    """Its ranks load what the command writes, and know what to compare: of a model that is not here, by its
    config.json."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    name = str(path.relative_to(ROOT))
    header = re.search(
        rf"^# .*?((?:examples/\S+\.yaml )?){re.escape(name)}((?: \S+=\S+)*)", path.read_text(), flags=re.MULTILINE
    )
    cfg = load([*(str(ROOT / base) for base in header[1].split()), str(path), *header[2].split()], check_model=False)
    hf = next((hf for part, hf in MODELS.items() if part in cfg.model.path), QWEN2_05B)
    layout = small_layout(cfg, 8)
    (tmp_path / MODEL).mkdir()
    (tmp_path / MODEL / "config.json").write_text(json.dumps(small_config(hf, layout)))
    command.write_recipes(cfg, 8, tmp_path, "cpu")
    for which, ranks in (("one", one_rank(layout).world_size), ("all", layout.world_size)):
        small = load([str(tmp_path / f"{which}.yaml")])
        assert small.cluster.gpus_per_node == ranks <= 8
        assert small.loss == cfg.loss and small.preference == cfg.preference and small.optimizer.clip_grad == 0
        assert cases_of(small)[0].samples
