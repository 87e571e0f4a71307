"""Tokens per second and model FLOP/s utilisation, of the FLOPs that `megarl.model.flops` counts."""

# Dense bf16 peak, TFLOP/s, from the makers' data sheets. The first name found in the device's name counts.
PEAK_BF16_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
}


def tokens_per_second_per_device(tokens: float, seconds: float, devices: int) -> float:
    return tokens / seconds / devices


def mfu(flops: float, seconds: float, device_name: str | None, devices: int = 1) -> float | None:
    """Share of the devices' bf16 peak; None where there is no peak to compare with (a CPU, an unlisted GPU)."""
    peak = next((tflops for name, tflops in PEAK_BF16_TFLOPS.items() if name in (device_name or "")), None)
    return None if peak is None else flops / (seconds * devices * peak * 1e12)
