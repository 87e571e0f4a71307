"""Hugging Face directories as they are written: laid out before a byte moves, filled by anyone, finished or absent."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megarl.weights.hf_files import INDEX, CheckpointError, HFCheckpoint, read_header
from megarl.weights.hf_writer import HFDirectory, HFTensor, as_fp8, create_files, plan_files
from megarl.weights.shard import Segment

TENSORS = [HFTensor(f"t{i}", (10, 10), torch.float32) for i in range(5)]  # 400 bytes each


@pytest.fixture
def source(tmp_path):
    """What is carried along: a config of another dtype, quantised, and a tokenizer."""
    path = tmp_path / "source"
    path.mkdir()
    config = {"model_type": "llama", "dtype": "float16", "q_lora_rank": None, "quantization_config": {"bits": 4}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text("{}")
    (path / "model.safetensors").write_text("never carried")
    return path


def fill(directory, values):
    for file in directory.files:
        opened = file.open(directory.partial)
        for tensor in file.tensors:
            opened.write_whole(tensor.name, values[tensor.name])
        opened.finish()


def test_files_are_bounded_indexed_and_hold_what_was_written(tmp_path, source):
    values = {t.name: torch.full(t.shape, float(i)) for i, t in enumerate(TENSORS)}
    directory = HFDirectory(tmp_path / "out", plan_files(TENSORS, max_file_bytes=900))
    directory.begin()
    fill(directory, values)
    assert not (tmp_path / "out").exists()  # nothing that looks finished before it is
    directory.finish(carry_from=source)
    assert not (tmp_path / "out.incomplete").exists()
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == 2000  # bytes
    names = [f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]
    assert index["weight_map"] == dict(
        zip([t.name for t in TENSORS], [names[0]] * 2 + [names[1]] * 2 + [names[2]], strict=True)
    )
    read = {name: value for file in names for name, value in load_file(tmp_path / "out" / file).items()}
    assert read.keys() == values.keys() and all(torch.equal(read[name], values[name]) for name in values)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"model_type": "llama", "dtype": "float32", "q_lora_rank": None}  # no longer quantised
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_one_file_needs_no_index_and_says_pytorch(tmp_path, source):
    directory = HFDirectory(tmp_path / "out", plan_files(TENSORS[:1]))
    directory.begin()
    fill(directory, {"t0": torch.ones(10, 10)})
    directory.finish(carry_from=source, config_changes={"vocab_size": 7, "model_type": None})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"vocab_size": 7, "dtype": "float32", "q_lora_rank": None}


def test_every_tensor_is_aligned_to_its_dtype(tmp_path):
    odd = [
        HFTensor("bytes", (3,), torch.uint8),
        HFTensor("bf16", (5,), torch.bfloat16),
        HFTensor("fp8", (7, 3), torch.float8_e4m3fn),
        HFTensor("fp32", (2,), torch.float32),
        HFTensor("int64", (1,), torch.int64),
        HFTensor("empty", (0, 4), torch.float32),
        HFTensor("naïve", (1,), torch.float32),
    ]
    (file,) = plan_files(odd)
    assert len(file.header) % 8 == 0
    assert all(file.offsets[t.name] % t.dtype.itemsize == 0 for t in odd)
    opened = file.create(tmp_path)
    for tensor in odd:
        opened.tensor(tensor.name).view(torch.uint8).fill_(1)
    opened.finish()
    read = load_file(tmp_path / file.name)
    assert {name: (tuple(t.shape), t.dtype) for name, t in read.items()} == {t.name: (t.shape, t.dtype) for t in odd}
    assert (tmp_path / file.name).stat().st_size == file.nbytes
    assert {name: t.shape for name, t in read_header(tmp_path / file.name).items()} == {t.name: t.shape for t in odd}


@pytest.mark.parametrize(
    "tensors, reason",
    [
        ([], "no tensors"),
        ([TENSORS[0], TENSORS[0]], "t0 is to be written twice"),
        ([HFTensor("x", (1,), torch.complex64)], "x: safetensors cannot hold torch.complex64"),
    ],
)
def test_what_cannot_be_planned_is_refused(tensors, reason):
    with pytest.raises(ValueError, match=reason):
        plan_files(tensors)


def test_a_tensor_larger_than_a_file_has_its_own():
    sizes = [len(file.tensors) for file in plan_files(TENSORS, max_file_bytes=100)]
    assert sizes == [1] * 5


@pytest.mark.parametrize(
    "segment",
    [
        Segment("w", slice(2, 9), slice(0, 7), slice(0, 6)),  # one run of bytes
        Segment("w", slice(1, 9, 3), slice(0, 3), slice(0, 6)),
        Segment("w", slice(2, 9), slice(0, 7), slice(1, 4)),
        Segment("w", slice(1, 5), slice(0, 4), slice(2, 8), transposed=True),
        Segment("experts", slice(1, 6, 2), slice(0, 3), slice(0, 4), 1, transposed=True),
        Segment("experts", slice(0, 4), slice(0, 4), slice(0, 6), 1),
        Segment("bias", slice(3, 7), slice(0, 4), None),
    ],
)
def test_a_block_lands_where_its_segment_says(tmp_path, segment):
    tensors = [HFTensor("w", (12, 6), torch.bfloat16), HFTensor("experts", (2, 4, 6), torch.bfloat16)]
    (file,) = plan_files([*tensors, HFTensor("bias", (9,), torch.bfloat16)])
    expected = {t.name: torch.zeros(t.shape, dtype=t.dtype) for t in file.tensors}
    place = segment.view(expected[segment.hf])
    block = torch.randn(place.shape)  # fp32: written in the tensor's dtype
    place.copy_(block)
    opened = file.create(tmp_path)
    opened.write(segment, block)
    opened.finish()
    read = load_file(tmp_path / file.name)
    assert all(torch.equal(read[name], expected[name]) for name in expected)


def test_a_block_of_another_shape_is_refused(tmp_path):
    (file,) = plan_files(TENSORS[:1])
    opened = file.create(tmp_path)
    with pytest.raises(ValueError, match=r"t0.*is \(2, 10\), the block \(3, 10\)"):
        opened.write(Segment("t0", slice(0, 2), slice(0, 2), slice(0, 10)), torch.zeros(3, 10))
    with pytest.raises(ValueError, match=r"t0 is \(10, 10\), not \(10, 9\)"):
        opened.write_whole("t0", torch.zeros(10, 9))


def _fill_rows(file, folder, first):
    opened = file.open(folder)
    for row in range(first, 64, 2):
        opened.write(Segment("w", slice(row, row + 1), slice(0, 1), slice(0, 8)), torch.full((1, 8), float(row)))
        opened.tensor("n")[row] = row  # through the map, in the same pages
    opened.finish()


def test_two_processes_fill_one_tensor(tmp_path):
    (file,) = plan_files([HFTensor("w", (64, 8), torch.float32), HFTensor("n", (64,), torch.float32)])
    file.create(tmp_path).finish()
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_fill_rows, args=(file, tmp_path, first)) for first in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    read = load_file(tmp_path / file.name)
    rows = torch.arange(64.0)
    assert torch.equal(read["w"], rows[:, None].expand(64, 8)) and torch.equal(read["n"], rows)


def test_fp8_export_is_read_back_within_its_rounding(tmp_path, source):
    shapes = {"model.embed_tokens.weight": (64, 130), "h.q_proj.weight": (300, 130), "h.gate.weight": (8, 130)}
    shapes["h.norm.weight"] = (130,)
    plain = [HFTensor(name, shape, torch.bfloat16) for name, shape in shapes.items()]
    values = {name: torch.randn(shape).to(torch.bfloat16) for name, shape in shapes.items()}
    directory = HFDirectory(tmp_path / "out", plan_files(as_fp8(plain)))
    directory.begin()
    (file,) = directory.files
    opened = file.open(directory.partial)
    for row, end in ((0, 128), (128, 300)):
        opened.write_fp8("h.q_proj.weight", row, values["h.q_proj.weight"][row:end])
    for name in ("model.embed_tokens.weight", "h.gate.weight", "h.norm.weight"):
        opened.write_whole(name, values[name])
    opened.finish()
    directory.finish(carry_from=source)
    checkpoint = HFCheckpoint(tmp_path / "out")
    assert checkpoint.config()["dtype"] == "bfloat16"
    quantization = checkpoint.config()["quantization_config"]
    assert quantization["quant_method"] == "fp8" and quantization["weight_block_size"] == [128, 128]
    assert quantization["modules_to_not_convert"] == ["h.gate"]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["h.q_proj.weight"].dtype == torch.float8_e4m3fn
    assert stored["h.q_proj.weight_scale_inv"].shape == (3, 2)
    assert checkpoint.names() == shapes.keys()
    for name in shapes.keys() - {"h.q_proj.weight"}:
        assert torch.equal(checkpoint.whole(name), values[name])
    weight = values["h.q_proj.weight"].float()
    assert ((checkpoint.whole("h.q_proj.weight").float() - weight).abs().max() / weight.abs().max()) < 1 / 16


def test_fp8_rows_that_are_not_whole_blocks_are_refused(tmp_path):
    (file,) = plan_files(as_fp8([HFTensor("x_proj.weight", (300, 8), torch.bfloat16)]))
    opened = file.create(tmp_path)
    for row, end in ((0, 100), (64, 192), (256, 299)):
        with pytest.raises(ValueError, match=f"rows {row} to {end} of x_proj.weight are not whole blocks"):
            opened.write_fp8("x_proj.weight", row, torch.zeros(end - row, 8))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor x_proj\.weight, from row 128: .*not finite"):
        opened.write_fp8("x_proj.weight", 128, torch.full((128, 8), torch.nan))


def test_an_existing_directory_stays_unless_it_is_to_be_replaced(tmp_path, source):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match="out exists"):
        HFDirectory(tmp_path / "out", plan_files(TENSORS))
    directory = HFDirectory(tmp_path / "out", plan_files(TENSORS[:1]), overwrite=True)
    directory.begin()
    fill(directory, {"t0": torch.ones(10, 10)})
    assert (tmp_path / "out" / "mine").exists()  # until the new one is whole
    directory.finish(carry_from=source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert not (tmp_path / "out" / "mine").exists()


def test_what_a_run_killed_while_replacing_left_is_removed(tmp_path, source):
    """Killed between its last rename and the removal of the old directory, which is still there, files in it."""
    for name in ("out", "out.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").touch()
    directory = HFDirectory(tmp_path / "out", plan_files(TENSORS[:1]), overwrite=True)
    directory.begin()
    fill(directory, {"t0": torch.ones(10, 10)})
    directory.finish(carry_from=source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert HFCheckpoint(tmp_path / "out").names() == {"t0"}


def test_no_file_stays_open(tmp_path, source):
    before = len(os.listdir("/proc/self/fd"))
    directory = HFDirectory(tmp_path / "out", plan_files(TENSORS, max_file_bytes=400))
    directory.begin()
    fill(directory, {t.name: torch.zeros(t.shape) for t in TENSORS})
    directory.finish(carry_from=source)
    create_files(tmp_path / "out", directory.files, resume=True)
    assert len(directory.files) == 5 and len(os.listdir("/proc/self/fd")) == before


def test_a_directory_that_lacks_a_file_is_not_finished(tmp_path, source):
    directory = HFDirectory(tmp_path / "out", plan_files(TENSORS, max_file_bytes=900))
    directory.begin()
    (directory.partial / directory.files[1].name).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: the file to be filled is not there"):
        directory.finish(carry_from=source)
    assert not (tmp_path / "out").exists()


def test_what_another_plan_left_is_not_filled(tmp_path):
    create_files(tmp_path, plan_files(TENSORS))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not the file that was planned"):
        create_files(tmp_path, plan_files(TENSORS[:2]), resume=True)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: left by a run with another plan"):
        create_files(tmp_path, plan_files(TENSORS, max_file_bytes=900), resume=True)


def test_resuming_keeps_what_is_there(tmp_path):
    files = plan_files(TENSORS[:1])
    create_files(tmp_path, files)
    opened = files[0].open(tmp_path)
    opened.write_whole("t0", torch.ones(10, 10))
    opened.finish()
    create_files(tmp_path, files, resume=True)
    assert load_file(tmp_path / "model.safetensors")["t0"].eq(1).all()


WRITE_FOREVER = """
import sys, torch
from megarl.weights.hf_writer import HFDirectory, HFTensor, plan_files
from megarl.weights.shard import Segment
directory = HFDirectory(sys.argv[1], plan_files([HFTensor("w", (1024, 256), torch.float32)]))
directory.begin()
file = directory.files[0].open(directory.partial)
print("filling", flush=True)
while True:
    file.write(Segment("w", slice(0, 512), slice(0, 512), slice(0, 256)), torch.ones(512, 256))
