"""Llama 2 and 3, and the lists other decoders are made from: `EMBED`, `ATTENTION`, `DENSE_MLP`, `FINAL`."""

from megarl.model.family import EMBEDDING, OUTPUT_LAYER, Family, dense_decoder, no_attention_bias
from megarl.weights.rules import QKV, Copy, GateUp, Shard

_MCORE = "decoder.layers.{i}."
_HF = "model.layers.{i}."

EMBED = Copy(EMBEDDING, "model.embed_tokens.weight", ("vocab_size", "hidden_size"), Shard.VOCAB)
FINAL = (
    Copy("decoder.final_layernorm.weight", "model.norm.weight", ("hidden_size",)),
    Copy(OUTPUT_LAYER, "lm_head.weight", ("vocab_size", "hidden_size"), Shard.VOCAB, when="head"),
)
ATTENTION = (
    Copy(_MCORE + "self_attention.linear_qkv.layer_norm_weight", _HF + "input_layernorm.weight", ("hidden_size",)),
    QKV(_MCORE + "self_attention.linear_qkv.weight", _HF + "self_attn.{qkv}_proj.weight"),
    Copy(
        _MCORE + "self_attention.linear_proj.weight",
        _HF + "self_attn.o_proj.weight",
        ("hidden_size", "query_size"),
        Shard.ROW,
    ),
)
DENSE_MLP = (
    Copy(_MCORE + "mlp.linear_fc1.layer_norm_weight", _HF + "post_attention_layernorm.weight", ("hidden_size",)),
    GateUp(_MCORE + "mlp.linear_fc1.weight", _HF + "mlp.{part}_proj.weight"),
    Copy(_MCORE + "mlp.linear_fc2.weight", _HF + "mlp.down_proj.weight", ("hidden_size", "ffn_hidden_size"), Shard.ROW),
)
DENSE_WEIGHTS = (EMBED, *ATTENTION, *DENSE_MLP, *FINAL)

FAMILY = Family(
    name="llama",
    hf_architectures=("LlamaForCausalLM",),
    config=lambda hf: dense_decoder(hf) | no_attention_bias(hf),
    weights=DENSE_WEIGHTS,
    ignored_hf=("rotary_emb.inv_freq",),  # old checkpoints store this table; it is computed
)
