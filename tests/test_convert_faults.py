"""`megarl convert` with damaged inputs, and killed: an error that names file and tensor, or the right result."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megarl.cli import main
from megarl.convert.files import PROGRESS
from megarl.convert.torch_dist_reader import TorchDistReader
from tests.convert_cases import assert_same, load_hf, make_hf, save_hf

NAME = "model.layers.1.mlp.up_proj.weight"
KEY = "decoder.layers.mlp.linear_fc1.weight"


def convert(*args: object) -> int:
    return main(["convert", *map(str, args)])


def file_of(source: Path, name: str) -> Path:
    return source / json.loads((source / "model.safetensors.index.json").read_text())["weight_map"][name]


def flip(path: Path, byte: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def missing(source: Path) -> None:
    tensors = load_hf(source)
    del tensors[NAME]
    save_hf(source, tensors)


def missing_in_file(source: Path) -> None:
    """The index still names it."""
    file = file_of(source, NAME)
    inside = {n: t for n, t in load_hf(source).items() if file_of(source, n) == file and n != NAME}
    save_file(inside, file)


def extra(source: Path) -> None:
    save_hf(source, load_hf(source) | {NAME + "100": torch.zeros(2)})


def renamed(source: Path) -> None:
    save_hf(source, {name.replace("up_proj", "upp_proj"): tensor for name, tensor in load_hf(source).items()})


def misshapen(source: Path) -> None:
    tensors = load_hf(source)
    tensors[NAME] = tensors[NAME].T.contiguous()
    save_hf(source, tensors)


def mixed_dtypes(source: Path) -> None:
    save_hf(source, load_hf(source) | {NAME: torch.zeros(48, 32)})


def duplicated(source: Path) -> None:
    """In a second file too."""
    other = next(file for file in source.glob("*.safetensors") if file != file_of(source, NAME))
    inside = {n: t for n, t in load_hf(source).items() if file_of(source, n) == other}
    save_file(inside | {NAME: torch.zeros(48, 32)}, other)


def truncated(source: Path) -> None:
    file = file_of(source, NAME)
    os.truncate(file, file.stat().st_size - 10)


def truncated_in_header(source: Path) -> None:
    os.truncate(file_of(source, NAME), 100)


def file_missing(source: Path) -> None:
    file_of(source, NAME).unlink()


def file_renamed(source: Path) -> None:
    file = file_of(source, NAME)
    file.rename(file.with_name("weights.safetensors"))


def damaged_index(source: Path) -> None:
    index = source / "model.safetensors.index.json"
    index.write_text(index.read_text()[:-30])


def damaged_config(source: Path) -> None:
    config = source / "config.json"
    config.write_text(config.read_text()[:-1])


FILE, TENSOR = "model-0000", NAME
HF_FAULTS: list[tuple[Callable[[Path], None], tuple[str, ...]]] = [
    (missing, (f"{NAME} is missing",)),
    (missing_in_file, (FILE, TENSOR)),
    (extra, (FILE, NAME + "100")),
    (renamed, (FILE, "model.layers.1.mlp.upp_proj.weight", f"{NAME} is missing")),
    (misshapen, (FILE, TENSOR, "(32, 48)", "(48, 32)")),
    (mixed_dtypes, (TENSOR, "float32")),
    (duplicated, (FILE, TENSOR)),
    (truncated, (FILE, "truncated")),
    (truncated_in_header, (FILE, "truncated")),
    (file_missing, (FILE, "missing", "as the file of lm_head.weight")),
    (file_renamed, ("weights.safetensors",)),
    (damaged_index, ("model.safetensors.index.json",)),
    (damaged_config, ("config.json",)),
]


@pytest.mark.parametrize("fault, said", HF_FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_damaged_hugging_face_directory(
    fault: Callable[[Path], None], said: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_hf(tmp_path / "source", "llama")
    fault(source)
    assert convert("hf2mcore", source, tmp_path / "megatron") == 1
    message = capsys.readouterr().err
    assert all(part in message for part in said), message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]  # nothing was written


def test_all_problems_are_listed_the_first_twenty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_hf(tmp_path / "source", "llama")
    tensors = load_hf(source)
    save_hf(source, {name: tensor for name, tensor in tensors.items() if "layers" not in name})
    assert convert("hf2mcore", source, tmp_path / "megatron") == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 + 20 + 1 and lines[-1].strip() == "... and 7 more"  # 3 layers of 9 tensors


def distcp(megatron: Path, layer: int = 1) -> Path:
    """The file that holds a layer: the embedding's is the first."""
    return megatron / "release" / f"__{layer + 1}_0.distcp"


