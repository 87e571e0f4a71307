"""Model families. A family is one literal in one file under ``families/``: which HF architectures it serves, how their
config.json reads, and the list of weight rules. Adding one is adding a file and its line in `families` below.

This module needs neither torch nor megatron: configs are checked, and conversions planned, without them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarl.weights.rules import CanonTensor, Rule, Run, Shard, compile_rules


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of a model, as its config.json has it (transformers' ``rope_parameters``)."""

    theta: float
    type: str = "default"  # default | linear | llama3 | yarn
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    # YaRN only (2309.00071)
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class MoE:
    """Mixture of experts, in megatron's names (``moe_*`` and ``num_moe_experts`` of its TransformerConfig)."""

    num_experts: int
    ffn_hidden_size: int
    topk: int
    layers: tuple[bool, ...]  # for each decoder layer, whether it has experts
    router_pre_softmax: bool = False  # probabilities over all experts, and of these the chosen ones', not renormalised
    router_score_function: str = "softmax"  # softmax | sigmoid
    router_num_groups: int | None = None
    router_group_topk: int | None = None
    router_topk_scaling_factor: float | None = None
    router_expert_bias: bool = False
    router_bias: bool = False  # a bias of the router's linear layer (gpt-oss)
    shared_ffn_hidden_size: int = 0


