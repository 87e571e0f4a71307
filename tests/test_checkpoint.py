"""Checkpoints on the disk: names, manifests, damage, retention; and what a process killed at any write leaves."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megarl.checkpoint import folder as disk
from megarl.checkpoint.guard import Guard
from megarl.checkpoint.metadata import refuse_code
from megarl.checkpoint.retention import best_first, export_name, forget, prune
from megarl.checkpoint.state import join, rectangles, split
from megarl.config import CheckpointConfig, GuardConfig
from megarl.observe.lock import FolderInUse, RunLock

ROOT = Path(__file__).parents[1]


def save(root, step, content=b"weights", metric=None):
    folder = disk.begin(root, step)
    files = {"a.distcp": disk.write_file(folder / "a.distcp", content)}
    files["b.json"] = disk.write_file(folder / "b.json", b"{}")
    length = {"max_num_steps": 9, "max_num_epochs": 1}
    return disk.publish(folder, disk.Manifest(step, 9, length, {"world": 1}, metric, ["model"], files))


def test_what_is_saved_verifies_and_is_pointed_to(tmp_path):
    save(tmp_path, 5)
    newest = save(tmp_path, 10)
    assert [path.name for path in disk.finished(tmp_path)] == ["iter_0000010", "iter_0000005"]
    assert disk.pointed(tmp_path) == 10 and disk.leftovers(tmp_path) == []
    manifest = disk.verify(newest)
    assert manifest.step == 10 and manifest.files["a.distcp"].bytes == 7
    assert save(tmp_path, 10, b"again") == newest and (newest / "a.distcp").read_bytes() == b"again"


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "bit flip":
        content[len(content) // 2] ^= 1
    elif how == "zeros":
        content[:] = bytes(len(content))
    elif how == "truncated":
        del content[-1:]
    path.write_bytes(content)
    if how == "deleted":
        path.unlink()


@pytest.mark.parametrize("how", ["bit flip", "zeros", "truncated", "deleted"])
@pytest.mark.parametrize("name", ["a.distcp", "b.json", disk.MANIFEST])
def test_damage_to_any_file_is_found_and_named(tmp_path, name, how):
    folder = save(tmp_path, 3)
    damage(folder / name, how)
    with pytest.raises(disk.Broken, match=name.replace(".", r"\.")):
        disk.verify(folder)


def test_files_that_changed_places_or_came_from_elsewhere_are_found(tmp_path):
    folder = save(tmp_path, 3, b"{ }")
    (folder / "a.distcp").rename(folder / "x")
    (folder / "b.json").rename(folder / "a.distcp")
    (folder / "x").rename(folder / "b.json")
    with pytest.raises(disk.Broken, match=r"a[.]distcp"):
        disk.verify(folder)
    folder = save(tmp_path, 4)
    (folder / "more").write_text("")
    with pytest.raises(disk.Broken, match="more: does not belong"):
        disk.verify(folder)
    (save(tmp_path, 6)).rename(tmp_path / disk.name_of(7))
    with pytest.raises(disk.Broken, match="is of step 6"):
        disk.verify(tmp_path / disk.name_of(7))


def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path):
    folder = save(tmp_path, 3)
    (tmp_path / "secret").write_bytes(b"x")
    manifest = disk.Manifest.read(folder)
    entry = disk.FileEntry(1, disk.hash_file(tmp_path / "secret"))
    for name in ("../secret", str(tmp_path / "secret")):
        with pytest.raises(disk.Broken, match="not a plain file of this folder"):
            disk.check_listing(folder, disk.dataclasses.replace(manifest, files={name: entry}))


def test_readers_share_the_hashing(tmp_path):
    folder = save(tmp_path, 3)
    damage(folder / "b.json", "bit flip")
    outcomes = []
    for reader in range(2):
        try:
            disk.verify(folder, (reader, 2))
            outcomes.append("whole")
        except disk.Broken:
            outcomes.append("broken")
    assert sorted(outcomes) == ["broken", "whole"]


@pytest.mark.parametrize(
    "rules, kept",
    [
        ({"keep_last": 2}, {50, 60}),
        ({"keep_last": 1, "keep_every": 30}, {30, 60}),
        ({"keep_last": 1, "keep_top_k": 2}, {20, 40, 60}),  # 0.9 twice: the newer, then the other
        ({"keep_last": 1, "keep_top_k": 1, "higher_is_better": False}, {10, 60}),
    ],
)
def test_retention(rules, kept):
    metrics = {10: 0.1, 20: 0.9, 30: 0.5, 40: 0.9, 50: None, 60: 0.2}
    everything = {"keep_every": 0, "keep_top_k": 0, "higher_is_better": True} | rules
    assert disk.kept(metrics, **everything) == kept


def test_what_is_not_kept_goes_and_the_best_has_a_pointer(tmp_path):
    """Of 0.1, 0.9, NaN, 0.5 and nothing, the two best stay beside the newest, with their exports."""
    root, exports = tmp_path / "checkpoints", tmp_path / "hf"
    cfg = CheckpointConfig(keep_last=1, keep_top_k=2, metric_name="val/accuracy")
    for step, metric in {10: 0.1, 20: 0.9, 30: float("nan"), 40: 0.5, 50: None}.items():
        save(root, step, metric=metric)
        (exports / export_name(step)).mkdir(parents=True)
        prune(root, exports, cfg, step)
        assert disk.pointed(root, disk.BEST) == {10: 10}.get(step, 20)
    assert [disk.step_of(path) for path in disk.finished(root)] == [50, 40, 20]
    assert sorted(path.name for path in exports.iterdir()) == ["step_000020", "step_000040", "step_000050"]
    assert [disk.step_of(path) for path in best_first(root, higher_is_better=True)] == [20, 40]
    assert [disk.step_of(path) for path in best_first(root, higher_is_better=False)] == [40, 20]


def test_exports_alone_are_kept_by_the_same_rules(tmp_path):
    cfg = CheckpointConfig(save_contents=["hf"], keep_last=2, keep_every=20)
    for step in (10, 20, 30, 40, 50):
        (tmp_path / "hf" / export_name(step)).mkdir(parents=True)
        prune(tmp_path / "checkpoints", tmp_path / "hf", cfg, step)
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == [export_name(step) for step in (20, 40, 50)]


def test_a_run_that_is_back_at_a_step_forgets_what_came_from_the_bad_one_on(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step)
        (tmp_path / "hf" / export_name(step)).mkdir(parents=True)
    forget(tmp_path, tmp_path / "hf", 10, bad=20)
    assert [disk.step_of(path) for path in disk.finished(tmp_path)] == [10] and disk.pointed(tmp_path) == 10
    assert [path.name for path in (tmp_path / "hf").iterdir()] == [export_name(10)]


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    """In a process that may write files of 2,000 bytes."""
    save(tmp_path, 10)
    code = f"""