def m_truncated(megatron: Path) -> None:
    os.truncate(distcp(megatron), distcp(megatron).stat().st_size - 3000)


def m_file_missing(megatron: Path) -> None:
    distcp(megatron).unlink()


def m_files_swapped(megatron: Path) -> None:
    """Two layers' files, of the same length."""
    a, b = distcp(megatron, 0), distcp(megatron, 1)
    a.rename(a.with_name("x"))
    b.rename(a)
    a.with_name("x").rename(b)


def m_data_flipped(megatron: Path) -> None:
    flip(distcp(megatron), distcp(megatron).stat().st_size // 2)


def m_frame_flipped(megatron: Path) -> None:
    flip(distcp(megatron), 0)


def m_metadata_damaged(megatron: Path) -> None:
    os.truncate(megatron / "release" / ".metadata", 500)


def m_unfinished(megatron: Path) -> None:
    (megatron / "release" / "metadata.json").unlink()


def m_key_missing(megatron: Path) -> None:
    edit_keys(megatron, lambda name: None if name == KEY else name)


def m_key_renamed(megatron: Path) -> None:
    edit_keys(megatron, lambda name: name.replace("linear_fc1.weight", "linear_fc3.weight"))


def m_chunk_duplicated(megatron: Path) -> None:
    edit_chunks(megatron, lambda chunks: [*chunks, chunks[0]])


def m_chunk_missing(megatron: Path) -> None:
    edit_chunks(megatron, lambda chunks: chunks[1:])


def edit_keys(megatron: Path, rename: Callable[[str], str | None]) -> None:
    def edit(metadata) -> None:
        entries = metadata.state_dict_metadata
        metadata.state_dict_metadata = {new: value for name, value in entries.items() if (new := rename(name))}
        for index in list(metadata.storage_data):
            if (new := rename(index.fqn)) and new != index.fqn:
                moved = type(index)(new, index.offset, index.index)
                metadata.storage_data[moved] = metadata.storage_data.pop(index)

    edit_metadata(megatron, edit)


def edit_chunks(megatron: Path, change: Callable[[list], list]) -> None:
    def edit(metadata) -> None:
        entry = metadata.state_dict_metadata[KEY]
        entry.chunks = change(entry.chunks)

    edit_metadata(megatron, edit)


def edit_metadata(megatron: Path, edit: Callable) -> None:
    import pickle

    path = megatron / "release" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    edit(metadata)
    path.write_bytes(pickle.dumps(metadata))


LAYER_FILE = "__2_0.distcp"
MEGATRON_FAULTS: list[tuple[Callable[[Path], None], tuple[str, ...]]] = [
    (m_truncated, (LAYER_FILE, "truncated", "decoder.layers.")),
    (m_file_missing, (LAYER_FILE, "missing", "decoder.layers.")),
    (m_files_swapped, ("release", "decoder.layers.")),
    (m_data_flipped, (LAYER_FILE, "decoder.layers.", "has other bytes")),
    (m_frame_flipped, (LAYER_FILE, "decoder.layers.")),
    (m_metadata_damaged, (".metadata",)),
    (m_unfinished, ("metadata.json",)),
    (m_key_missing, (".metadata", KEY)),
    (m_key_renamed, (".metadata", KEY)),
    (m_chunk_duplicated, (".metadata", KEY)),
    (m_chunk_missing, (".metadata", KEY)),
]


@pytest.mark.parametrize("fault, said", MEGATRON_FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_damaged_megatron_checkpoint(
    fault: Callable[[Path], None], said: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_hf(tmp_path / "source", "llama")
    assert convert("hf2mcore", source, tmp_path / "megatron") == 0
    fault(tmp_path / "megatron")
    assert convert("mcore2hf", tmp_path / "megatron", tmp_path / "back") == 1
    message = capsys.readouterr().err
    assert all(part in message for part in said), message
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("form", ["huggingface", "megatron"])
def test_any_flipped_bit_is_found_or_harmless(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In every file that holds weights or says where they are, with a manifest beside them: never a wrong result."""
    generator = random.Random(0)
    source = make_hf(tmp_path / "source", "qwen2")
    assert convert("hf2mcore", source, tmp_path / "megatron") == 0
    assert convert("mcore2hf", tmp_path / "megatron", tmp_path / "back") == 0
    good, direction, folder = {
        "huggingface": (tmp_path / "back", "hf2mcore", tmp_path / "back"),
        "megatron": (tmp_path / "megatron", "mcore2hf", tmp_path / "megatron" / "release"),
    }[form]
    wanted = load_hf(source)
    files = sorted(file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".distcp", ".json", ""))
    files = [name for name in files if name not in ("config.json", "generation_config.json", "tokenizer_config.json")]
    found = 0
    for k in range(24):
        damaged = tmp_path / "damaged"
        shutil.copytree(good, damaged)
        path = damaged / folder.relative_to(good) / files[k % len(files)]
        size = path.stat().st_size
        flip(path, generator.randrange(size), generator.randrange(8))
        if convert(direction, damaged, tmp_path / "out") == 0:
            out = tmp_path / "out"
            if form == "huggingface":
                assert convert("mcore2hf", out, tmp_path / "out2") == 0
                out = tmp_path / "out2"
            assert_same(wanted, load_hf(out))
        else:
            found += 1
            assert path.name in capsys.readouterr().err or path.name in (".metadata", "megarl_manifest.json")
        for name in ("damaged", "out", "out2", "out.incomplete"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
    assert found > 12


KILLS = [pytest.param(3), pytest.param(25, marks=pytest.mark.slow)]
SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 4000}


@pytest.mark.parametrize("kills", KILLS)
@pytest.mark.parametrize("direction", ["hf2mcore", "mcore2hf"])
def test_killed_at_any_time(kills: int, direction: str, tmp_path: Path) -> None:
    """Kill -9 at random points: what is left does not look finished, and --resume completes it, bit for bit."""
    source = make_hf(tmp_path / "source", "llama", **SIZES)
    wanted = load_hf(source)
    start = source
    if direction == "mcore2hf":
        assert convert("hf2mcore", source, tmp_path / "megatron") == 0
        start = tmp_path / "megatron"
    target = tmp_path / "target"
    duration = timed_run(direction, start, target)
    shutil.rmtree(target)
    generator = random.Random(kills)
    interrupted = 0
    for k in range(kills):
        process = start_run(direction, start, target, "--workers", 2 if k % 8 == 1 else 1)
        wait_for_start(process, target)
        time.sleep(generator.uniform(0, 1.2 * duration))
        process.kill()
        process.join()
        if target.exists():
            assert convert("verify", source, target, "--config-from", source) == 0
        else:
            interrupted += 1
            assert looks_unfinished(target.with_name("target.incomplete"), direction)
            resume(direction, start, target)
        result = target
        if direction == "hf2mcore":
            assert convert("mcore2hf", target, tmp_path / "result") == 0
            result = tmp_path / "result"
        assert_same(wanted, load_hf(result))
        for name in ("target", "target.incomplete", "result"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
    assert interrupted
    print(f"{direction}: {interrupted} of {kills} runs were interrupted")


def resume(direction: str, source: Path, target: Path) -> None:
    """On a loaded machine workers of the killed run may take long to notice; until then its folder is refused."""
    deadline = time.monotonic() + 120
    while (code := convert(direction, source, target, "--resume")) == 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert code == 0


def start_run(direction: str, source: Path, target: Path, *options: object) -> multiprocessing.Process:
    """A forked process: nothing to import, so that most of its time is the conversion's."""
    process = multiprocessing.get_context("fork").Process(target=convert, args=(direction, source, target, *options))
    process.start()
    return process


def wait_for_start(process: multiprocessing.Process, target: Path) -> None:
    while process.is_alive() and not target.with_name("target.incomplete").exists():
        time.sleep(0.002)


def timed_run(direction: str, source: Path, target: Path) -> float:
    """Seconds from the first thing written to the end."""
    process = start_run(direction, source, target)
    wait_for_start(process, target)
    start = time.monotonic()
    process.join()
    assert target.exists()
    return time.monotonic() - start


def looks_unfinished(folder: Path, direction: str) -> bool:
    """No reader takes it for a checkpoint: megatron looks for metadata.json, transformers for config.json. Where all of
    it is written, and only the name is missing, it is no loss either."""
    if direction == "hf2mcore":
        return not (folder / "release" / "metadata.json").exists() or (folder / "hf" / "config.json").exists()
    return not (folder / "config.json").exists() or (folder / "megarl_manifest.json").exists()


def test_resume_does_not_redo_what_is_done_and_still_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The record of an interrupted run counts as far as the hashes agree: a unit that is damaged is done again."""
    source = make_hf(tmp_path / "source", "llama")
    assert convert("hf2mcore", source, tmp_path / "whole") == 0
    partial = tmp_path / "whole.incomplete"
    interrupted_run(source, partial, done=3)
    inner = partial / "release.incomplete"
    kept = inner / "__1_0.distcp"
    before = kept.stat().st_mtime_ns
    flip(inner / "__2_0.distcp", 3000)
    shutil.rmtree(tmp_path / "whole")
    assert convert("hf2mcore", source, tmp_path / "whole", "--dtype", "fp16", "--resume") == 2
    assert "another dtype" in capsys.readouterr().err
    assert convert("hf2mcore", source, tmp_path / "whole") == 2  # neither --resume nor --overwrite
    assert convert("hf2mcore", source, tmp_path / "whole", "--resume") == 0
    assert (tmp_path / "whole" / "release" / kept.name).stat().st_mtime_ns == before
    assert convert("mcore2hf", tmp_path / "whole", tmp_path / "back") == 0
    assert_same(load_hf(source), load_hf(tmp_path / "back"))


def interrupted_run(source: Path, partial: Path, done: int) -> None:
    """What a run leaves that was killed after so many units, the next one half written."""
    from megarl.convert.files import Staging
    from megarl.convert.hf2mcore import ToMegatron
    from megarl.convert.work import ProgressFile, units

    job = ToMegatron(source, partial.with_name("whole"))
    staging = Staging(job.target, resume=False, overwrite=True, ours=True)
    opened = job.open_source()
    progress = ProgressFile(staging.folder, opened.identity() | job.options())
    progress.start()
    (partial / "release.incomplete").mkdir()
    converter = job.open()
    for k, unit in enumerate(units(opened.spec)[: done + 1]):
        settle = converter.fill(unit, lambda nbytes: None)
        if k < done:
            progress.add(settle())
    with progress.path.open("a") as file:
        file.write('{"unit": "torn')
    converter.close()
    staging.close()


@pytest.mark.parametrize("direction", ["hf2mcore", "mcore2hf"])
def test_killed_after_the_last_rename(direction: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All is done but the cleaning: the target is finished, and what it replaced does not disturb the next run."""
    source = make_hf(tmp_path / "source", "qwen2")
    start, target = source, tmp_path / "target"
    if direction == "mcore2hf":
        start = tmp_path / "megatron"
        assert convert("hf2mcore", source, start) == 0
    assert convert(direction, start, target) == 0
    (target / PROGRESS).write_text("{}\n")
    shutil.copytree(target, tmp_path / "target.replaced")
    capsys.readouterr()
    assert convert("inspect", "--json", target) == 0
    assert json.loads(capsys.readouterr().out)["finished"] is True
    assert convert("verify", source, target) == 0
    assert convert(direction, start, target, "--overwrite") == 0
    assert not (target / PROGRESS).exists() and not (tmp_path / "target.replaced").exists()
    assert convert("verify", source, target) == 0


def test_a_second_run_of_the_same_target_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megarl.convert import files
    from megarl.convert.files import Staging

    monkeypatch.setattr(files, "_LOCK_SECONDS", 0.1)
    source = make_hf(tmp_path / "source", "llama")
    staging = Staging(tmp_path / "target", resume=False, overwrite=False, ours=False)
    assert convert("hf2mcore", source, tmp_path / "target") == 2
    assert "another run, or a worker of a killed one, is writing it" in capsys.readouterr().err
    staging.close()
    assert convert("hf2mcore", source, tmp_path / "target") == 0
    assert TorchDistReader(tmp_path / "target").iteration == "release"