@dataclass(frozen=True)
class MLA:
    """Multi-head latent attention (2405.04434), in megatron's names (its MLATransformerConfig)."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_head_dim: int  # of a head's query and key, the part without rotary embedding
    qk_pos_emb_head_dim: int
    v_head_dim: int


@dataclass(frozen=True)
class ModelSpec:
    """The sizes and switches of one model, in megatron's names, read from its config.json."""

    family: Family
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    layernorm_epsilon: float
    tied: bool  # the LM head is the embedding
    rope: Rope
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    sliding_window: int | None = None  # keys a query sees, itself included
    full_attention_period: int | None = None  # every so-manieth layer sees all keys in spite of the sliding window
    moe: MoE | None = None
    mla: MLA | None = None
    mtp_num_layers: int = 0  # multi-token-prediction layers that are part of this model
    mtp_in_checkpoint: int = 0  # ... that its HF checkpoint has
    attention_sinks: bool = False  # a learnt logit in every head's softmax that attends to nothing
    linear_bias: bool = False  # a bias on every linear layer: attention output, router and experts
    activation: str = "silu"  # silu | gpt_oss (clamped quick-gelu with a shifted linear part)
    scalar_head: bool = False  # one number a token in place of the vocabulary: a critic, a reward model
    not_computed: tuple[str, ...] = ()  # what of the config no megatron model here computes: converts, cannot train

    def untrainable(self) -> tuple[str, ...]:
        """`not_computed`, and what megatron-core refuses."""
        moe = self.moe
        alone = moe and moe.topk == 1 and moe.router_score_function == "softmax" and not moe.router_pre_softmax
        return (*self.not_computed, *(["one expert a token, whose weight is always 1"] if alone else []))

    def tensors(self) -> list[CanonTensor]:
        """Every weight, static, in streaming order."""
        tensors = compile_rules(self.family.weights, self)
        if self.scalar_head:
            run = Run(SCORE, 0, 1)
            tensors.append(CanonTensor(VALUE_HEAD, (1, self.hidden_size), (run,), Shard.REPLICATED))
        return tensors

    def without_mtp(self) -> ModelSpec:
        """The same model without its multi-token-prediction layers."""
        return dataclasses.replace(self, mtp_num_layers=0)

    def with_scalar_head(self) -> ModelSpec:
        """The same model with one number a token in place of the vocabulary's logits."""
        return dataclasses.replace(self, scalar_head=True, tied=False)

    def may_start_at_zero(self, hf_name: str) -> bool:
        """Whether a checkpoint need not have a tensor: a language model's has no value head, which then begins with 0
        everywhere."""
        return self.scalar_head and hf_name == SCORE

    def passes_over(self, hf_name: str) -> bool:
        """Whether a tensor of the HF checkpoint is no part of the model: a computed table, a dropped MTP layer's, the
        vocabulary's head where a scalar one takes its place."""
        if self.scalar_head and hf_name == "lm_head.weight":
            return True
        if hf_name.endswith(self.family.ignored_hf or ("\0",)):
            return True
        dropped = range(self.num_layers + self.mtp_num_layers, self.num_layers + self.mtp_in_checkpoint)
        return hf_name.startswith(tuple(f"model.layers.{i}." for i in dropped) or ("\0",))

    def duplicates(self) -> dict[str, str]:
        """HF tensors that repeat another one: {name: name of the one it equals}."""
        layers = range(self.num_layers, self.num_layers + self.mtp_num_layers)
        return {copy.format(i=i): of for copy, of in self.family.duplicates for i in layers}

    def is_moe(self, i: int) -> bool:
        """Whether decoder layer ``i`` has experts."""
        return self.moe is not None and self.moe.layers[i]

    def has(self, name: str) -> bool:
        """What the ``when`` of a rule asks for."""
        match name:
            case "head":
                return not self.tied and not self.scalar_head
            case "q_lora":
                return self.mla is not None and self.mla.q_lora_rank is not None
            case "no_q_lora":
                return self.mla is not None and self.mla.q_lora_rank is None
            case "shared_experts":
                return self.moe is not None and self.moe.shared_ffn_hidden_size > 0
            case "expert_bias":
                return self.moe is not None and self.moe.router_expert_bias
        raise ValueError(f"no model part is called {name!r}")

    def size(self, name: str) -> int:
        """A dimension that a rule names. Raises KeyError for one that this model has not."""
        return self._sizes[name]

    @functools.cached_property
    def _sizes(self) -> dict[str, int]:
        heads, hidden = self.num_attention_heads, self.hidden_size
        names = ("ffn_hidden_size", "kv_channels", "num_attention_heads", "num_query_groups", "vocab_size")
        sizes = {name: getattr(self, name) for name in names}
        sizes |= {"hidden_size": hidden, "query_size": heads * self.kv_channels, "two_hidden_size": 2 * hidden}
        if self.moe:
            sizes |= {"num_experts": self.moe.num_experts, "moe_ffn_hidden_size": self.moe.ffn_hidden_size}
            sizes["shared_ffn_hidden_size"] = self.moe.shared_ffn_hidden_size
        if self.mla:
            mla = self.mla
            sizes |= {"q_lora_rank": mla.q_lora_rank or 0, "kv_lora_rank": mla.kv_lora_rank}
            sizes["mla_query_size"] = heads * (mla.qk_head_dim + mla.qk_pos_emb_head_dim)
            sizes["mla_kv_down_size"] = mla.kv_lora_rank + mla.qk_pos_emb_head_dim
            sizes["mla_kv_up_size"] = heads * (mla.qk_head_dim + mla.v_head_dim)
            sizes["mla_value_size"] = heads * mla.v_head_dim
        return sizes


OUTPUT_LAYER = "output_layer.weight"
VALUE_HEAD = "value_head.weight"
SCORE = "score.weight"  # what transformers' models "ForSequenceClassification" call it
EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Family:
    """One literal a family: see ``families/``."""

    name: str
    hf_architectures: tuple[str, ...]
    config: Callable[[dict[str, Any]], dict[str, Any]]  # config.json -> fields of ModelSpec
    weights: tuple[Rule, ...]
    ignored_hf: tuple[str, ...] = ()  # endings of HF names that hold no weight
    duplicates: tuple[tuple[str, str], ...] = ()  # (HF name with {i} in an MTP layer, HF name that it repeats)


CLASSIFIER = "ForSequenceClassification"  # what the architecture of a reward model's config.json ends with


def as_classifier(architecture: str) -> dict[str, Any]:
    """What makes a language model's config.json one of transformers' models with a single label."""
    names = {"architectures": [architecture.removesuffix("ForCausalLM") + CLASSIFIER], "tie_word_embeddings": False}
    return names | {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}


class UnsupportedModel(ValueError):
    """The checkpoint's config.json asks for something no family here computes."""


