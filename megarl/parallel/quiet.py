"""Advice that megatron-core and torch give on import and at run time, and that is not for the user of megarl."""

import warnings


def quiet_megatron() -> None:
    """Silence advice that is not for the user: about Transformer Engine and Apex (`megarl doctor` gives it once), about
    CUDA's launch queues, and torch's renaming of collectives that megatron-core calls by their old names."""
    for text in (
        "Transformer Engine",
        "Apex",
        "transformer_engine",
        "full scope is deprecated",
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "MimoModelConfig is experimental",
        "The .grad attribute of a Tensor that is not a leaf",
        r"`torch\.distributed\.\w+` is deprecated",
    ):
        warnings.filterwarnings("ignore", message=f".*{text}.*")
