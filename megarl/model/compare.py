"""Do a checkpoint's weights and config.json give, in megatron-core, the logits that transformers gives?

Weights that are bitwise right can still be used wrongly (a router's softmax before or after the choice, a rope type):
only logits see a wrong config. One process on a CPU, fp32; for small models, or the first layers of large ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megarl.config import ClusterConfig, Config, ModelConfig
from megarl.model.attention import packed_layout
from megarl.model.build import build_model
from megarl.model.family import read_spec
from megarl.parallel.mesh import build_mesh
from megarl.weights.load import load_hf


@dataclass(frozen=True)
class LogitComparison:
    """How far megatron's logits of ``num_tokens`` random tokens are from transformers'."""

    num_tokens: int
    max_difference: float
    std: float  # of transformers' logits: what a difference is to be measured by

    @property
    def equal(self) -> bool:
        """Whether only rounding differs: fp32 sums in another order, which grow with depth and width."""
        return self.max_difference <= 1e-4 * max(self.std, 1.0)


def compare_logits(
    transformers_dir: str | Path, megatron_dir: str | Path, num_tokens: int = 64, seed: int = 0
) -> LogitComparison:
    """Transformers computes from one Hugging Face directory and megatron-core from the other (or the same)."""
    spec = read_spec(megatron_dir)
    tokens = torch.randint(0, spec.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(seed))
    expected = transformers_logits(transformers_dir, tokens)
    difference = (megatron_logits(megatron_dir, tokens) - expected).abs().max().item()
    return LogitComparison(num_tokens, difference, expected.std().item())


@torch.no_grad()
def transformers_logits(path: str | Path, tokens: Tensor) -> Tensor:
    """[T, vocabulary] fp32 of ``tokens [T]``."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
    ).eval()
    logits: Tensor = model(tokens[None]).logits[0]
    return logits.float()


@torch.no_grad()
def megatron_logits(path: str | Path, tokens: Tensor) -> Tensor:
    """[T, vocabulary] fp32 of ``tokens [T]``. Starts a job of one rank and ends it."""
    cfg = Config(cluster=ClusterConfig(device="cpu"), model=ModelConfig(path=str(path), dtype="fp32"))
    spec = read_spec(path).without_mtp()
    mesh = build_mesh(cfg)
    with mesh.platform():
        model = build_model(cfg, spec, mesh, temperature=1.0).eval()
        load_hf(model, spec, mesh, path)
        layout = packed_layout([0, len(tokens)], mesh.device, transformer_engine=False)
        positions = torch.arange(len(tokens))
        logits: Tensor = model(tokens[None], positions[None], None, packed_seq_params=layout)[0, :, : spec.vocab_size]
    mesh.close()
    return logits.float()
