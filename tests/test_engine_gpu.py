"""The engine on a GPU: against transformers, with Transformer Engine where it is installed, in FP8, and with memory
that leaves the device. None of it runs without CUDA."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.gpu

RECIPES = ("tensorwise", "blockwise", "delayed", "mxfp8")
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "initializer_range": 0.05,
}
# Of families whose small models have dimensions that FP8 does not take.
FP8_SIZES = {"deepseek_v3": {"q_lora_rank": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}}
OFFLOAD = ["offload.params=true", "offload.grads=true", "offload.optimizer=true"]


@pytest.fixture(scope="module")
def mesh(tiny_hf: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from megarl.parallel.mesh import build_mesh

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    built = build_mesh(config(tmp_path_factory.mktemp("mesh"), tiny_hf("llama", **SIZES)))
    yield built
    built.close()


def config(folder: Path, model: Path, *overrides: str) -> Any:
    from megarl.config import load

    (folder / "data.jsonl").touch()
    (folder / "recipe.yaml").write_text(
        f"algorithm: sft\ncluster: {{device: cuda}}\nmodel: {{path: {model}}}\n"
        f"data: {{path: {folder / 'data.jsonl'}, max_prompt_length: 32}}\ntrain: {{train_global_batch_size: 4}}\n"
        "optimizer: {lr: 1.0e-3, adam_eps: 1.0e-4}\n"
    )
    return load([str(folder / "recipe.yaml"), *overrides])


def engine(mesh: Any, folder: Path, model: Path, *overrides: str) -> Any:
    from megarl.model.engine import Engine
    from megarl.model.family import read_spec

    return Engine(config(folder, model, *overrides), mesh, read_spec(model), temperature=1.0, total_updates=10)


def samples() -> list[Any]:
    from megarl.data.records import Sample

    generator = torch.Generator().manual_seed(0)
    draw = [torch.randint(0, 1024, (n,), generator=generator).tolist() for n in (70, 200, 131, 16, 97)]
    return [Sample(f"p{i}", 0, tokens, 4) for i, tokens in enumerate(draw)]


def hf_logps(model: Path) -> list[torch.Tensor]:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).cuda().eval()
    out = []
    with torch.no_grad():
        for sample in samples():
            tokens = torch.tensor(sample.tokens, device="cuda")
            logits = reference(tokens[None]).logits[0, sample.prompt_length - 1 : -1]
            out.append(logits.log_softmax(-1).gather(-1, tokens[sample.prompt_length :, None])[:, 0])
    return out


def has_engine() -> bool:
    from megarl.config.fp8 import engine_version

    return engine_version() is not None


def fp8(recipe: str) -> list[str]:
    """The settings, where this machine has what the recipe needs; else the test is skipped with the reason."""
    from megarl.config.fp8 import NEEDS, this_machine

    machine, needs = this_machine("cuda"), NEEDS[recipe]
    found = (machine.capability or (0,), machine.cuda or (0,), machine.transformer_engine or (0,))
    wanted = (needs.capability, needs.cuda, needs.transformer_engine)
    if any(here < needed for here, needed in zip(found, wanted, strict=True)):
        pytest.skip(f"{recipe} needs {needs}, and here is {machine}")
    return ["fp8_cfg.enabled=true", f"fp8_cfg.fp8_recipe={recipe}"]


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-4), ("bf16", 0.1)])
def test_log_probs_equal_transformers(mesh: Any, tiny_hf: Any, tmp_path: Path, dtype: str, tolerance: float) -> None:
    model = tiny_hf("llama", **SIZES)
    found = engine(mesh, tmp_path, model, f"model.dtype={dtype}").logps(samples())
    for ours, theirs in zip(found, hf_logps(model), strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3"])
def test_transformer_engines_layers_compute_what_the_local_ones_do(
    mesh: Any, tiny_hf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    if not has_engine():
        pytest.skip("Transformer Engine is not installed")
    model = tiny_hf(family, **(SIZES if family == "llama" else {"vocab_size": 1024}))
    theirs = engine(mesh, tmp_path, model).logps(samples())
    monkeypatch.setattr("megarl.model.build.HAVE_TE", False)
    ours = engine(mesh, tmp_path, model).logps(samples())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=0.1, rtol=0)


def three_steps(built: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    from megarl.losses.sft import sft

    losses = [built.step(samples(), sft)["loss"] for _ in range(3)]
    return losses, {name: tensor.clone() for name, tensor in built.stream(1 << 24)}


def test_memory_leaves_the_device_and_changes_nothing(mesh: Any, tiny_hf: Any, tmp_path: Path) -> None:
    model = tiny_hf("llama", **SIZES)
    plain = engine(mesh, tmp_path, model)
    whole = sum(plain.residency.bytes_on_device().values())
    losses, weights = three_steps(plain)
    del plain
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    levers = engine(mesh, tmp_path, model, *OFFLOAD)
    assert torch.cuda.memory_allocated() - before < 0.1 * whole
    found, after = three_steps(levers)
    assert found == losses
    assert all(torch.equal(after[name], weight) for name, weight in weights.items())
    assert torch.cuda.memory_allocated() - before < 0.1 * whole


def test_moments_on_the_host(mesh: Any, tiny_hf: Any, tmp_path: Path) -> None:
    """torch's fused kernels of the two devices may round differently in the last bit."""
    model = tiny_hf("llama", **SIZES)
    losses, _ = three_steps(engine(mesh, tmp_path, model))
    found, _ = three_steps(engine(mesh, tmp_path, model, "optimizer.optimizer_cpu_offload=true"))
    assert found == pytest.approx(losses, rel=1e-3)


