"""Tokens per second and model FLOP/s utilisation.

FLOPs are those the model needs, not those the hardware does: recomputation is not counted. A multiply-add is 2 FLOPs,
causal attention is counted as the half it is, training is 3x the forward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Dense bf16 peak, TFLOP/s, from the makers' data sheets. The first name found in the device's name counts.
PEAK_BF16_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
}


@dataclass(frozen=True)
class ModelShape:
    """The sizes that FLOPs depend on, of a dense decoder with a gated MLP."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "ModelShape":
        """From the content of a Hugging Face config.json (Llama, Mistral and Qwen name these the same)."""
        heads = config["num_attention_heads"]
        return cls(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            ffn_size=config["intermediate_size"],
            vocab_size=config["vocab_size"],
        )

    @property
    def matmul_parameters(self) -> int:
        """Parameters that a token is multiplied with: all but embedding look-ups, biases and norms."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        mlp = 3 * self.hidden_size * self.ffn_size
        return self.num_layers * (attention + mlp) + self.hidden_size * self.vocab_size


def forward_flops(shape: ModelShape, lengths: Sequence[int]) -> float:
    """FLOPs of one forward pass over sequences of these lengths."""
    dense = 2.0 * shape.matmul_parameters * sum(lengths)
    # Scores and their product with the values: 2 matmuls x 2 FLOPs, half of the s x s square.
    attention = 2.0 * shape.num_layers * shape.num_heads * shape.head_dim * sum(s * s for s in lengths)
    return dense + attention


def train_flops(shape: ModelShape, lengths: Sequence[int]) -> float:
    """FLOPs of one forward and backward pass over sequences of these lengths."""
    return 3.0 * forward_flops(shape, lengths)


def tokens_per_second_per_device(tokens: float, seconds: float, devices: int) -> float:
    return tokens / seconds / devices


def mfu(flops: float, seconds: float, device_name: str | None, devices: int = 1) -> float | None:
    """Share of the devices' bf16 peak; None where there is no peak to compare with (a CPU, an unlisted GPU)."""
    peak = next((tflops for name, tflops in PEAK_BF16_TFLOPS.items() if name in (device_name or "")), None)
    return None if peak is None else flops / (seconds * devices * peak * 1e12)
