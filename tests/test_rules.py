"""Weight rules and slices: every layout tiles every tensor exactly once, and both directions agree bit for bit."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.model.family import ModelSpec, Rope, UnsupportedModel, families, read_spec
from megarl.weights.rules import QKV, CanonTensor, Run, Shard
from megarl.weights.shard import local_shape, padded_vocab, segments

FAMILIES = {family.name: family for family in families()}


@st.composite
def specs(draw):
    groups = draw(st.sampled_from([1, 2, 3, 4]))
    heads = groups * draw(st.sampled_from([1, 2, 4]))
    return ModelSpec(
        family=FAMILIES[draw(st.sampled_from(sorted(FAMILIES)))],
        num_layers=draw(st.integers(1, 3)),
        hidden_size=16 * draw(st.integers(1, 3)),
        ffn_hidden_size=16 * draw(st.integers(1, 3)),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=16,
        vocab_size=draw(st.integers(3, 99)),
        max_position_embeddings=64,
        layernorm_epsilon=1e-6,
        tied=draw(st.booleans()),
        rope=Rope(1e4),
    )


def test_qkv_interleaves_by_group():
    """Two groups of two query heads of one row each: q0 q1 k0 v0 q2 q3 k1 v1."""
    spec = ModelSpec(FAMILIES["llama"], 1, 4, 4, 4, 2, 1, 4, 8, 1e-6, False, Rope(1e4))
    runs = QKV("w", "{qkv}").tensor(spec, 0).runs
    assert runs == (Run("q", 0, 2), Run("k", 0, 1), Run("v", 0, 1), Run("q", 2, 2), Run("k", 1, 1), Run("v", 1, 1))


def test_a_gated_rank_holds_a_piece_of_gate_and_a_piece_of_up():
    tensor = CanonTensor("fc1", (8, 2), (Run("gate", 0, 4), Run("up", 0, 4)), Shard.COLUMN, stride=2)
    got = [(s.hf, s.hf_rows.start, s.hf_rows.stop, s.local_rows.start) for s in segments(tensor, 2, 1)]
    assert got == [("gate", 2, 4, 0), ("up", 2, 4, 2)]


def test_vocabulary_padding():
    assert padded_vocab(131, 1) == 144 and padded_vocab(131, 4) == 192 and padded_vocab(128, 2) == 128
    tensor = CanonTensor("e", (20, 2), (Run("e", 0, 20),), Shard.VOCAB)
    assert local_shape(tensor, 2) == (16, 2)
    assert [s.local_rows for s in segments(tensor, 2, 1)] == [slice(0, 4)]  # rows 16 to 19; the rest is padding


@settings(deadline=None, max_examples=150)
@given(specs(), st.sampled_from([1, 2, 4, 8, 16]))
def test_every_layout_holds_every_element_once_and_gives_it_back(spec, tp):
    generator = np.random.default_rng(0)
    for tensor in spec.tensors():
        try:
            shape = local_shape(tensor, tp)
        except ValueError:
            continue  # this TP does not divide this tensor; the config check refuses it
        # Random bits, NaNs among them: compared as integers.
        hf = {name: generator.integers(0, 2**32, size, dtype=np.uint32) for name, size in tensor.hf_shapes().items()}
        back = {name: np.zeros_like(value) for name, value in hf.items()}
        visits = {name: np.zeros(value.shape, int) for name, value in hf.items()}
        for rank in range(tp):
            local = np.zeros(shape, np.uint32)
            for s in segments(tensor, tp, rank):
                where = s.hf_rows if s.columns is None else (s.hf_rows, s.columns)
                local[s.local_rows] = hf[s.hf][where]
            for s in segments(tensor, tp, rank):
                where = s.hf_rows if s.columns is None else (s.hf_rows, s.columns)
                back[s.hf][where] = local[s.local_rows]
                visits[s.hf][where] += 1
        copies = tp if tensor.shard is Shard.REPLICATED else 1
        for name in hf:
            np.testing.assert_array_equal(back[name], hf[name])
            assert (visits[name] == copies).all(), (tensor.name, name, tp)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_rules_name_exactly_what_transformers_saves(tiny_hf, family):
    from safetensors import safe_open

    path = tiny_hf(family)
    with safe_open(path / "model.safetensors", "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    ours: dict = {}
    for tensor in read_spec(path).tensors():
        ours |= tensor.hf_shapes()
    assert ours == saved


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported; these are: LlamaForCausalLM"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "only silu"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "yarn"),
    ],
)
def test_what_is_not_computed_is_refused(tiny_hf, tmp_path, changes, reason):
    config = json.loads((tiny_hf("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UnsupportedModel, match=reason):
        read_spec(tmp_path)


def test_old_and_new_spellings_of_rope(tiny_hf, tmp_path):
    config = json.loads((tiny_hf("llama") / "config.json").read_text())
    del config["rope_parameters"]
    scaling = {
        "type": "llama3",
        "factor": 8,
        "low_freq_factor": 1,
        "high_freq_factor": 4,
        "original_max_position_embeddings": 32,
    }
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": 5e5, "rope_scaling": scaling}))
    assert read_spec(tmp_path).rope == Rope(5e5, "llama3", 8.0, 1.0, 4.0, 32)


def test_rotary_frequencies_equal_transformers():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from megarl.model.rope import inverse_frequencies

    said = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(
        rope_parameters=said | {"original_max_position_embeddings": 64}, hidden_size=64, num_attention_heads=1
    )
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    torch.testing.assert_close(
        inverse_frequencies(Rope(5e5, "llama3", 8.0, 1.0, 4.0, 64), 64), expected, rtol=1e-6, atol=0
    )
