"""Checkpoints on the disk: names, manifests, damage, retention; and what a process killed at any write leaves."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megarl.checkpoint import folder as disk
from megarl.checkpoint.guard import Guard
from megarl.checkpoint.metadata import refuse_code
from megarl.checkpoint.state import join, rectangles, split
from megarl.config import GuardConfig
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


WRITER = """
import os, signal, sys
from pathlib import Path
root, at = Path(sys.argv[1]), int(sys.argv[2])
events = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
seen = 0
def hook(event, args):
    global seen
    if event in events and args and str(args[0]).startswith(str(root)):
        if seen == at:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1
from tests.test_checkpoint import save
from megarl.checkpoint import folder as disk
sys.addaudithook(hook)
save(root, 20, b"new" * 1000)
disk.discard(root / disk.name_of(10))
print(seen)
"""


def write(root, at, limit=None):
    """A process that has `at` accesses to the disk before it is killed, and may write files of `limit` bytes."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def restrict():
        if limit is not None:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)

    command = [sys.executable, "-c", WRITER, str(root), str(at)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, preexec_fn=restrict)


def newest_whole(root):
    for folder in disk.finished(root):
        try:
            return disk.verify(folder).step
        except disk.Broken:
            continue
    return None


@pytest.mark.slow
def test_killed_at_every_write_point(tmp_path):
    """Whenever it dies, the newest checkpoint that has its name verifies: nothing half-written is ever taken."""
    save(tmp_path / "whole", 10)
    points = int(write(tmp_path / "whole", -1).stdout)
    assert points > 15
    outcomes = []
    for at in range(points):
        root = tmp_path / str(at)
        save(root, 10)
        assert write(root, at).returncode == -signal.SIGKILL
        names = [disk.step_of(path) for path in disk.finished(root)]
        outcomes.append(newest_whole(root))
        assert outcomes[-1] == names[0], (at, names)
        for path in disk.leftovers(root):
            disk.remove(path)
        save(root, 30)
        assert disk.leftovers(root) == [] and newest_whole(root) == 30 == disk.pointed(root)
    assert outcomes == sorted(outcomes) and set(outcomes) == {10, 20}


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    save(tmp_path, 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", os.environ | {"PYTHONPATH": str(ROOT)})
        done = write(tmp_path, -1, limit=2000)
    assert done.returncode != 0
    assert newest_whole(tmp_path) == 10 == disk.pointed(tmp_path)


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
    from torch.distributed.checkpoint.metadata import Metadata, TensorProperties

    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_bytes(pickle.dumps(Metadata({}, TensorProperties(torch.bfloat16))))
    refuse_code(good)
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