def test_moments_in_bf16(mesh: Any, tiny_hf: Any, tmp_path: Path) -> None:
    if not has_engine():
        pytest.skip("Transformer Engine is not installed")
    model = tiny_hf("llama", **SIZES)
    losses, _ = three_steps(engine(mesh, tmp_path, model))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    plain = engine(mesh, tmp_path, model)
    three_steps(plain)
    whole = torch.cuda.memory_allocated() - before
    del plain
    lever = ["optimizer.use_precision_aware_optimizer=true", "checkpoint.save_contents=[hf]"]
    before = torch.cuda.memory_allocated()
    levers = engine(mesh, tmp_path, model, *lever, "checkpoint.resume_mode=disable")
    found, _ = three_steps(levers)
    assert found == pytest.approx(losses, rel=0.02)
    # 2 of weights, 4 of gradients, 4 of fp32 weights, and moments of 2 + 2 bytes in place of 4 + 4.
    assert torch.cuda.memory_allocated() - before < whole * (14.5 / 18)


@pytest.mark.parametrize("part", ["moe_act", "mla_up_proj"])
def test_parts_that_only_transformer_engine_computes_again(mesh: Any, tiny_hf: Any, tmp_path: Path, part: str) -> None:
    """The same losses, of fewer bytes that wait for backward."""
    from megarl.observe.activations import kept_by_decoder

    if not has_engine():
        pytest.skip("Transformer Engine is not installed")
    model = tiny_hf("deepseek_v3", vocab_size=1024)
    plain = engine(mesh, tmp_path, model)
    whole = kept_by_decoder(plain.model)
    losses, _ = three_steps(plain)
    lever = ["model.recompute_granularity=selective", f"model.recompute_modules=[{part}]"]
    again = engine(mesh, tmp_path, model, *lever)
    less = kept_by_decoder(again.model)
    found, _ = three_steps(again)
    assert found == pytest.approx(losses, rel=1e-3)
    assert 0 < sum(less) < sum(whole)


@pytest.mark.parametrize(
    ("recipe", "numbers", "family"),
    [
        *((recipe, "e4m3", "llama") for recipe in RECIPES),
        ("tensorwise", "hybrid", "llama"),
        ("tensorwise", "e4m3", "qwen3_moe"),
        ("tensorwise", "e4m3", "deepseek_v3"),
    ],
)
def test_fp8_is_near_bf16(mesh: Any, tiny_hf: Any, tmp_path: Path, recipe: str, numbers: str, family: str) -> None:
    """Log-probs within FP8's rounding, the first loss within 2 %, a loss that falls, and the account of rounding."""
    from megarl.losses.sft import sft

    settings = [*fp8(recipe), f"fp8_cfg.fp8={numbers}"]
    model = tiny_hf(family, **(SIZES if family == "llama" else {"vocab_size": 1024} | FP8_SIZES.get(family, {})))
    exact = engine(mesh, tmp_path, model)
    rounded = engine(mesh, tmp_path, model, *settings, "fp8_cfg.metrics=true")
    for a, b in zip(rounded.logps(samples()), exact.logps(samples()), strict=True):
        assert 0 < (a - b).abs().mean() < 0.1
    first = [built.step(samples(), sft) for built in (rounded, exact)]
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=0.02)
    assert rounded.step(samples(), sft)["loss"] < first[0]["loss"]
    assert all(first[0][f"fp8/amax/layer_{i}"] > 0 and first[0][f"fp8/underflow/layer_{i}"] < 0.1 for i in range(4))


def test_first_and_last_layers_in_bf16_are_nearer(mesh: Any, tiny_hf: Any, tmp_path: Path) -> None:
    """With all 4 layers in bf16 nothing is rounded."""
    settings = fp8("tensorwise")
    model = tiny_hf("llama", **SIZES)
    exact = engine(mesh, tmp_path, model).logps(samples())
    apart = [*settings, "fp8_cfg.first_last_layers_bf16=true", "fp8_cfg.num_layers_at_start_in_bf16=2"]
    found = engine(mesh, tmp_path, model, *apart, "fp8_cfg.num_layers_at_end_in_bf16=2").logps(samples())
    for a, b in zip(found, exact, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_fp8_parameters_train_and_are_streamed(mesh: Any, tiny_hf: Any, tmp_path: Path, recipe: str) -> None:
    settings = [*fp8(recipe), "checkpoint.save_contents=[hf]"]
    model = tiny_hf("llama", **SIZES)
    losses, weights = three_steps(engine(mesh, tmp_path, model, *settings))
    found, after = three_steps(engine(mesh, tmp_path, model, *settings, "fp8_cfg.fp8_param=true"))
    assert found == pytest.approx(losses, rel=0.02)
    for name, weight in weights.items():
        assert after[name].dtype == torch.bfloat16
        # e4m3 has 3 bits of mantissa: half a step is 1/16 of a number, and some are below the smallest.
        torch.testing.assert_close(after[name], weight, rtol=0.08, atol=0.02 * weight.abs().max().item())