import resource
from pathlib import Path
from megarl.checkpoint import folder as disk
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
disk.write_file(disk.begin(Path({str(tmp_path)!r}), 20) / "a.distcp", b"new" * 1000)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert "File too large" in done.stderr and "iter_0000020.incomplete/a.distcp" in done.stderr
    assert [disk.step_of(path) for path in disk.finished(tmp_path)] == [10] and disk.pointed(tmp_path) == 10
    assert disk.verify(tmp_path / disk.name_of(10)).step == 10


# ---- what is in them -------------------------------------------------------------------------------------------------


def test_flat_ranges_are_rectangles():
    """Elements 3 to 13 of a 4 x 4 matrix: the last of row 0, rows 1 and 2, the first two of row 3."""
    expected = [((0, 3), (1, 1), 3, 4), ((1, 0), (2, 4), 4, 12), ((3, 0), (1, 2), 12, 14)]
    assert rectangles((4, 4), 3, 14) == expected
    assert rectangles((4, 4), 5, 7) == [((1, 1), (1, 2), 5, 7)]
    assert rectangles((4, 4), 0, 16) == [((0, 0), (4, 4), 0, 16)]
    assert rectangles((4, 4), 6, 6) == []


def test_trees_of_values_come_back():
    tree = {"a": [1, 2.5, None, True, "x"], "tensor": "name", "b": {"c": torch.arange(3)}, "d": float("-inf")}
    said, tensors = split(tree)
    back = join(json.loads(json.dumps(said)), tensors)
    assert torch.equal(back.pop("b")["c"], torch.arange(3))
    assert back == {key: value for key, value in tree.items() if key != "b"}
    with pytest.raises(TypeError, match=r"state\.o: a state holds a object"):
        split({"o": object()})


class Canary:
    def __reduce__(self):
        return (os.mkdir, ("/tmp/megarl-canary",))


def test_metadata_that_would_run_code_is_refused(tmp_path):
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorProperties

    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_bytes(pickle.dumps(Metadata({}, TensorProperties(torch.bfloat16))))
    refuse_code(good)
    good.write_bytes(pickle.dumps(Metadata({"layer._extra_state/shard_0_1": BytesStorageMetadata()})))
    refuse_code(good)  # never asked for
    bad.write_bytes(pickle.dumps(Metadata({"layer.weight": BytesStorageMetadata()})))
    with pytest.raises(disk.Broken, match=r"bad: 'layer.weight' is to be unpickled"):
        refuse_code(bad)
    bad.write_bytes(pickle.dumps(Metadata({}, Canary())))
    with pytest.raises(disk.Broken, match=r"bad: .*posix\.mkdir"):
        refuse_code(bad)
    assert not Path("/tmp/megarl-canary").exists()


# ---- bad steps, locks ------------------------------------------------------------------------------------------------


def test_bad_steps_in_a_row():
    guard = Guard(GuardConfig(max_bad_steps=2, on_bad_steps="rollback", max_rollbacks=1))
    verdicts = [guard.look({}, refused)[0] for refused in (True, False, True, True, False, True, True)]
    assert verdicts == ["fine", "fine", "fine", "rollback", "fine", "fine", "abort"]


def test_a_jump_is_noticed_and_does_not_count_as_normal():
    """Ten steps of 1 ± 0.1, then 2: ten deviations above."""
    guard = Guard(GuardConfig(spike_metrics=["actor/loss"], spike_sigmas=8, spike_window=20, on_spike="abort"))
    for step in range(10):
        assert guard.look({"actor/loss": 1 + (0.1 if step % 2 else -0.1)}, False) == ("fine", [])
    for _ in range(2):
        verdict, said = guard.look({"actor/loss": 2.0}, False)
        assert verdict == "abort" and "actor/loss jumped to 2" in said[0]
    assert guard.look({"actor/loss": 1.1}, False)[0] == "fine"


def test_one_run_a_folder_and_dead_ones_do_not_count(tmp_path):
    lock = RunLock(tmp_path)
    with pytest.raises(FolderInUse, match=f'"process": {os.getpid()}'):
        RunLock(tmp_path)
    lock.close()
    take = "import os, sys, pathlib; from megarl.observe.lock import RunLock; RunLock(pathlib.Path(sys.argv[1]))"
    take += "; os.kill(os.getpid(), 9)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", take, str(tmp_path)], env=environment, check=False).returncode == -9
    RunLock(tmp_path).close()
