"""`megarl convert` of quantised directories, by the command: what arrives is what plain formulas say."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megarl.cli import main
from tests.convert_cases import assert_same, load_hf, make_hf, save_hf

FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FP4 = torch.cat([FP4, -FP4])


def there_and_back(source: Path, folder: Path, *back: str) -> dict[str, torch.Tensor]:
    assert main(["convert", "hf2mcore", str(source), str(folder / "megatron")]) == 0
    assert main(["convert", "mcore2hf", str(folder / "megatron"), str(folder / "back"), *back]) == 0
    return load_hf(folder / "back")


def with_config(path: Path, **more: object) -> None:
    config = json.loads((path / "config.json").read_text()) | more
    (path / "config.json").write_text(json.dumps(config))


def test_mxfp4_gpt_oss(tmp_path: Path) -> None:
    """Blocks ``[experts, rows, groups, 16]`` of bytes, low four bits first, times powers of two; rows on disk are
    columns of the matrices that bf16 directories have."""
    source = make_hf(tmp_path / "source", "gpt_oss", intermediate_size=64)
    tensors = load_hf(source)
    generator = torch.Generator().manual_seed(0)
    expected = dict(tensors)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(100, 140, blocks.shape[:3], generator=generator, dtype=torch.uint8)
        values = torch.stack([FP4[(blocks & 15).long()], FP4[(blocks >> 4).long()]], dim=-1).flatten(-2)
        values = values * torch.exp2(scales.float() - 127)[..., None]
        expected[name] = values.flatten(-2).transpose(1, 2).bfloat16()
        tensors |= {name + "_blocks": blocks, name + "_scales": scales}
    assert len(expected) == len(tensors) - 2 * 3  # two stacks of experts in each of three layers
    save_hf(source, tensors)
    with_config(source, quantization_config={"quant_method": "mxfp4"})
    assert_same(expected, there_and_back(source, tmp_path))
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    assert main(["convert", "verify", str(source), str(tmp_path / "megatron")]) == 0


def plain(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """fp32 product of values and their block's scale, rounded once."""
    rows, columns = q.shape
    blocks = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    return (q.float() * blocks).bfloat16()


def test_fp8_deepseek_with_its_prediction_layer(tmp_path: Path) -> None:
    """As the hub has DeepSeek-V3: linear weights in blocks of 128 x 128, also the MTP layer's; norms, routers,
    embeddings, heads and eh_proj in bf16, the experts' bias in fp32."""
    source = make_hf(tmp_path / "source", "deepseek_v3", hidden_size=160, intermediate_size=192)
    tensors = load_hf(source)
    generator = torch.Generator().manual_seed(0)
    expected = dict(tensors)
    for name, tensor in list(tensors.items()):
        if tensor.dim() == 2 and "proj" in name and "eh_proj" not in name:
            q = torch.randn(tensor.shape, generator=generator).to(torch.float8_e4m3fn)
            scale = torch.rand(-(-tensor.shape[0] // 128), -(-tensor.shape[1] // 128), generator=generator)
            tensors |= {name: q, name + "_scale_inv": scale}
            expected[name] = plain(q, scale)
    quantised = {name for name in tensors if name + "_scale_inv" in tensors}
    assert "model.layers.3.mlp.experts.1.up_proj.weight" in quantised and len(quantised) > 40
    save_hf(source, tensors)
    with_config(source, quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]})
    assert_same(expected, there_and_back(source, tmp_path))
    # Written as FP8 again, and read: the blocks' largest values are exact, others to e4m3's three bits.
    assert main(["convert", "mcore2hf", str(tmp_path / "megatron"), str(tmp_path / "fp8"), "--quantize", "fp8"]) == 0
    again = load_hf(tmp_path / "fp8")
    assert {name for name in again if name + "_scale_inv" in again} == quantised
    for name in expected.keys() - quantised:
        assert torch.equal(again[name].view(torch.uint8), expected[name].view(torch.uint8)), name
    for name in quantised:
        error = (plain(again[name], again[name + "_scale_inv"]).float() - expected[name].float()).abs().max()
        assert error <= expected[name].float().abs().max() / 16, name
    assert main(["convert", "hf2mcore", str(tmp_path / "fp8"), str(tmp_path / "megatron2")]) == 0
