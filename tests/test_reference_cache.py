"""The file of a reference's log-probabilities: what it says comes back, and what it is not of is refused."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from megarl.data.reading import DataError
from megarl.data.records import Sample
from megarl.data.reference_cache import Stamp, read, write

SAMPLES = [Sample("pairs.jsonl:1", i, [3, 4, 5 + i], 2) for i in range(2)]
SUMS = {("pairs.jsonl:1", 0): -1.1, ("pairs.jsonl:1", 1): -0.1 - 0.2}  # the second is no round number in binary


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"weight": torch.arange(200_000.0)}, folder / "model.safetensors")
    return folder


def test_what_is_written_is_read(model, tmp_path):
    path = tmp_path / "made" / "cache.jsonl"
    write(path, Stamp.of(model, "fp32", SAMPLES), SUMS)
    assert read(path, Stamp.of(model, "fp32", SAMPLES)) == SUMS
    assert [found.name for found in path.parent.iterdir()] == ["cache.jsonl"]


def test_other_tokens_another_order_another_number_format_and_another_model_are_refused(model, tmp_path):
    path, stamp = tmp_path / "cache.jsonl", Stamp.of(model, "fp32", SAMPLES)
    write(path, stamp, SUMS)
    other_token = [SAMPLES[0], dataclasses.replace(SAMPLES[1], tokens=[3, 4, 7])]
    for samples in (other_token, SAMPLES[::-1], SAMPLES[:1]):
        with pytest.raises(DataError, match=f"{path} is of another data than this run's: delete it"):
            read(path, Stamp.of(model, "fp32", samples))
    with pytest.raises(DataError, match="is of another dtype than"):
        read(path, Stamp.of(model, "bf16", SAMPLES))
    save_file({"weight": torch.arange(200_000.0) + 1}, model / "model.safetensors")  # of the same size
    with pytest.raises(DataError, match="is of another model and data than"):
        read(path, Stamp.of(model, "fp32", other_token))


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "is of another model and dtype and data"),
        ('{"id": "a", "index": 0, "logps": -1.0}\n', "is of another model and dtype and data"),
        ("{\n", ":1: invalid JSON"),
    ],
)
def test_a_file_that_is_none_of_ours_is_refused(model, tmp_path, text, problem):
    path = tmp_path / "cache.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=problem):
        read(path, Stamp.of(model, "fp32", SAMPLES))


def test_a_line_that_lacks_something_is_refused(model, tmp_path):
    path, stamp = tmp_path / "cache.jsonl", Stamp.of(model, "fp32", SAMPLES)
    write(path, stamp, SUMS)
    path.write_text(path.read_text() + '{"id": "a", "index": 0}\n')
    with pytest.raises(DataError, match="a line without id, index or logps"):
        read(path, stamp)
