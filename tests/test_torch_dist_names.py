"""Where torch_dist checkpoints keep each tensor, and whether chunks cover one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.convert.torch_dist_names import StoredNames, detect, homogeneous, master_keys
from megarl.convert.torch_dist_tiling import Box, fault_in_tiling
from megarl.model.family import ModelSpec, read_spec
from megarl.weights.hf_files import CheckpointError

EXPERTS = {
    "num_experts": 3,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "head_dim": 16,
    "mlp_only_layers": [],
}
MIXED = EXPERTS | {"mlp_only_layers": [1]}
CHANGES = {"llama": {}, "qwen3_moe": EXPERTS, "mixed": MIXED}
PADDED = 160


@pytest.fixture(scope="module")
def specs(tiny_hf) -> Callable[[str], ModelSpec]:
    return lambda name: read_spec(tiny_hf("qwen3_moe" if name == "mixed" else name, **CHANGES[name]))


@pytest.mark.parametrize("model", CHANGES)
@pytest.mark.parametrize("flavour", ["te", "local"])
@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_names_are_found_again(specs, tmp_path, model, flavour, stacked, prefix):
    spec = specs(model)
    if stacked and not homogeneous(spec):
        with pytest.raises(ValueError, match="several kinds"):
            StoredNames(spec, flavour, stacked)
        return
    names = StoredNames(spec, flavour, stacked, prefix=prefix)
    shapes = names.shapes(PADDED)
    stored = {key: (shape, torch.bfloat16) for key, shape in shapes.items()}
    stored |= {f"optimizer.state.param.{key}": entry for key, entry in stored.items()}
    found = detect(spec, stored, tmp_path)
    assert [found.places(tensor) for tensor in spec.tensors()] == [names.places(tensor) for tensor in spec.tensors()]
    found.check(stored, tmp_path)
    assert master_keys(stored) == {key: f"optimizer.state.param.{key}" for key in shapes}
    places = [place for tensor in spec.tensors() for place in names.places(tensor)]
    assert len({(place.key, place.index) for place in places}) == len(places)
    assert {place.key for place in places} == set(shapes)


def test_keys_are_megatrons(specs):
    stacked = StoredNames(specs("qwen3_moe"), "te")
    norm, expert = (
        "decoder.layers.3.pre_mlp_layernorm.weight",
        "decoder.layers.2.mlp.experts.experts.1.linear_fc1.weight",
    )
    assert stacked.stored(norm) == ("decoder.layers.pre_mlp_layernorm.weight", (3,))
    assert stacked.stored(expert) == ("decoder.layers.mlp.experts.experts.linear_fc1.weight", (2, 1))
    assert stacked.shapes(PADDED)["decoder.layers.mlp.experts.experts.linear_fc1.weight"] == (4, 3, 64, 64)
    assert stacked.shapes(PADDED)["embedding.word_embeddings.weight"] == (PADDED, 64)
    layers = StoredNames(specs("mixed"), "local", stacked=False)
    assert layers.stored(norm) == ("decoder.layers.3.mlp.linear_fc1.layer_norm_weight", ())
    assert layers.stored(expert) == ("decoder.layers.2.mlp.experts.experts.linear_fc1.weight", (1,))
    objects = layers.extra_states()
    assert "decoder.layers.2.mlp.experts.experts.linear_fc1._extra_state/shard_1_3" in objects
    assert "decoder.layers.1.mlp.linear_fc2._extra_state/shard_0_1" in objects
    assert "decoder.layers.self_attention.linear_qkv._extra_state/shard_3_4" in stacked.extra_states()
    assert len(objects) == len(set(objects)) == 4 * 2 + 2 + 3 * 3 * 2  # attention; one dense MLP; three with experts


def test_latent_attention_and_prediction_layers():
    from megarl.model.family import families

    (family,) = [family for family in families() if family.name == "deepseek"]
    hf = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    hf |= {"vocab_size": 131, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "q_lora_rank": 24}
    hf |= {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4}
    hf |= {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1, "first_k_dense_replace": 1}
    hf |= {"num_nextn_predict_layers": 1, "topk_method": "noaux_tc", "architectures": ["DeepseekV3ForCausalLM"]}
    spec = ModelSpec(family=family, **family.config(hf))
    local, te = (StoredNames(spec, flavour, stacked=False) for flavour in ("local", "te"))
    norm = "decoder.layers.0.self_attention.linear_kv_up_proj.layer_norm_weight"
    assert local.stored(norm) == ("decoder.layers.0.self_attention.kv_layernorm.weight", ())
    assert te.stored(norm) == (norm, ())
    assert (
        local.stored("decoder.layers.0.mlp.linear_fc1.layer_norm_weight")[0]
        == "decoder.layers.0.pre_mlp_layernorm.weight"
    )
    assert local.stored("decoder.layers.1.pre_mlp_layernorm.weight")[0] == "decoder.layers.1.pre_mlp_layernorm.weight"
    expert = "mtp.layers.0.mtp_model_layer.mlp.experts.experts.2.linear_fc2.weight"
    assert te.stored(expert) == ("mtp.layers.0.transformer_layer.mlp.experts.experts.linear_fc2.weight", (2,))
    for names in (local, te):
        for newer in (names, StoredNames(spec, names.flavour, False, mtp_layer="mtp_model_layer.")):
            stored = {key: (shape, torch.bfloat16) for key, shape in newer.shapes().items()}
            found = detect(spec, stored, Path())
            found.check(stored, Path())
            assert found == newer
            dropped = detect(spec.without_mtp(), stored, Path())
            dropped.check(stored, Path())  # a checkpoint may have the layers that this conversion leaves out


def test_gate_and_up_apart(specs):
    spec = specs("qwen3_moe")
    names = StoredNames(spec, stacked=False, separate=True)
    stored = {key: (shape, torch.bfloat16) for key, shape in names.shapes(PADDED).items()}
    assert stored["decoder.layers.0.mlp.experts.experts.2.linear_fc1.weight_v"][0] == (32, 64)
    found = detect(spec, stored, Path())
    found.check(stored, Path())
    assert found == names
    (tensor,) = [t for t in spec.tensors() if t.name == "decoder.layers.0.mlp.experts.experts.2.linear_fc1.weight"]
    assert [(place.start, place.stop) for place in names.places(tensor)] == [(0, 32), (32, 64)]


def test_names_that_do_not_fit(specs, tmp_path):
    spec = specs("llama")
    names = StoredNames(spec)
    whole = {key: (shape, torch.bfloat16) for key, shape in names.shapes(PADDED).items()}
    some = "decoder.layers.mlp.linear_fc2.weight"
    for wrong, said in [
        ({key: entry for key, entry in whole.items() if key != some}, f"{some} is missing"),
        (whole | {some: ((4, 64, 95), torch.bfloat16)}, rf"{some} has shape \(4, 64, 95\)"),
        (
            whole | {"decoder.layers.mlp.linear_fc3.weight": whole[some]},
            "linear_fc3.weight is no part of a llama model",
        ),
        (whole | {"output_layer.weight": ((130, 64), torch.bfloat16)}, "output_layer.weight has shape"),
    ]:
        with pytest.raises(CheckpointError, match=said):
            detect(spec, wrong, tmp_path).check(wrong, tmp_path)
    with pytest.raises(CheckpointError, match=r"word_embeddings\.weight missing"):
        detect(spec, ["x"], tmp_path)
    mixed = specs("mixed")
    with pytest.raises(CheckpointError, match="layers are stacked"):
        detect(mixed, whole, tmp_path)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_tiling(data):
    """Cut a box at random places again and again: whole; without one part, with one twice, or with one moved: not."""
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    boxes = [Box((0,) * len(shape), shape)]
    for _ in range(data.draw(st.integers(0, 12))):
        k = data.draw(st.integers(0, len(boxes) - 1))
        axis = data.draw(st.integers(0, len(shape) - 1))
        if boxes[k].sizes[axis] > 1:
            at = data.draw(st.integers(1, boxes[k].sizes[axis] - 1))
            box = boxes.pop(k)
            rest = box.sizes[axis] - at
            low = tuple(at if i == axis else n for i, n in enumerate(box.sizes))
            high = tuple(rest if i == axis else n for i, n in enumerate(box.sizes))
            moved = tuple(o + at if i == axis else o for i, o in enumerate(box.offsets))
            boxes += [Box(box.offsets, low), Box(moved, high)]
    boxes = data.draw(st.permutations(boxes))
    assert fault_in_tiling(shape, boxes) is None
    assert "no chunk covers" in fault_in_tiling(shape, boxes[1:])
    assert "twice" in fault_in_tiling(shape, [*boxes, boxes[0]])
    moved = Box(tuple(o + 1 for o in boxes[0].offsets), boxes[0].sizes)
    assert fault_in_tiling(shape, [moved, *boxes[1:]]) is not None
