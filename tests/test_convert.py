"""`megarl convert`: Hugging Face -> Megatron -> Hugging Face is bitwise, for every family and layout."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megarl.cli import main
from megarl.convert import progress
from megarl.convert.manifest import entry, read_manifest
from megarl.convert.progress import ProgressBar
from megarl.convert.torch_dist_reader import TorchDistReader
from megarl.weights.quantized import dequantize_fp8_block
from tests.convert_cases import CARRIED, FAMILIES, assert_same, load_hf, make_hf, save_hf


def convert(*args: object) -> int:
    return main(["convert", *map(str, args)])


def there_and_back(source: Path, folder: Path, there: tuple = (), back: tuple = ()) -> dict[str, torch.Tensor]:
    assert convert("hf2mcore", source, folder / "megatron", *there) == 0
    assert convert("mcore2hf", folder / "megatron", folder / "back", *back) == 0
    return load_hf(folder / "back")


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family: str, tmp_path: Path) -> None:
    source = make_hf(tmp_path / "source", family)
    assert_same(load_hf(source), there_and_back(source, tmp_path))
    assert convert("verify", source, tmp_path / "megatron") == 0
    assert (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").read_text() == "release"
    for name, content in CARRIED.items():
        assert json.loads((tmp_path / "back" / name).read_text()) == content
    config = [json.loads((tmp_path / side / "config.json").read_text()) for side in ("source", "back")]
    assert config[0] == config[1]


@pytest.mark.parametrize("family", ["qwen2", "mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("flavour", ["te", "local"])
def test_round_trip_with_other_names_and_keys(family: str, flavour: str, tmp_path: Path) -> None:
    source = make_hf(tmp_path / "source", family, dtype=torch.float32)
    options = ("--layers", flavour, "--per-layer-keys", "--core-version", "0.19", "--iteration", 7)
    assert_same(load_hf(source), there_and_back(source, tmp_path, options, ("--max-file-size", "20K")))
    keys = TorchDistReader(tmp_path / "megatron" / "iter_0000007").keys()
    assert "decoder.layers.2.self_attention.linear_proj.weight" in keys
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    tensors = load_hf(tmp_path / "back")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"].keys() == tensors.keys() and len(set(index["weight_map"].values())) > 2


def test_no_file_stays_open(tmp_path: Path) -> None:
    source = make_hf(tmp_path / "source", "qwen2")
    there_and_back(source, tmp_path / "first")  # what is opened once, at an import, is open now
    before = len(os.listdir("/proc/self/fd"))
    there_and_back(source, tmp_path / "second", back=("--max-file-size", "2K"))
    assert convert("verify", source, tmp_path / "second" / "megatron") == 0
    assert len(list((tmp_path / "second" / "back").glob("*.safetensors"))) > 20
    assert len(os.listdir("/proc/self/fd")) == before


def test_extra_states_need_not_be_there(tmp_path: Path) -> None:
    """A strict megatron-core asks for them, and so they are written; a checkpoint without them is as whole."""
    source = make_hf(tmp_path / "source", "mixtral")
    assert convert("hf2mcore", source, tmp_path / "megatron") == 0
    path = tmp_path / "megatron" / "release" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    entries, storage = metadata.state_dict_metadata, metadata.storage_data
    metadata.state_dict_metadata = {key: value for key, value in entries.items() if "_extra_state" not in key}
    metadata.storage_data = {index: value for index, value in storage.items() if "_extra_state" not in index.fqn}
    assert len(entries) > len(metadata.state_dict_metadata) == len(TorchDistReader(path.parent).keys())
    path.write_bytes(pickle.dumps(metadata))
    assert convert("mcore2hf", tmp_path / "megatron", tmp_path / "back") == 0
    assert_same(load_hf(source), load_hf(tmp_path / "back"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("direction", ["hf2mcore", "mcore2hf"])
def test_memory(direction: str, tmp_path: Path) -> None:
    """1.7 GB of layers as wide as Llama-3-70B's: under 1 GB of memory that is not mapped files."""
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
    source = make_hf(tmp_path / "source", "llama", files=1, num_hidden_layers=1, vocab_size=256, **sizes)
    start = source
    if direction == "mcore2hf":
        start = tmp_path / "megatron"
        assert convert("hf2mcore", source, start) == 0
    tool = Path(__file__).parents[1] / "tools" / "convert.py"
    command = [sys.executable, str(tool), direction, str(start), str(tmp_path / "target")]
    process = subprocess.Popen(command)
    peak = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = max([peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))])
        time.sleep(0.005)
    assert process.returncode == 0 and 50_000 < peak < 1_000_000  # kB
    print(f"{direction}: {peak / 1000:.0f} MB")


