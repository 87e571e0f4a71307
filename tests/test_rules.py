"""Weight rules and slices: every layout tiles every tensor exactly once, and both directions agree bit for bit."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.model.family import ModelSpec, Rope, UnsupportedModel, families, read_spec
from megarl.weights.names import canonical_suffix
from megarl.weights.rules import QKV, CanonTensor, Run, Shard
from megarl.weights.shard import local_shape, padded_vocab, row_segments, segments

# Which config.json a family's model has beyond what all have.
SOME_MOE = {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "norm_topk_prob": True}
LATENT = {
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
MODELS: dict[str, dict] = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "mistral": {"architectures": ["MistralForCausalLM"]},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16},
    "seed_oss": {"architectures": ["SeedOssForCausalLM"], "head_dim": 16},
    "qwen3_moe": {"architectures": ["Qwen3MoeForCausalLM"], **SOME_MOE, "mlp_only_layers": [1]},
    "mixtral": {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {"architectures": ["DeepseekV2ForCausalLM"], **LATENT, "q_lora_rank": None},
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        **LATENT,
        "q_lora_rank": 32,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "num_nextn_predict_layers": 1,
    },
    "gpt_oss": {"architectures": ["GptOssForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2},
}


def spec_of(name: str, **changes) -> ModelSpec:
    """A small model of a family, from its config.json."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 37, "max_position_embeddings": 64, "rms_norm_eps": 1e-6}
    hf = sizes | MODELS[name] | changes
    (family,) = (family for family in families() if hf["architectures"][0] in family.hf_architectures)
    return ModelSpec(family=family, **family.config(hf))


@st.composite
def specs(draw, name=None, most_layers=3):
    groups = draw(st.sampled_from([1, 2, 3, 4]))
    return spec_of(
        name or draw(st.sampled_from(sorted(MODELS))),
        num_hidden_layers=draw(st.integers(1, most_layers)),
        hidden_size=16 * draw(st.integers(1, 3)),
        intermediate_size=16 * draw(st.integers(1, 3)),
        num_attention_heads=groups * draw(st.sampled_from([1, 2, 4])),
        num_key_value_heads=groups,
        head_dim=16,
        vocab_size=draw(st.integers(3, 99)),
        tie_word_embeddings=draw(st.booleans()),
    )


def test_qkv_interleaves_by_group():
    """Two groups of two query heads of one row each: q0 q1 k0 v0 q2 q3 k1 v1."""
    spec = spec_of("llama", hidden_size=4)
    runs = QKV("w", "{qkv}").tensor(spec, 0, 0).runs
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


@settings(deadline=None, max_examples=100)
@given(specs(), st.sampled_from([1, 2, 4, 8, 16]))
def test_every_layout_holds_every_element_once_and_gives_it_back(spec, tp):
    generator = np.random.default_rng(0)
    tensors, hf_shapes = [], {}
    for tensor in spec.tensors():
        try:
            local_shape(tensor, tp)
        except ValueError:
            continue  # this TP does not divide this tensor; the config check refuses it
        tensors.append(tensor)
        hf_shapes |= tensor.hf_shapes()
    # Random bits, NaNs among them: compared as integers.
    hf = {name: generator.integers(0, 2**32, shape, dtype=np.uint32) for name, shape in hf_shapes.items()}
    back = {name: np.zeros_like(value) for name, value in hf.items()}
    visits = {name: np.zeros(value.shape, int) for name, value in hf.items()}
    copies = {}
    for tensor in tensors:
        copies |= dict.fromkeys(tensor.hf_shapes(), tp if tensor.shard is Shard.REPLICATED else 1)
        for rank in range(tp):
            local = np.zeros(local_shape(tensor, tp), np.uint32)
            for s in segments(tensor, tp, rank):
                local[s.local_rows] = s.view(hf[s.hf])
            for s in segments(tensor, tp, rank):
                s.view(back[s.hf])[...] = local[s.local_rows]
                s.view(visits[s.hf])[...] += 1
    for name in hf:
        np.testing.assert_array_equal(back[name], hf[name])
        assert (visits[name] == copies[name]).all(), (name, tp)


