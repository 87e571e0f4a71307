"""The gates of model, engine and rollouts again, with the newest megarl-supported megatron-core.

Its wheel is built for Python 3.12 and later but holds no code that 3.11 cannot run, so it is unpacked and put first on
PYTHONPATH. Marked compat: it downloads a wheel and takes minutes.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

MEGATRON_CORE = "0.19.2"
GATES = [
    "test_model_ranks.py",
    "test_moe_ranks.py",
    "test_context_ranks.py",
    "test_interleaved_ranks.py",
    "test_value_ranks.py",
    "test_routing_ranks.py",
    "test_training_ranks.py",
    "test_resume.py",
    "test_core_keys.py",
]
SLOW_GATES = ["test_mcore_reads.py"]
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("megatron-core")
    target = ["--no-deps", "--only-binary=:all:", "--python-version=3.12", "--platform=manylinux_2_28_x86_64"]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", *target, f"--dest={folder}"]
    subprocess.run([*pip, f"megatron-core=={MEGATRON_CORE}"], check=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "unpacked")
    return folder / "unpacked"


@pytest.mark.compat
@pytest.mark.timeout(1800)
def test_gates_pass_with_the_newest_megatron_core(unpacked):
    environment = os.environ | {"PYTHONPATH": f"{unpacked}{os.pathsep}{HERE.parent}"}
    found = subprocess.run(
        [sys.executable, "-c", "import megatron.core; print(megatron.core.__version__)"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split()[-1] == MEGATRON_CORE
    for selection, names in (("not slow and not gpu", GATES), ("not gpu", SLOW_GATES)):
        files = [str(HERE / "distributed" / name) for name in names]
        command = [sys.executable, "-m", "pytest", "-q", "-m", selection, *files]
        gates = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert gates.returncode == 0, gates.stdout[-5000:]
