"""Mistral: Llama's weights; v0.1 attends through a sliding window."""

from megarl.model.families.llama import DENSE_WEIGHTS
from megarl.model.family import Family, dense_decoder

FAMILY = Family(
    name="mistral",
    hf_architectures=("MistralForCausalLM",),
    config=lambda hf: dense_decoder(hf) | {"sliding_window": hf.get("sliding_window")},
    weights=DENSE_WEIGHTS,
)
