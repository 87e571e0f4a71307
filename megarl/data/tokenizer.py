"""The tokenizer of a model's directory. A directory may bring Python code of its own, which runs only where the config
says so: left to itself, transformers would ask on standard input."""

from __future__ import annotations

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megarl.config import ModelConfig
from megarl.data.reading import DataError


def load_tokenizer(model: ModelConfig, path: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in ``path``, or in the policy's own directory. Raises DataError where it needs code that
    `model.trust_remote_code` does not let run."""
    path = path or model.path
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    except ValueError as reason:
        if "trust_remote_code" not in str(reason):
            raise
        raise DataError(
            f"the tokenizer of {path} is Python code that comes with the model. Read it, and set "
            "model.trust_remote_code=true if it may run"
        ) from reason
