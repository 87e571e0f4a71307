"""Prompts from files of every kind, what is said of bad ones, and the stream that hands them out."""

import bz2
import gzip
import json
import lzma
import re
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from megarl.config import DataConfig
from megarl.data.prompts import PromptStream, load_prompts
from megarl.data.reading import MAX_LINE_BYTES, DataError, read_rows

WORDS = ["<eos>", "<unk>", "one", "two", "three"]
RECORDS = [{"prompt": "one two", "answer": "3", "level": 1}, {"prompt": "three", "answer": 4, "level": 2}]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    model = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>", unk_token="<unk>")


def data(path: Path | str, **fields: Any) -> DataConfig:
    return DataConfig(path=str(path), **({"apply_chat_template": False} | fields))


def write(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines) + b"\n")
    return path


def line(**changes: Any) -> str:
    return json.dumps(RECORDS[0] | changes)


def refusal(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> str:
    with pytest.raises(DataError) as caught:
        load_prompts(config, tokenizer)
    return str(caught.value)


def test_a_prompt_knows_its_line_its_tokens_and_its_record(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "train.jsonl", json.dumps(RECORDS[0]), "", json.dumps(RECORDS[1]))
    prompts = load_prompts(data(path), tokenizer)
    assert [p.id for p in prompts] == ["train.jsonl:1", "train.jsonl:3"]
    assert [p.tokens for p in prompts] == [[2, 3], [4]]
    assert [p.text for p in prompts] == ["one two", "three"]
    assert [p.answer for p in prompts] == ["3", "4"]
    assert [p.fields for p in prompts] == RECORDS
    assert prompts.dropped == {"bad_record": 0, "overlong": 0}
    assert len(prompts) == 2 and prompts[-1:] == [prompts[1]]


def test_every_kind_of_source_gives_the_same_prompts(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    records = [record | {"answer": str(record["answer"])} for record in RECORDS]  # Arrow wants one type in a column
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(records, indent=2), encoding="utf-8-sig")
    named = tmp_path / "named"
    named.mkdir()
    write(named / "train.jsonl", *map(json.dumps, records))
    for source in (tmp_path / "a.parquet", tmp_path / "a.json", named):
        prompts = load_prompts(data(source), tokenizer)
        assert [p.id for p in prompts] == [f"{source.name}[0]", f"{source.name}[1]"]
        assert [(p.text, p.answer, p.fields["level"]) for p in prompts] == [("one two", "3", 1), ("three", "4", 2)]


def test_validation_reads_its_own_source_whole(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    train, held_out = write(tmp_path / "train.jsonl", *[line()] * 3), write(tmp_path / "val.jsonl", *[line()] * 5)
    config = data(train, val_path=str(held_out), max_records=2)
    assert len(load_prompts(config, tokenizer)) == 2
    assert [p.id for p in load_prompts(config, tokenizer, validation=True)][-1:] == ["val.jsonl:5"]
    with pytest.raises(DataError, match=r"data.val_path is not set"):
        load_prompts(data(train), tokenizer, validation=True)


def test_gsm8k_answers_come_after_the_marker_without_separators(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    solution = {"question": "one two", "answer": "1 + 1 = <<1+1=2>>2\n#### 1,234"}
    path = write(tmp_path / "gsm.jsonl", json.dumps(solution))
    (prompt,) = load_prompts(data(path, adapter="gsm8k"), tokenizer)
    assert (prompt.text, prompt.answer, prompt.fields) == ("one two", "1234", solution)
    write(
        path, '{"question": "one", "answer": "12"}', '{"question": "one", "answer": "#### x"}', '{"answer": "#### 1"}'
    )
    message = refusal(data(path, adapter="gsm8k"), tokenizer)
    assert f"{path}:1: answer: has no '####' before its final answer" in message
    assert f"{path}:2: answer: ends in 'x' after '####', which is not a number" in message
    assert f"{path}:3: question: is missing; the record has 'answer'" in message
    assert "adapter='gsm' is not known; adapters: gsm8k" in refusal(data(path, adapter="gsm"), tokenizer)


BAD_LINES = [
    ('{"prompt": "one", ', r"invalid JSON: Expecting property name enclosed in double quotes at column 19"),
    (b'{"prompt": "\xff"}', r"invalid UTF-8: byte 0xff at byte 12"),
    (b'{"prompt": "one\0"}', r"holds a NUL byte at byte 15"),
    (line(prompt="one")[:-1] + ', "prompt": "two"}', r"duplicate key 'prompt'"),
    (line(level=0).replace("0", "NaN"), r"invalid JSON: NaN is not JSON"),
    (line(level=0).replace("0", "-Infinity"), r"invalid JSON: -Infinity is not JSON"),
    (b'{"prompt": "one \xed\xa0\x80"}', r"invalid UTF-8: byte 0xed at byte 16"),
    ("\ufeff" + line(), r"invalid JSON: Unexpected UTF-8 BOM"),
    (b"\0" * 20, r"holds a NUL byte at byte 0"),
    ('["one"]', r"expected an object, found a list"),
    ("[" * 100_000, r"invalid JSON: nested too deeply"),
    ('{"a": ' + "9" * 5000 + "}", r"invalid JSON: Exceeds the limit"),
    (
        '{"question": "one", "answer": "3"}',
        r"prompt: is missing; the record has 'question', 'answer' \(data.prompt_key",
    ),
    ('{"prompt": "one"}', r"answer: is missing; the record has 'prompt' \(data.answer_key"),
    (line(prompt=7), r"prompt: must be a string or a list of messages, found a number"),
    (line(prompt=" "), r"prompt: is empty"),
    (line(prompt="<eos> <eos>"), r"prompt: has no tokens but special ones: '<eos> <eos>'"),
    (line(prompt="one \ud800"), r"prompt: holds a lone surrogate .* at character 4"),
    (line(answer=["3"]), r"answer: must be a string or a number, found a list"),
    (line(answer=None), r"answer: must be a string or a number, found null"),
    (line(answer=True), r"answer: must be a string or a number, found a boolean"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_LINES)
def test_a_bad_line_is_named_with_its_reason_or_dropped_and_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, bad: str | bytes, reason: str
) -> None:
    path = write(tmp_path / "train.jsonl", line(), bad, line())
    message = refusal(data(path), tokenizer)
    assert re.search(rf"{re.escape(str(path))}:2: {reason}", message), message
    prompts = load_prompts(data(path, bad_records="drop"), tokenizer)
    assert [p.id for p in prompts] == ["train.jsonl:1", "train.jsonl:3"]
    assert prompts.dropped == {"bad_record": 1, "overlong": 0}


def test_a_bom_windows_line_ends_and_a_missing_last_newline_are_fine(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line().encode() + b"\r\n\r\n" + line().encode())
    assert [p.id for p in load_prompts(data(path), tokenizer)] == ["train.jsonl:1", "train.jsonl:3"]


def test_ten_bad_lines_are_listed_and_all_are_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "train.jsonl", *["{}"] * 25)
    message = refusal(data(path), tokenizer)
    assert message.startswith(f"25 unusable records in {path}:")
    assert (
        message.count("prompt: is missing") == 10
        and "... and 15 more" in message
        and "data.bad_records=drop" in message
    )


def test_overlong_prompts_are_dropped_and_counted_or_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path / "train.jsonl", line(), line(prompt="one two three"), line())
    prompts = load_prompts(data(path, max_prompt_length=2), tokenizer)
    assert len(prompts) == 2 and prompts.dropped == {"bad_record": 0, "overlong": 1}
    message = refusal(data(path, max_prompt_length=2, overlong_prompts="refuse"), tokenizer)
    assert f"{path}:2: prompt: has 3 tokens, data.max_prompt_length=2" in message


def test_nothing_to_train_on_is_an_error_that_says_why(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "train.jsonl", "")
    assert "the data set is empty" in refusal(data(path), tokenizer)
    write(path, "{}", line(), line())
    message = refusal(data(path, bad_records="drop", max_prompt_length=1), tokenizer)
    assert "no usable record is left: 1 bad records and 2 over-long prompts were dropped" in message


def test_sources_that_cannot_be_read_at_all(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    assert "no such file (looked in " in refusal(data("nowhere.jsonl"), tokenizer)
    assert "unknown kind of file" in refusal(data(write(tmp_path / "train.csv", "a,b")), tokenizer)
    assert "not a readable Parquet file" in refusal(data(write(tmp_path / "a.parquet", "PAR1")), tokenizer)
    assert "expected a list of objects, found an object" in refusal(data(write(tmp_path / "a.json", "{}")), tokenizer)
    broken = write(tmp_path / "b.json", "[", "{]")
    assert "at line 2, column 2" in refusal(data(broken), tokenizer)
    message = refusal(data(tmp_path / "absent", subset="main"), tokenizer)
    assert "no such file, and datasets.load_dataset(" in message and "'main', split='train') failed" in message


@pytest.mark.parametrize("end", [b"\n", b""], ids=["", "last"])
def test_a_line_of_50_mb_is_refused_and_never_in_memory(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, end: bytes
) -> None:
    """Of the line no more than the longest that is allowed is held at a time, 16 MiB, and a piece or two of 1 MiB."""
    path, long = tmp_path / "train.jsonl", b'{"prompt": "' + b"one " * 12_500_000 + b'", "answer": "3"}'
    rest = (end + line().encode() + end) if end else b""
    path.write_bytes(line().encode() + b"\n" + long + rest)
    said = f"{path}:2: the line has {len(long) + len(end)} bytes, more than 16777216"
    del long
    tracemalloc.start()
    try:
        assert said in refusal(data(path), tokenizer)
        prompts = load_prompts(data(path, bad_records="drop"), tokenizer)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [p.id for p in prompts] == ["train.jsonl:1", "train.jsonl:3"][: 2 if end else 1]
    assert prompts.dropped["bad_record"] == 1
    assert (16 << 20) < peak < (20 << 20)


def test_the_longest_line_that_is_taken(tmp_path: Path) -> None:
    """16 MiB to the byte, its end included; one more is too long."""
    whole = b'{"a": "' + b"x" * (MAX_LINE_BYTES - 10) + b'"}\n'
    assert len(whole) == MAX_LINE_BYTES
    (tmp_path / "a.jsonl").write_bytes(whole + b" " + whole)
    (_, taken), (where, refused) = read_rows(str(tmp_path / "a.jsonl"), None, "train")
    assert isinstance(taken, dict) and len(taken["a"]) == MAX_LINE_BYTES - 10
    assert where == ":2" and f"{MAX_LINE_BYTES + 1} bytes" in str(refused)


def test_compressed_files_are_refused_and_not_unpacked(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """100 MB of zeros in 100 kB, under its own name and under those of text: nothing is dropped, all of it refused."""
    bomb = gzip.compress(bytes(100_000_000), 1)
    for name, said in (
        ("train.jsonl.gz", "unknown kind of file; expected .jsonl, .json, .parquet"),
        ("train.jsonl", "begins as a gzip file does; give it as text in UTF-8, and not compressed"),
        ("train.json", "begins as a gzip file does"),
        ("train.parquet", "not a readable Parquet file"),
    ):
        (tmp_path / name).write_bytes(bomb)
        message = refusal(data(tmp_path / name, bad_records="drop"), tokenizer)
        assert f"{tmp_path / name}: {said}" in message


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (line().encode("utf-16"), "UTF-16"),
        (bz2.compress(b"{}"), "bzip2"),
        (lzma.compress(b"{}"), "xz"),
        (b"PK\x03\x04", "zip"),
        (b"PAR1", "Parquet"),
    ],
)
def test_files_that_are_not_text_say_what_they_are(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, content: bytes, kind: str
) -> None:
    (tmp_path / "train.jsonl").write_bytes(content)
    assert f"begins as a {kind} file does" in refusal(data(tmp_path / "train.jsonl"), tokenizer)


def test_a_list_of_objects_names_the_bad_item(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([RECORDS[0], 7]))
    assert f"{path}[1]: expected an object, found a number" in refusal(data(path), tokenizer)


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 12),
    seed=st.integers(0, 3),
    shuffle=st.booleans(),
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=8),
    cut=st.integers(0, 8),
)
def test_every_item_once_an_epoch_and_a_restored_stream_goes_on_the_same(
    length: int, seed: int, shuffle: bool, counts: list[int], cut: int
) -> None:
    stream, whole = (PromptStream(range(length), seed, shuffle) for _ in range(2))
    drawn: list[int] = []
    for number, count in enumerate(counts):
        if number == cut:
            state = json.loads(json.dumps(stream.state_dict()))
            stream = PromptStream(range(length), seed, shuffle)
            stream.load_state_dict(state)
        part = stream.next(count)
        assert len(part) == count
        drawn += part
    assert drawn == whole.next(sum(counts)) and stream.state_dict() == whole.state_dict()
    assert (stream.epoch, stream.position) == divmod(len(drawn), length)
    for epoch in range(stream.epoch):
        assert Counter(drawn[epoch * length : (epoch + 1) * length]) == Counter(range(length))


def test_the_order_is_fixed_for_all_time_and_differs_by_epoch_and_seed() -> None:
    stream = PromptStream("abcdefgh", seed=1234, shuffle=True)
    first, second = "".join(stream.next(8)), "".join(stream.next(8))
    assert (first, second) == (
        "fbgdahce",
        "dfhgcbae",
    )  # a run that is resumed on another machine must go on with the same data
    assert "".join(PromptStream("abcdefgh", seed=1235, shuffle=True).next(8)) not in (first, second)
    assert "".join(PromptStream("abcdefgh", seed=1234, shuffle=False).next(10)) == "abcdefghab"


def test_a_stream_refuses_the_state_of_another() -> None:
    state = PromptStream("abcd", seed=1, shuffle=True).state_dict()
    for other in (PromptStream("abcd", 2, True), PromptStream("abc", 1, True), PromptStream("abcd", 1, False)):
        with pytest.raises(DataError, match="resume with the same data and seed"):
            other.load_state_dict(state)
    with pytest.raises(DataError, match="at least one item"):
        PromptStream([], seed=1, shuffle=True)
