"""Real preference data through the pair and the unpaired loader: every record of the files, where they are.

MEGARL_PREFS names the folder; without it, shared/data/prefs beside the repository.
"""

import os
from pathlib import Path

import pytest

from megarl.config import DataConfig
from megarl.data.preferences import load_pairs
from megarl.data.unpaired import load_unpaired
from tests.byte_tokenizer import byte_tokenizer

FOLDER = Path(os.environ.get("MEGARL_PREFS", Path(__file__).parents[2] / "shared" / "data" / "prefs"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no preference data in {FOLDER}; MEGARL_PREFS=FOLDER names it"),
]


def data(name):
    return DataConfig(path=str(FOLDER / name), max_prompt_length=100_000)


def test_every_real_pair_is_read():
    """299 conversations in ShareGPT's turns, each with two different answers."""
    pairs = load_pairs(data("dpo_en_demo.json"), byte_tokenizer(), max_tokens=100_000)
    assert len(pairs) == 299 and pairs.dropped == {"bad_record": 0, "overlong": 0}
    assert all(pair.chosen[: pair.prompt_length] == pair.rejected[: pair.prompt_length] for pair in pairs)


def test_every_real_label_is_read():
    """300 conversations in chat messages, half of them desirable."""
    examples = load_unpaired(data("kto_en_demo.json"), byte_tokenizer(), max_tokens=100_000)
    assert len(examples) == 300 and examples.dropped == {"bad_record": 0, "overlong": 0}
    assert sum(example.desirable for example in examples) == 150