"""


def test_a_killed_writer_leaves_nothing_that_looks_finished(tmp_path, source):
    command = [sys.executable, "-c", WRITE_FOREVER, str(tmp_path / "out")]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None and writer.stdout.readline() == "filling\n"
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.incomplete", "source"]
    assert not (tmp_path / "out.incomplete" / "config.json").exists()
    directory = HFDirectory(tmp_path / "out", plan_files(TENSORS[:1]))  # and the next run is not disturbed
    directory.begin()
    fill(directory, {"t0": torch.ones(10, 10)})
    directory.finish(carry_from=source)
    assert HFCheckpoint(tmp_path / "out").names() == {"t0"}


def anonymous_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def test_filling_holds_no_more_than_a_block(tmp_path):
    (file,) = plan_files([HFTensor("w", (16384, 1024), torch.float32)])  # 64 MB
    opened = file.create(tmp_path)
    block = torch.ones(256, 1024)
    before = anonymous_bytes()
    most = 0
    for row in range(0, 16384, 256):
        opened.write(Segment("w", slice(row, row + 256), slice(0, 256), slice(0, 1024)), block)
        most = max(most, anonymous_bytes() - before)
    opened.finish()
    assert most < 8 << 20


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_transformers_reads_what_was_written(tiny_hf, tmp_path, family):
    from transformers import AutoModelForCausalLM

    source = HFCheckpoint(tiny_hf(family))
    tensors = [HFTensor(name, source.shape(name), source.dtype(name)) for name in sorted(source.names())]
    directory = HFDirectory(tmp_path / "out", plan_files(tensors, max_file_bytes=100_000))
    directory.begin()
    fill(directory, {tensor.name: source.whole(tensor.name) for tensor in tensors})
    directory.finish(carry_from=source.path)
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading
    original = AutoModelForCausalLM.from_pretrained(source.path).state_dict()
    assert all(torch.equal(value, original[name]) for name, value in model.state_dict().items())


def test_transformers_reads_fp8_as_we_do(tiny_hf, tmp_path):
    """Every dimension a multiple of 128: transformers reads no others."""
    pytest.importorskip("accelerate", reason="transformers reads FP8 only with accelerate")
    from transformers import AutoModelForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 64}
    source = HFCheckpoint(tiny_hf("qwen3", **sizes, num_attention_heads=4))
    names = sorted(source.names())
    directory = HFDirectory(
        tmp_path / "out", plan_files(as_fp8(HFTensor(name, source.shape(name), torch.bfloat16) for name in names))
    )
    directory.begin()
    (file,) = directory.files
    opened = file.open(directory.partial)
    quantised = {t.name for t in file.tensors if t.dtype == torch.float8_e4m3fn}
    assert len(quantised) == 7  # q, k, v, o, gate, up, down
    for name in names:
        if name in quantised:
            opened.write_fp8(name, 0, source.whole(name))
        else:
            opened.write_whole(name, source.whole(name))
    opened.finish()
    directory.finish(carry_from=source.path)
    checkpoint = HFCheckpoint(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)  # dequantised without a GPU
    state = model.state_dict()
    assert all(torch.equal(state[name], checkpoint.whole(name)) for name in names)
