"""FP8 and MXFP4: values against their definitions and against transformers, and blocks that read what they need."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.weights.quantized import (
    BLOCK,
    dequantize_fp8_block,
    dequantize_mxfp4,
    fp8_config,
    is_quantised,
    quantize_fp8_block,
    scale_shape,
)


def same_bits(a, b):
    """Equality that tells -0.0 from 0.0 and lets NaN equal itself."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.int16), b.contiguous().view(torch.int16))


def random_fp8(rows, columns, seed=0):
    """Random bytes, so that subnormals, both zeros and both NaNs are among them."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 256, (rows, columns), generator=generator, dtype=torch.uint8)
    scales = torch.rand(scale_shape((rows, columns)), generator=generator) * 1e-2
    return q.view(torch.float8_e4m3fn), scales


def by_definition(q, scales):
    """The product in fp32, then bf16."""
    spread = scales.repeat_interleave(128, dim=0)[: q.shape[0]].repeat_interleave(128, dim=1)[:, : q.shape[1]]
    return (q.float() * spread).to(torch.bfloat16)


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (130, 200), (5, 7), (200, 129), (576, 64)])
def test_fp8_is_the_fp32_product_rounded_once(shape):
    q, scales = random_fp8(*shape)
    ours = dequantize_fp8_block(q, scales, BLOCK, slice(0, shape[0]), slice(0, shape[1]))
    expected = by_definition(q, scales)
    assert torch.equal(ours.isnan(), expected.isnan())
    assert same_bits(ours.nan_to_num(), expected.nan_to_num())


def test_fp8_is_what_transformers_reads():
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    q, scales = random_fp8(256, 384)
    theirs = Fp8Dequantize(None)._dequantize_one(q, scales, torch.bfloat16)
    ours = dequantize_fp8_block(q, scales, BLOCK, slice(0, 256), slice(0, 384))
    assert same_bits(ours.nan_to_num(), theirs.nan_to_num())


def test_a_bf16_product_would_be_another_number():
    q, scales = random_fp8(256, 256)
    q = torch.where(q.float().isnan(), 0.0, q.float()).to(torch.float8_e4m3fn)
    ours = dequantize_fp8_block(q, scales, BLOCK, slice(0, 256), slice(0, 256))
    spread = scales.to(torch.bfloat16).repeat_interleave(128, dim=0).repeat_interleave(128, dim=1)
    assert (q.to(torch.bfloat16) * spread != ours).float().mean() > 0.2


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_slice_of_the_weight_is_the_slice_dequantised(data):
    rows, columns = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300))
    a, b = sorted(data.draw(st.lists(st.integers(0, rows), min_size=2, max_size=2, unique=True)))
    c, d = sorted(data.draw(st.lists(st.integers(0, columns), min_size=2, max_size=2, unique=True)))
    q, scales = random_fp8(rows, columns, seed=rows)
    whole = dequantize_fp8_block(q, scales, BLOCK, slice(0, rows), slice(0, columns))
    # What the block does not need is poisoned, so reading it would show.
    needed = torch.zeros_like(scales, dtype=torch.bool)
    needed[a // 128 : (b - 1) // 128 + 1, c // 128 : (d - 1) // 128 + 1] = True
    part = dequantize_fp8_block(q, torch.where(needed, scales, torch.nan), BLOCK, slice(a, b), slice(c, d))
    assert same_bits(part, whole[a:b, c:d])


def test_quantised_blocks_have_their_largest_at_448_and_every_value_near():
    weight = torch.randn(300, 260).to(torch.bfloat16) * 0.02
    weight[128:256, 128:256] = 0.0
    q, scales = quantize_fp8_block(weight)
    assert q.shape == (300, 260) and scales.shape == (3, 3) and scales.dtype == torch.float32
    for i in range(3):
        for j in range(3):
            block = (slice(i * 128, (i + 1) * 128), slice(j * 128, (j + 1) * 128))
            largest = weight[block].float().abs().max()
            if largest > 0:
                assert scales[i, j] == largest / 448
                assert q[block].float().abs().max() == 448
    back = dequantize_fp8_block(q, scales, BLOCK, slice(0, 300), slice(0, 260)).float()
    # e4m3 has 3 bits behind the point: half a step is 1/16 of the value; below 2^-6 the step is 2^-9.
    spread = scales.repeat_interleave(128, dim=0)[:300].repeat_interleave(128, dim=1)[:, :260]
    bound = torch.maximum(weight.float().abs() / 16, spread * 2**-10)
    assert ((back - weight.float()).abs() <= bound + weight.float().abs() / 256).all()
    assert (back[128:256, 128:256] == 0).all()


def test_a_value_that_fp8_holds_comes_back_exactly():
    q = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    q = torch.where(q.isnan(), 448.0, q).view(16, 16)  # 448 is in it, so the scale is 1
    values, scales = quantize_fp8_block(q.to(torch.bfloat16))
    assert scales.item() == 1.0
    assert torch.equal(values.float(), q)


@pytest.mark.parametrize("tiny", [1e-40, 2e-39])
def test_weights_too_small_for_a_scale_are_no_nan(tiny):
    q, scales = quantize_fp8_block(torch.full((4, 4), tiny))
    assert torch.isfinite(q.float()).all() and torch.isfinite(scales).all()


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_weights_that_are_not_finite_are_refused(bad):
    weight = torch.zeros(200, 200)
    weight[150, 3] = bad
    with pytest.raises(ValueError, match=r"rows 128 to 200 .* not finite"):
        quantize_fp8_block(weight)


def test_what_is_quantised_is_what_deepseeks_repository_quantises():
    linear = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    quantised = [f"model.layers.3.self_attn.{name}.weight" for name in linear]
    quantised += [f"model.layers.3.mlp.experts.17.{name}_proj.weight" for name in ("gate", "up", "down")]
    quantised += [f"model.layers.3.mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")]
    kept = ["model.embed_tokens.weight", "lm_head.weight", "model.layers.3.mlp.gate.weight"]
    kept += ["model.layers.61.embed_tokens.weight", "model.layers.61.shared_head.head.weight"]
    kept += ["model.layers.61.eh_proj.weight", "model.layers.0.block_sparse_moe.gate.weight"]
    assert all(is_quantised(name, (64, 64)) for name in quantised)
    assert not any(is_quantised(name, (64, 64)) for name in kept)
    assert not is_quantised("model.layers.3.self_attn.q_proj.bias", (64,))
    assert not is_quantised("model.layers.3.input_layernorm.weight", (64,))
    assert fp8_config(kept[1:3])["modules_to_not_convert"] == ["lm_head", "model.layers.3.mlp.gate"]


def test_mxfp4_is_bit_for_bit_what_transformers_reads():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 96, 4, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(0, 255, (3, 96, 4), generator=generator, dtype=torch.uint8)
    scales.view(-1)[:255] = torch.arange(255, dtype=torch.uint8)  # every scale there is
    theirs = convert_moe_packed_tensors(blocks, scales)  # [experts, in, out]
    assert same_bits(dequantize_mxfp4(blocks, scales).transpose(1, 2), theirs)


def test_mxfp4_values():
    byte = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2, dtype=torch.uint8)  # low half first
    values = dequantize_mxfp4(byte.view(1, 16), torch.tensor([128], dtype=torch.uint8))  # 2^(128 - 127)
    half = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert values.tolist() == [2 * v for v in [*half, *(-v for v in half)] * 2]


def test_a_scale_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="scale is 255"):
        dequantize_mxfp4(torch.zeros(1, 16, dtype=torch.uint8), torch.tensor([255], dtype=torch.uint8))
