"""Hugging Face directories: what is read, and what is refused, by file and tensor, as soon as it is opened."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from megarl.model.family import read_spec
from megarl.weights.hf_files import INDEX, CheckpointError, HFCheckpoint, carried_files, read_header
from megarl.weights.load import HFSource, check
from megarl.weights.quantized import BLOCK, dequantize_fp8_block, dequantize_mxfp4, quantize_fp8_block
from megarl.weights.shard import Segment, segments

NORM = "model.layers.1.input_layernorm.weight"
FP8_CONFIG = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def damaged(tiny_hf, tmp_path, change):
    """A copy of a tiny Llama with its tensors changed."""
    source = tiny_hf("llama")
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    return tmp_path


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda t: t.pop(NORM), f"missing: {NORM}"),
        (lambda t: t.update(extra=torch.zeros(1)), "not part of llama: extra"),
        (lambda t: t.update({NORM: torch.zeros(3)}), rf"{NORM}: shape \(3,\), the config says \(64,\)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tiny_hf, tmp_path, change, reason):
    path = damaged(tiny_hf, tmp_path, change)
    with pytest.raises(CheckpointError, match=reason):
        check(read_spec(path), HFSource(HFCheckpoint(path)))


def test_what_holds_no_weight_is_passed_over(tiny_hf, tmp_path):
    path = damaged(
        tiny_hf, tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    )
    check(read_spec(path), HFSource(HFCheckpoint(path)))


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_pickles_are_not_read(tmp_path):
    """One that would make a folder makes none here, and does where it is unpickled."""
    torch.save({"x": Canary(tmp_path / "canary")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only safetensors"):
        HFCheckpoint(tmp_path)
    assert not (tmp_path / "canary").exists()
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "canary").exists()


@pytest.fixture
def two_files(tmp_path):
    """A checkpoint of two files and its index: a [6, 4] and b [2] in the first, c [5] in the second."""
    path = tmp_path / "checkpoint"
    path.mkdir()
    save_file({"a": torch.arange(24.0).view(6, 4), "b": torch.ones(2)}, path / "one.safetensors")
    save_file({"c": torch.arange(5, dtype=torch.bfloat16)}, path / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "config.json").write_text("{}")
    return path


def change_index(path, **changes):
    """Change entries of the index; None removes one."""
    index = json.loads((path / INDEX).read_text())
    weight_map = index["weight_map"] | changes
    index["weight_map"] = {name: file for name, file in weight_map.items() if file is not None}
    (path / INDEX).write_text(json.dumps(index))


def test_blocks_are_views_of_the_mapped_file(two_files):
    checkpoint = HFCheckpoint(two_files)
    assert checkpoint.names() == {"a", "b", "c"}
    assert (checkpoint.shape("a"), checkpoint.dtype("a"), checkpoint.nbytes("a")) == ((6, 4), torch.float32, 96)
    (stored,) = checkpoint.stored("c")
    assert (stored.name, stored.file, stored.nbytes) == ("c", two_files / "two.safetensors", 10)
    assert stored.offset == stored.file.stat().st_size - 10  # its data is all that follows the header
    block = checkpoint.read(Segment("a", slice(1, 6, 2), slice(0, 3), slice(1, 3)))
    assert block.tolist() == [[5, 6], [13, 14], [21, 22]]
    assert block.stride() == (8, 1)
    assert checkpoint.read(Segment("c", slice(1, 3), slice(0, 2), None)).tolist() == [1, 2]
    assert torch.equal(checkpoint.whole("a"), torch.arange(24.0).view(6, 4))


@pytest.mark.parametrize(
    "segment",
    [
        Segment("a", slice(0, 7), slice(0, 7), slice(0, 4)),
        Segment("a", slice(0, 6), slice(0, 6), slice(0, 5)),
        Segment("a", slice(0, 5), slice(0, 5), slice(0, 6), transposed=True),
    ],
)
def test_a_block_past_the_end_is_refused_and_not_cut_short(two_files, segment):
    with pytest.raises(CheckpointError, match=r"tensor a of shape \(6, 4\) has no block"):
        HFCheckpoint(two_files).read(segment)


def drop_file(path):
    (path / "two.safetensors").unlink()


def truncate(path):
    data = (path / "one.safetensors").read_bytes()
    (path / "one.safetensors").write_bytes(data[:-4])


def truncate_in_the_header(path):
    data = (path / "one.safetensors").read_bytes()
    (path / "one.safetensors").write_bytes(data[:40])


def lengthen(path):
    with (path / "one.safetensors").open("ab") as file:
        file.write(b"1234")


def rename_tensor(path):
    data = (path / "two.safetensors").read_bytes()
    (path / "two.safetensors").write_bytes(data.replace(b'"c"', b'"d"'))


def repeat_tensor(path):
    save_file({"c": torch.zeros(5), "b": torch.zeros(2)}, path / "two.safetensors")


def repeat_in_one_file(path):
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, path / "one.safetensors")
    data = (path / "one.safetensors").read_bytes()
    (path / "one.safetensors").write_bytes(data.replace(b'"b"', b'"a"'))


def huge_header(path):
    """A header of 2^63 bytes, which must not be asked memory for."""
    data = (path / "one.safetensors").read_bytes()
    (path / "one.safetensors").write_bytes((1 << 63).to_bytes(8, "little") + data[8:])


def overlap(path):
    """b begins within a: [0, 96) and [88, 96)."""
    header = {"a": {"dtype": "F32", "shape": [6, 4], "data_offsets": [0, 96]}}
    header |= {"b": {"dtype": "F32", "shape": [2], "data_offsets": [88, 96]}}
    text = json.dumps(header).encode()
    (path / "one.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(96))


def stray_file(path):
    save_file({"e": torch.zeros(1)}, path / "model-00003-of-00003.safetensors")


@pytest.mark.parametrize(
    "damage, reason",
    [
        (drop_file, r"two\.safetensors: missing"),
        (truncate, r"one\.safetensors: truncated: tensor [ab] ends at"),
        (huge_header, r"one\.safetensors: truncated or damaged: \d+ bytes, with a header of 9223372036854775808"),
        (overlap, r"one\.safetensors: damaged header: tensor b is at \d+, not at \d+"),
        (truncate_in_the_header, r"one\.safetensors: truncated or damaged"),
        (lengthen, r"one\.safetensors: 4 bytes after the last tensor"),
        (rename_tensor, r"two\.safetensors: tensor c is not there"),
        (repeat_tensor, r"two\.safetensors: tensor b is in one\.safetensors too"),
        (repeat_in_one_file, r"one\.safetensors: damaged header: twice in one file: a"),
        (stray_file, r"model-00003-of-00003\.safetensors: holds tensors, but .*index\.json does not name it"),
        (lambda path: change_index(path, b=None), r"index\.json: tensor b of one\.safetensors is not in the index"),
        (lambda path: change_index(path, b="two.safetensors"), r"two\.safetensors: tensor b is not there"),
        (lambda path: change_index(path, e="two.safetensors"), r"two\.safetensors: tensor e is not there"),
        (lambda path: change_index(path, e="three.safetensors"), r"three\.safetensors: missing"),
        (lambda path: change_index(path, e="../x.safetensors"), r"index\.json: '\.\./x.*lies outside"),
        (lambda path: change_index(path, e="/etc/passwd"), r"index\.json: '/etc/passwd' lies outside"),
        (lambda path: change_index(path, e=3), r"index\.json: damaged: no weight_map"),
        (lambda path: (path / INDEX).write_text('{"weight_map": {"a"'), r"index\.json: cannot be read"),
        (lambda path: (path / INDEX).write_text("[]"), r"index\.json: not a JSON object"),
        (lambda path: (path / INDEX).unlink(), r"neither .*index\.json nor model\.safetensors"),
        (lambda path: (path / INDEX).rename(path / "index.bak") and repeat_single(path), r"one\.safetensors: holds"),
    ],
)
def test_whatever_is_wrong_is_named_when_the_directory_is_opened(two_files, damage, reason):
    damage(two_files)
    with pytest.raises(CheckpointError, match=reason):
        HFCheckpoint(two_files)


def repeat_single(path):
    save_file({"a": torch.zeros(1)}, path / "model.safetensors")


def test_mistrals_own_layout_beside_the_weights_is_passed_over(two_files):
    save_file({"layers.0": torch.zeros(1)}, two_files / "consolidated.safetensors")
    assert HFCheckpoint(two_files).names() == {"a", "b", "c"}


def test_files_may_be_links_as_in_the_hubs_cache(two_files, tmp_path):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in two_files.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert HFCheckpoint(snapshot).read(Segment("b", slice(0, 2), slice(0, 2), None)).tolist() == [1, 1]


def test_files_that_change_while_they_are_read_are_noticed(two_files):
    checkpoint = HFCheckpoint(two_files)
    checkpoint.check()
    save_file({"c": torch.zeros(6)}, two_files / "two.safetensors")
    with pytest.raises(CheckpointError, match="have changed"):
        checkpoint.check()


def test_no_bit_of_a_header_can_flip_unseen(tmp_path):
    """Every single bit: the file is refused, or its tensors are the same, or one has another name, which the rules of
    its family will not know."""
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.arange(12.0).view(3, 4), "bias": torch.ones(3, dtype=torch.bfloat16)}, file)
    good = file.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    expected = {(t.dtype, t.shape, t.offset) for t in read_header(file).values()}
    refused = 0
    for bit in range(8 * header):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bad)
        try:
            got = read_header(file)
        except CheckpointError as error:
            assert "model.safetensors" in str(error)
            refused += 1
        else:
            assert {(t.dtype, t.shape, t.offset) for t in got.values()} == expected, bit
    assert refused > 6 * header


def fp8_checkpoint(path, weight, config=FP8_CONFIG, **changes):
    q, scales = quantize_fp8_block(weight)
    tensors = {"x.weight": q, "x.weight_scale_inv": scales, "norm.weight": torch.ones(4, dtype=torch.bfloat16)}
    save_file({k: v for k, v in (tensors | changes).items() if v is not None}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return q, scales


def test_fp8_weights_are_read_as_bf16(tmp_path):
    q, scales = fp8_checkpoint(tmp_path, torch.randn(300, 200))
    expected = dequantize_fp8_block(q, scales, BLOCK, slice(0, 300), slice(0, 200))
    checkpoint = HFCheckpoint(tmp_path)
    assert checkpoint.names() == {"x.weight", "norm.weight"}
    assert checkpoint.dtype("x.weight") == torch.bfloat16
    assert checkpoint.nbytes("x.weight") == 300 * 200 * 2
    assert [part.name for part in checkpoint.stored("x.weight")] == ["x.weight", "x.weight_scale_inv"]
    assert torch.equal(checkpoint.whole("x.weight"), expected)
    for segment in (
        Segment("x.weight", slice(100, 290), slice(0, 190), slice(3, 150)),
        Segment("x.weight", slice(1, 300, 2), slice(0, 150), None),
        Segment("x.weight", slice(5, 200), slice(0, 195), slice(100, 290), transposed=True),
    ):
        assert torch.equal(checkpoint.read(segment), segment.view(expected))


@pytest.mark.parametrize(
    "changes, config, reason",
    [
        ({"x.weight_scale_inv": None}, FP8_CONFIG, r"tensor x\.weight without x\.weight_scale_inv"),
        ({"x.weight": None}, FP8_CONFIG, r"tensor x\.weight_scale_inv without x\.weight"),
        ({"x.weight": torch.zeros(300, 200)}, FP8_CONFIG, r"tensor x\.weight is torch\.float32, though it has scales"),
        ({"x.weight_scale_inv": torch.ones(3, 3)}, FP8_CONFIG, r"x\.weight_scale_inv has shape \(3, 3\)"),
        ({}, {}, r"config\.json: quantization_config\.weight_block_size is None"),
        ({}, {"quantization_config": {"weight_block_size": [128]}}, r"weight_block_size is \[128\]"),
    ],
)
def test_fp8_without_its_scales_or_block_size_is_refused(tmp_path, changes, config, reason):
    fp8_checkpoint(tmp_path, torch.randn(300, 200), config, **changes)
    with pytest.raises(CheckpointError, match=reason):
        HFCheckpoint(tmp_path)


def mxfp4_checkpoint(path, **changes):
    """gpt-oss experts ``p``: 2 experts of 64 inputs and 6 outputs."""
    tensors = {
        "p_blocks": torch.randint(0, 256, (2, 6, 2, 16), dtype=torch.uint8),
        "p_scales": torch.randint(120, 135, (2, 6, 2), dtype=torch.uint8),
    }
    tensors = {k: v for k, v in (tensors | changes).items() if v is not None}
    save_file(tensors, path / "model.safetensors")
    return tensors


def test_mxfp4_experts_are_read_as_bf16_inputs_by_outputs(tmp_path):
    tensors = mxfp4_checkpoint(tmp_path)
    expected = dequantize_mxfp4(tensors["p_blocks"], tensors["p_scales"]).transpose(1, 2)
    checkpoint = HFCheckpoint(tmp_path)
    assert checkpoint.names() == {"p"}
    assert (checkpoint.shape("p"), checkpoint.dtype("p")) == ((2, 64, 6), torch.bfloat16)
    assert torch.equal(checkpoint.whole("p"), expected)
    for segment in (
        Segment("p", slice(1, 6, 2), slice(0, 3), slice(0, 64), 1, transposed=True),
        Segment("p", slice(0, 6), slice(0, 6), slice(37, 60), 0, transposed=True),
        Segment("p", slice(5, 50, 3), slice(0, 15), slice(1, 4), 1),
        Segment("p", slice(0, 64), slice(0, 64), None, 0),
    ):
        assert torch.equal(checkpoint.read(segment), segment.view(expected))


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"p_scales": None}, r"tensor p_blocks without p_scales"),
        ({"p_blocks": None}, r"tensor p_scales without p_blocks"),
        ({"p_scales": torch.zeros(2, 6, 3, dtype=torch.uint8)}, r"p_blocks has shape .* p_scales \(2, 6, 3\)"),
    ],
)
def test_mxfp4_without_its_scales_is_refused(tmp_path, changes, reason):
    mxfp4_checkpoint(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=reason):
        HFCheckpoint(tmp_path)


def test_an_mxfp4_scale_that_is_no_number_is_named(tmp_path):
    mxfp4_checkpoint(tmp_path, p_scales=torch.full((2, 6, 2), 255, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor p: a scale is 255"):
        HFCheckpoint(tmp_path).whole("p")


def test_config_and_tokenizer_travel_and_weights_do_not(two_files):
    carried = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"]
    carried += ["merges.txt", "modeling_own.py", "qwen.tiktoken"]
    for name in [*carried, "megarl_manifest.json", "pytorch_model.bin", "README.md", ".gitattributes"]:
        (two_files / name).write_text("{}")
    (two_files / "original").mkdir()
    assert [path.name for path in carried_files(two_files)] == sorted(carried)


def test_a_config_that_cannot_be_read_is_named(two_files):
    (two_files / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        HFCheckpoint(two_files).config()


def test_what_the_library_itself_wrote_in_other_dtypes_is_read(tmp_path):
    dtypes = [torch.float64, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
    tensors = {str(dtype): torch.ones(3, dtype=dtype) for dtype in dtypes}
    save_file(tensors | {"empty": torch.zeros(0, 4)}, tmp_path / "model.safetensors")
    checkpoint = HFCheckpoint(tmp_path)
    assert all(torch.equal(checkpoint.whole(name), tensor) for name, tensor in tensors.items())
    assert checkpoint.shape("empty") == (0, 4)


def test_a_gpt_oss_checkpoint_in_mxfp4_fits_the_rules_of_its_family(tiny_hf, tmp_path):
    """The logical experts have the shapes and layout of the checkpoint in bf16."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    source = tiny_hf("gpt_oss", num_local_experts=4, num_experts_per_tok=2, head_dim=16)
    tensors = load_file(source / "model.safetensors")
    experts = {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        count, inner, outer = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (count, outer, inner // 32, 16), dtype=torch.uint8)
        scales = torch.randint(110, 130, (count, outer, inner // 32), dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        experts[name] = convert_moe_packed_tensors(blocks, scales)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    checkpoint, spec = HFCheckpoint(tmp_path), read_spec(tmp_path)
    check(spec, HFSource(checkpoint))
    assert len(experts) == 2 * spec.num_layers
    read = 0
    for tensor in spec.tensors():
        for segment in segments(tensor, 2, 1):
            if segment.hf in experts:
                assert torch.equal(checkpoint.read(segment), segment.view(experts[segment.hf]))
                read += 1
    assert read == spec.num_layers * 4 * (2 + 1)  # experts, with gate and up of fc1, and fc2