def test_two_workers_write_the_same(tmp_path: Path) -> None:
    source = make_hf(tmp_path / "source", "qwen3_moe")
    back = there_and_back(source, tmp_path, ("--workers", 2), ("--workers", 2))
    assert_same(load_hf(source), back)


def test_an_error_in_a_worker_is_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_hf(tmp_path / "source", "llama")
    assert convert("hf2mcore", source, tmp_path / "megatron") == 0
    flip(tmp_path / "megatron" / "release" / "__2_0.distcp", 5000)
    assert convert("mcore2hf", tmp_path / "megatron", tmp_path / "back", "--workers", 2) == 1
    assert "decoder.layers.1." in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def flip(path: Path, byte: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def test_keys_of_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stacked for dense models; numbered for those with experts, which any ``moe_layer_freq`` reads."""
    fc1 = "mlp.experts.experts.linear_fc1.weight"
    for family, options, expected in (
        ("llama", (), {"decoder.layers.mlp.linear_fc1.weight": (3, 96, 32)}),
        ("llama", ("--per-layer-keys",), {"decoder.layers.0.mlp.linear_fc1.weight": (96, 32)}),
        ("mixtral", (), {f"decoder.layers.2.{fc1}": (4, 96, 32)}),
        ("mixtral", ("--stacked-keys",), {f"decoder.layers.{fc1}": (3, 4, 96, 32)}),
        ("deepseek_v2", (), {"decoder.layers.0.mlp.linear_fc1.weight": (96, 32)}),
    ):
        folder = tmp_path / f"{family}{len(options)}"
        assert_same(load_hf(make_hf(folder / "hf", family)), there_and_back(folder / "hf", folder, options))
        reader = TorchDistReader(folder / "megatron")
        assert expected.items() <= {key: shape for key, (shape, _) in reader.keys().items()}.items()
        numbered = any(re.match(r"decoder\.layers\.\d", key) for key in expected)
        assert reader.common()["content_metadata"]["non_homogeneous_layers"] == numbered
    assert convert("hf2mcore", tmp_path / "deepseek_v20" / "hf", tmp_path / "n", "--stacked-keys") == 2
    assert "layers of several kinds cannot be stacked" in capsys.readouterr().err


def test_vocabulary_padding(tmp_path: Path) -> None:
    """37 words, padded for TP 4: to a multiple of 4 x 8 = 32, with zeros; mcore2hf takes them off again."""
    source = make_hf(tmp_path / "source", "llama")
    options = ("--target-tensor-parallel-size", 4, "--make-vocab-size-divisible-by", 8)
    back = there_and_back(source, tmp_path, options)
    assert_same(load_hf(source), back)
    embedding = TorchDistReader(tmp_path / "megatron").read("embedding.word_embeddings.weight")
    assert embedding.shape == (64, 32) and not embedding[37:].view(torch.int16).any()
    assert embedding[:37].view(torch.int16).equal(back["model.embed_tokens.weight"].view(torch.int16))


def test_tied_embeddings_are_written_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_hf(tmp_path / "source", "qwen2", tie_word_embeddings=True)
    tensors = load_hf(source)
    assert "lm_head.weight" not in tensors
    # Some exporters write the tied copy too; it is no weight of its own, unless it differs.
    save_hf(source, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert_same(tensors, there_and_back(source, tmp_path))
    save_hf(source, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] * 0})
    assert convert("hf2mcore", source, tmp_path / "other") == 1
    assert "lm_head.weight repeats model.embed_tokens.weight, but is not equal" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["there", "back"])
def test_multi_token_prediction_can_be_dropped(way: str, tmp_path: Path) -> None:
    source = make_hf(tmp_path / "source", "deepseek_v3")
    drop = ("--mtp", "drop")
    back = there_and_back(source, tmp_path, drop if way == "there" else (), drop if way == "back" else ())
    kept = {name: tensor for name, tensor in load_hf(source).items() if not name.startswith("model.layers.3.")}
    assert_same(kept, back)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    has_mtp = any(key.startswith("mtp.") for key in TorchDistReader(tmp_path / "megatron").keys())
    assert has_mtp == (way == "back")
    assert convert("verify", "--mtp", "drop", source, tmp_path / "back") == 0
    assert convert("verify", source, tmp_path / "back") == 1


def test_dtype(tmp_path: Path) -> None:
    """Rounded once, by torch's own rule; what megatron keeps in fp32 stays so."""
    source = make_hf(tmp_path / "source", "deepseek_v3", dtype=torch.float32)
    tensors = {name: torch.randn(tensor.shape) for name, tensor in load_hf(source).items()}
    for name in tensors:
        if name.endswith(("layers.3.embed_tokens.weight", "shared_head.head.weight")):
            tensors[name] = tensors["model.embed_tokens.weight" if "embed" in name else "lm_head.weight"].clone()
    save_hf(source, tensors)
    back = there_and_back(source, tmp_path, back=("--dtype", "bf16"))
    bias = "e_score_correction_bias"
    assert_same({n: t if n.endswith(bias) else t.bfloat16() for n, t in tensors.items()}, back)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"
    assert convert("verify", source, tmp_path / "back") == 1
    assert convert("verify", "--dtype", "bf16", source, tmp_path / "back") == 0


def test_config_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_hf(tmp_path / "source", "qwen3")
    assert convert("hf2mcore", source, tmp_path / "megatron") == 0
    (tmp_path / "megatron" / "hf").rename(tmp_path / "elsewhere")
    assert convert("mcore2hf", tmp_path / "megatron", tmp_path / "back") == 1
    assert "--config-from" in capsys.readouterr().err
    release = tmp_path / "megatron" / "release"
    assert convert("mcore2hf", release, tmp_path / "back", "--config-from", tmp_path / "elsewhere") == 0
    assert_same(load_hf(source), load_hf(tmp_path / "back"))


def test_fp8_in_and_out(tmp_path: Path) -> None:
    """Exported in blocks of 128 x 128, imported as fp32(q) x scale rounded to bf16: checked by a plain formula."""
    sizes = {"hidden_size": 160, "intermediate_size": 192, "head_dim": 40, "num_hidden_layers": 2}
    source = make_hf(tmp_path / "source", "qwen3", **sizes)
    tensors = {name: torch.randn(tensor.shape).bfloat16() for name, tensor in load_hf(source).items()}
    save_hf(source, tensors)
    quantised = there_and_back(source, tmp_path, back=("--quantize", "fp8"))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"
    name = "model.layers.1.mlp.down_proj.weight"
    q, scale = quantised[name], quantised[name + "_scale_inv"]
    assert q.dtype == torch.float8_e4m3fn and scale.shape == (2, 2)
    expected = (q.float() * scale.repeat_interleave(128, 0)[:160].repeat_interleave(128, 1)[:, :192]).bfloat16()
    assert (expected.float() - tensors[name].float()).abs().max() < 0.07 * tensors[name].float().abs().max()
    for kept in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert quantised[kept].equal(tensors[kept])
    # Back in: every weight is the dequantised one.
    assert convert("hf2mcore", tmp_path / "back", tmp_path / "again") == 0
    assert convert("mcore2hf", tmp_path / "again", tmp_path / "plain") == 0
    plain = load_hf(tmp_path / "plain")
    assert plain.keys() == tensors.keys() and plain[name].equal(expected)
    query = "model.layers.0.self_attn.q_proj.weight"
    rows, columns = (slice(0, n) for n in plain[query].shape)
    scales = quantised[query + "_scale_inv"]
    assert plain[query].equal(dequantize_fp8_block(quantised[query], scales, (128, 128), rows, columns))
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert convert("verify", tmp_path / "back", tmp_path / "again") == 0


def test_manifest_names_every_tensor_and_its_hash(tmp_path: Path) -> None:
    source = make_hf(tmp_path / "source", "qwen2")
    back = there_and_back(source, tmp_path)
    manifest = read_manifest(tmp_path / "back")
    assert manifest and manifest.tensors == {name: entry(tensor) for name, tensor in back.items()}
    inner = read_manifest(tmp_path / "megatron" / "release")
    assert inner and inner.tensors["embedding.word_embeddings.weight"].shape == (48, 32)  # with its padding


def test_verify_names_every_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_hf(tmp_path / "source", "llama")
    assert convert("hf2mcore", source, tmp_path / "megatron") == 0
    tensors = load_hf(source)
    tensors["model.layers.1.mlp.up_proj.weight"].view(torch.int16)[2:4, 5] ^= 1
    tensors["model.norm.weight"].view(torch.int16)[7] ^= 1
    save_hf(source, tensors)
    capsys.readouterr()
    assert convert("verify", source, tmp_path / "megatron") == 1
    lines = capsys.readouterr().out.splitlines()
    # fc1 is [gate; up]: row 2 of up is row 48 + 2.
    assert lines[0].startswith("decoder.layers.1.mlp.linear_fc1.weight: 2 of 3072 values differ, first in row 50 ")
    assert "model.layers.1.mlp.up_proj.weight" in lines[0]
    assert lines[1].startswith("decoder.final_layernorm.weight: 1 of 32 values differ, first in row 7 ")
    assert lines[2] == "2 differences"


def test_verify_finds_what_changed_since_it_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_hf(tmp_path / "source", "llama")
    assert convert("verify", source) == 2  # it has no manifest
    there_and_back(source, tmp_path)
    assert convert("verify", tmp_path / "back") == 0 and convert("verify", tmp_path / "megatron") == 0
    file = tmp_path / "back" / "model.safetensors"
    flip(file, file.stat().st_size - 1)
    capsys.readouterr()
    assert convert("verify", tmp_path / "back") == 1
    line = capsys.readouterr().out.splitlines()[0]
    assert str(file) in line and "has other bytes than megarl_manifest.json says" in line


def test_verify_counts_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashing both sides' tensors by their manifests, then comparing those of the first; whatever differs."""
    bars: list[ProgressBar] = []

    class Kept(ProgressBar):
        def __enter__(self) -> ProgressBar:
            bars.append(self)
            return super().__enter__()

    source = make_hf(tmp_path / "source", "deepseek_v3")
    there_and_back(source, tmp_path)
    monkeypatch.setattr(progress, "ProgressBar", Kept)
    back, megatron = tmp_path / "back", tmp_path / "megatron"
    sizes = {path: sum(t.nbytes for t in load_hf(path).values()) for path in (source, back)}
    vocab = 2 * 37 * 32 * 2  # the MTP layer's copies, which Megatron has not
    padding = 2 * (48 - 37) * 32 * 2
    for args, total in (
        ((source, back), sizes[back] + sizes[source] - vocab),
        ((back,), sizes[back]),
        ((megatron, back), 3 * sizes[back] - 2 * vocab + padding),
        (("--mtp", "drop", source, back), None),
    ):
        assert convert("verify", *args) == 0
        assert bars[-1].done == bars[-1].total and total in (None, bars[-1].total), args
    save_hf(source, load_hf(back) | {"model.norm.weight": torch.zeros(32)})
    assert convert("verify", source, back) == 1
    assert bars[-1].done == bars[-1].total


def test_logits_need_two_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_hf(tmp_path / "source", "llama")
    there_and_back(source, tmp_path)
    assert convert("verify", "--logits", tmp_path / "back") == 2
    assert "--logits compares two checkpoints" in capsys.readouterr().err


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_hf(tmp_path / "source", "deepseek_v3")
    assert convert("hf2mcore", source, tmp_path / "megatron") == 0
    capsys.readouterr()
    assert convert("inspect", "--json", tmp_path / "megatron") == 0
    facts = json.loads(capsys.readouterr().out)
    said = {"format": "Megatron torch_dist", "finished": True, "family": "deepseek", "layers": 3, "MTP layers": 1}
    said |= {"layer keys": "per layer", "names": "te", "iteration": "release", "padded vocabulary": 48}
    assert facts | said == facts and facts["problems"] == "none" and facts["optimizer state"] == "none"
    assert convert("inspect", "--json", source) == 0
    facts = json.loads(capsys.readouterr().out)
    count = sum(tensor.numel() for name, tensor in load_hf(source).items() if "head.head" not in name)
    copies = 37 * 32  # the MTP layer's copy of the embedding
    assert facts["parameters"] == count - copies and facts["manifest"] == "none"
    assert convert("inspect", tmp_path) == 1


def test_a_finished_target_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_hf(tmp_path / "source", "llama")
    there_and_back(source, tmp_path)
    for command, where in ((("hf2mcore", source), "megatron"), (("mcore2hf", tmp_path / "megatron"), "back")):
        assert convert(*command, tmp_path / where) == 2
        assert "--overwrite" in capsys.readouterr().err
        assert convert(*command, tmp_path / where, "--overwrite") == 0
    assert_same(load_hf(source), load_hf(tmp_path / "back"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert convert("hf2mcore", source, tmp_path / "mine", "--overwrite") == 2
    assert (tmp_path / "mine" / "thesis.tex").exists()
    assert convert("hf2mcore", source, source / "megatron") == 2  # inside the source
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "megatron", "mine", "source"]


def test_from_master(tmp_path: Path) -> None:
    """fp32 masters of the optimizer instead of bf16 weights, unless another dtype is asked for."""
    source = make_hf(tmp_path / "source", "qwen2")
    masters = make_hf(tmp_path / "masters", "qwen2", dtype=torch.float32)
    merged = with_masters(source, masters, tmp_path)
    assert convert("mcore2hf", merged, tmp_path / "back", "--from-master", "--config-from", source) == 0
    assert_same(load_hf(masters), load_hf(tmp_path / "back"))
    assert convert("mcore2hf", merged, tmp_path / "weights", "--config-from", source) == 0
    assert_same(load_hf(source), load_hf(tmp_path / "weights"))


def test_parts_of_a_training_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A PPO run's checkpoint: policy, and under ``critic.`` a model with a value head, each with its fp32 masters."""
    sources = {
        p: make_hf(tmp_path / f"hf{p}", "qwen2", dtype=d) for p, d in (("", torch.bfloat16), ("m", torch.float32))
    }
    critic = {name: -t for name, t in load_hf(sources[""]).items() if name != "lm_head.weight"}
    critic["score.weight"] = torch.randn(1, 32).bfloat16()
    both = write_parts(sources[""], load_hf(sources["m"]), critic, tmp_path)
    common = ("--config-from", sources[""])
    assert convert("mcore2hf", both, tmp_path / "policy", *common) == 0
    assert_same(load_hf(sources[""]), load_hf(tmp_path / "policy"))
    assert convert("mcore2hf", both, tmp_path / "masters", *common, "--from-master") == 0
    assert_same(load_hf(sources["m"]), load_hf(tmp_path / "masters"))
    for options, wanted in (((), critic), (("--from-master",), {n: t.float() * 2 for n, t in critic.items()})):
        target = tmp_path / f"critic{len(options)}"
        assert convert("mcore2hf", both, target, *common, "--part", "critic", *options) == 0
        assert_same(wanted, load_hf(target))
        config = json.loads((target / "config.json").read_text())
        assert config["architectures"] == ["Qwen2ForSequenceClassification"] and config["num_labels"] == 1
    assert convert("verify", tmp_path / "policy", both, *common) == 0
    assert convert("mcore2hf", both, tmp_path / "x", *common, "--part", "reward") == 1
    assert "there is no part reward; these are: critic" in capsys.readouterr().err
    assert convert("inspect", "--json", both, "--config-from", sources[""]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["other parts"] == "critic" and facts["problems"] == "none" and facts["iteration"] == 4


def write_parts(config: Path, masters: dict[str, torch.Tensor], critic: dict[str, torch.Tensor], folder: Path) -> Path:
    """Megatron tensors by hand from Hugging Face ones, in one chunk each."""
    from megarl.convert.torch_dist_names import StoredNames
    from megarl.convert.torch_dist_writer import StoredTensor, TorchDistWriter
    from megarl.model.family import read_spec
    from megarl.weights.shard import row_segments

    spec, weights = read_spec(config), load_hf(config)
    models = [("", "", spec, weights), ("", "optimizer.state.fp32_param.", spec, masters)]
    scalar = spec.with_scalar_head()
    models += [("critic.", "", scalar, critic)]
    models += [("critic.", "optimizer.state.fp32_param.", scalar, {n: t.float() * 2 for n, t in critic.items()})]
    stored: dict[str, torch.Tensor] = {}
    for part, state, of, tensors in models:
        names = StoredNames(of, stacked=False)
        for tensor in of.tensors():
            whole = torch.empty(tensor.shape, dtype=next(iter(tensors.values())).dtype)
            for piece in row_segments(tensor, 0, tensor.shape[0]):
                whole[piece.local_rows] = piece.view(tensors[piece.hf])
            stored[part + state + names.stored(tensor.name)[0]] = whole
    declared = [StoredTensor(key, tuple(tensor.shape), tensor.dtype) for key, tensor in stored.items()]
    writer = TorchDistWriter(folder / "run" / "iter_0000004", declared)
    file = writer.chunk_file(0)
    for key, tensor in stored.items():
        file.write(key, [0] * tensor.dim(), tensor.shape, tensor)
    return writer.finish([file.finish()], {})


def with_masters(weights: Path, masters: Path, folder: Path) -> Path:
    """A checkpoint that has both, as megatron-core's distributed optimizer writes them (fully_reshardable)."""
    from megarl.convert.torch_dist_writer import StoredTensor, TorchDistWriter

    readers = {}
    for prefix, source in (("", weights), ("optimizer.state.fp32_param.", masters)):
        assert convert("hf2mcore", source, folder / f"m{len(prefix)}") == 0
        readers[prefix] = TorchDistReader(folder / f"m{len(prefix)}")
    tensors = {prefix + key: (reader, key) for prefix, reader in readers.items() for key in reader.keys()}
    stored = [StoredTensor(name, *reader.keys()[key]) for name, (reader, key) in tensors.items()]
    writer = TorchDistWriter(folder / "merged" / "iter_0000001", stored)
    file = writer.chunk_file(0)
    for name, (reader, key) in tensors.items():
        shape = reader.keys()[key][0]
        leading = [()] if len(shape) < 3 else [(i,) for i in range(shape[0])]
        if key.startswith("decoder.layers.") and len(shape) == 2:
            leading = [(i,) for i in range(shape[0])]
        for index in leading:
            part = reader.read(key, index)
            file.write(name, (*index, *(0 for _ in part.shape)), (*(1 for _ in index), *part.shape), part)
    return writer.finish([file.finish()], {"iteration": 1})