def families() -> tuple[Family, ...]:
    from megarl.model.families import deepseek, gpt_oss, llama, mistral, mixtral, qwen2, qwen3, qwen3_moe, seed_oss

    modules = (llama, mistral, qwen2, qwen3, seed_oss, qwen3_moe, mixtral, deepseek, gpt_oss)
    return tuple(module.FAMILY for module in modules)


def supported_architectures() -> list[str]:
    """HF ``architectures`` that some family serves."""
    return [name for family in families() for name in family.hf_architectures]


def read_spec(model_path: str | Path) -> ModelSpec:
    """Read ``config.json`` of an HF directory.

    Raises FileNotFoundError without one, UnsupportedModel where no family computes what it asks for.
    """
    path = Path(model_path) / "config.json"
    hf = json.loads(path.read_text())
    wanted = hf.get("architectures") or ["(none)"]
    scores = wanted[0].endswith(CLASSIFIER)
    architecture = wanted[0].removesuffix(CLASSIFIER) + "ForCausalLM" if scores else wanted[0]
    if scores and len(hf.get("id2label") or [0]) != 1:
        raise UnsupportedModel(f"{path}: {wanted[0]} with {len(hf['id2label'])} labels; a scalar head has one")
    for family in families():
        if architecture in family.hf_architectures:
            try:
                spec = ModelSpec(family=family, **family.config(hf))
                return spec.with_scalar_head() if scores else spec
            except KeyError as missing:
                raise UnsupportedModel(f"{path}: {missing} is missing") from missing
            except UnsupportedModel as reason:
                raise UnsupportedModel(f"{path}: {reason}") from None
    known = ", ".join(supported_architectures())
    raise UnsupportedModel(f"{path}: architecture {wanted[0]} is not supported; these are: {known}")


def dense_decoder(hf: dict[str, Any]) -> dict[str, Any]:
    """Fields that all dense decoders share; families add their differences with ``|``."""
    if hf.get("hidden_act", "silu") != "silu":
        raise UnsupportedModel(f"hidden_act {hf['hidden_act']!r}: only silu (SwiGLU) is computed")
    if hf.get("mlp_bias"):
        raise UnsupportedModel("mlp_bias: biases in the MLP are not computed")
    heads = hf["num_attention_heads"]
    return {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "ffn_hidden_size": hf["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": hf.get("num_key_value_heads") or heads,
        "kv_channels": hf.get("head_dim") or hf["hidden_size"] // heads,
        "vocab_size": hf["vocab_size"],
        "max_position_embeddings": hf["max_position_embeddings"],
        "layernorm_epsilon": hf["rms_norm_eps"],
        "tied": bool(hf.get("tie_word_embeddings", False)),
        "rope": read_rope(hf),
    }


def no_attention_bias(hf: dict[str, Any]) -> dict[str, Any]:
    """For families whose config.json may ask for attention biases, which also puts one on the output projection."""
    if hf.get("attention_bias"):
        raise UnsupportedModel("attention_bias: biases on every attention projection are not computed")
    return {}


def read_rope(hf: dict[str, Any]) -> Rope:
    """Both spellings of config.json: ``rope_parameters`` (transformers 5) and ``rope_theta`` with ``rope_scaling``."""
    said = hf.get("rope_parameters") or {}
    scaling = said or hf.get("rope_scaling") or {}
    theta = float(said.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if float(scaling.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UnsupportedModel("partial_rotary_factor: rotary embedding of a part of the head is not computed")
    if kind == "default":
        return Rope(theta)
    if kind == "yarn":
        names = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate")
        said = {name: scaling[name] for name in names if scaling.get(name) is not None}
        original = scaling.get("original_max_position_embeddings") or hf["max_position_embeddings"]
        return Rope(theta, kind, float(scaling["factor"]), original_max_position_embeddings=int(original), **said)
    if kind == "linear":
        return Rope(theta, kind, float(scaling["factor"]))
    if kind == "llama3":
        low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
        return Rope(theta, kind, float(scaling["factor"]), low, high, int(scaling["original_max_position_embeddings"]))
    raise UnsupportedModel(f"rope type {kind!r}: only default, linear, llama3 and yarn are computed")