@settings(deadline=None, max_examples=50)
@given(specs(), st.integers(1, 40))
def test_chunks_of_rows_make_the_whole_tensor(spec, chunk):
    generator = np.random.default_rng(0)
    for tensor in spec.tensors():
        hf = {name: generator.random(shape) for name, shape in tensor.hf_shapes().items()}
        whole, joined = np.zeros(tensor.shape), np.zeros(tensor.shape)
        for s in segments(tensor, 1, 0):
            whole[s.local_rows] = s.view(hf[s.hf])
        for start in range(0, tensor.shape[0], chunk):
            for s in row_segments(tensor, start, min(start + chunk, tensor.shape[0]), local=start):
                joined[s.local_rows] = s.view(hf[s.hf])
        assert (joined == whole).all() and (whole != 0).all()


def test_gpt_oss_experts_are_stacked_transposed_and_interleaved():
    """Gate rows are the even columns of the expert's HF matrix, up rows the odd ones."""
    (fc1,) = (
        t for t in spec_of("gpt_oss").tensors() if t.name.endswith("layers.1.mlp.experts.experts.2.linear_fc1.weight")
    )
    hf = np.random.default_rng(0).random((4, 32, 96))
    assert fc1.hf_shapes() == {"model.layers.1.mlp.experts.gate_up_proj": hf.shape}
    local = np.zeros(fc1.shape)
    for s in segments(fc1, 1, 0):
        local[s.local_rows] = s.view(hf)
    np.testing.assert_array_equal(local, np.concatenate([hf[2].T[0::2], hf[2].T[1::2]]))


def test_multi_token_prediction_layers_follow_the_decoder_and_can_be_dropped():
    spec = spec_of("deepseek_v3")
    kept = {name: tensor for tensor in spec.tensors() for name in tensor.hf_shapes()}
    assert kept["model.layers.3.eh_proj.weight"].name == "mtp.layers.0.eh_proj.weight"
    expert = kept["model.layers.3.mlp.experts.1.up_proj.weight"].name
    assert expert == "mtp.layers.0.mtp_model_layer.mlp.experts.experts.1.linear_fc1.weight"
    assert spec.duplicates() == {
        "model.layers.3.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.3.shared_head.head.weight": "lm_head.weight",
    }
    dropped = spec.without_mtp()
    left = {name for tensor in dropped.tensors() for name in tensor.hf_shapes()}
    assert left == {name for name in kept if not name.startswith("model.layers.3.")}
    assert dropped.passes_over("model.layers.3.eh_proj.weight") and not dropped.duplicates()
    assert not spec.passes_over("model.layers.3.eh_proj.weight") and not dropped.passes_over("model.layers.2.x")


def test_layers_without_experts_have_a_plain_mlp():
    names = {tensor.name for tensor in spec_of("qwen3_moe").tensors()}  # mlp_only_layers: [1]
    assert "decoder.layers.1.mlp.linear_fc1.weight" in names and "decoder.layers.1.mlp.router.weight" not in names
    assert "decoder.layers.0.mlp.router.weight" in names and "decoder.layers.0.mlp.linear_fc1.weight" not in names


@pytest.mark.parametrize(
    "name, mla, moe, canonical",
    [
        ("input_layernorm.weight", False, False, "self_attention.linear_qkv.layer_norm_weight"),
        ("input_layernorm.weight", True, False, "input_layernorm.weight"),
        ("pre_mlp_layernorm.weight", False, False, "mlp.linear_fc1.layer_norm_weight"),
        ("pre_mlp_layernorm.weight", True, True, "pre_mlp_layernorm.weight"),
        ("self_attention.kv_layernorm.weight", True, True, "self_attention.linear_kv_up_proj.layer_norm_weight"),
        ("self_attention.q_layernorm.weight", False, True, "self_attention.q_layernorm.weight"),
        ("mlp.experts.local_experts.1.linear_fc2.weight", False, True, "mlp.experts.experts.5.linear_fc2.weight"),
        ("mlp.experts.linear_fc1.bias3", False, True, "mlp.experts.experts.7.linear_fc1.bias"),
    ],
)
def test_both_kinds_of_layers_lead_to_the_same_names(name, mla, moe, canonical):
    assert canonical_suffix(name, mla=mla, moe=moe, first_expert=4) == canonical


@pytest.mark.parametrize("family", sorted(MODELS))
def test_rules_name_exactly_what_transformers_saves(tiny_hf, family):
    from safetensors import safe_open

    path = tiny_hf(family)
    with safe_open(path / "model.safetensors", "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    ours: dict = {}
    for tensor in read_spec(path).without_mtp().tensors():  # transformers does not build MTP layers
        ours |= tensor.hf_shapes()
    assert ours == saved


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported; these are: LlamaForCausalLM"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "only silu"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1.0}}, "longrope"),
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
