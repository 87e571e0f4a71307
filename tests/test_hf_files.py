"""Hugging Face directories: what is read, what is refused, what an interrupted write leaves."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megarl.model.family import read_spec
from megarl.weights.convert import check_names
from megarl.weights.hf_files import CheckpointError, HFCheckpoint, HFWriter


def damaged(tiny_hf, tmp_path, change):
    """A copy of a tiny Llama with its tensors changed."""
    source = tiny_hf("llama")
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    return tmp_path


NORM = "model.layers.1.input_layernorm.weight"


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
        check_names(read_spec(path), HFCheckpoint(path))


def test_what_holds_no_weight_is_passed_over(tiny_hf, tmp_path):
    path = damaged(
        tiny_hf, tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    )
    check_names(read_spec(path), HFCheckpoint(path))


def test_an_index_cannot_point_outside(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="lies outside the checkpoint"):
        HFCheckpoint(tmp_path)


def test_a_truncated_file_is_named(tiny_hf, tmp_path):
    whole = (tiny_hf("llama") / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Exception, match=r"model\.safetensors|incomplete|Header"):
        HFCheckpoint(tmp_path).read(NORM, slice(0, 1))


def test_pickles_are_not_read(tmp_path):
    torch.save({"x": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only safetensors"):
        HFCheckpoint(tmp_path)


def test_writer_splits_files_and_indexes_them(tiny_hf, tmp_path):
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(5)}  # 400 bytes each
    writer = HFWriter(tmp_path / "out", max_file_bytes=900)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    assert not (tmp_path / "out").exists()  # nothing that looks finished before it is
    writer.finish(carry_from=tiny_hf("llama"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2000
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]
    checkpoint = HFCheckpoint(tmp_path / "out")
    assert all(torch.equal(checkpoint.read(name, slice(0, 100)), tensor) for name, tensor in tensors.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert not (tmp_path / "out.incomplete").exists()
