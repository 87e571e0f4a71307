"""The sandbox and the reward that grades programs in it, against programs that try to get out, or to the grade."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megarl.rewards.code import code_reward, program_in
from megarl.sandbox import Limits, SandboxError, run

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's"),
]


@pytest.fixture(scope="module", autouse=True)
def _sandbox() -> None:
    try:
        run("")
    except SandboxError as error:
        pytest.skip(str(error))


def test_a_program_gets_its_input_and_an_empty_place() -> None:
    program = "import os; print(input()[::-1], os.getcwd(), sorted(os.listdir()), sorted(os.environ))"
    outcome = run(program, "abc\n")
    assert outcome.stdout == "cba /box ['main.py'] ['LC_CTYPE', 'PYTHONHASHSEED']\n", outcome
    assert (outcome.stderr, outcome.exit_code, outcome.ended) == ("", 0, "by itself")
    assert run("import sys; sys.exit(3)").exit_code == 3
    assert run("import os; os.abort()").exit_code == -6
    assert run("1 / 0").stderr.endswith("ZeroDivisionError: division by zero\n")
    odd = "\ud800\0é"
    assert run("import sys; print(len(sys.stdin.buffer.read()))", odd[2:]).stdout == "2\n"


def test_a_fork_bomb_is_bounded_and_gone_afterwards() -> None:
    program = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    before = set(psutil.pids())
    started = time.monotonic()
    most = []
    with subprocess.Popen(
        [sys.executable, "-c", f"from megarl.sandbox import *\nrun({program!r}, '', Limits(wall_s=1))"]
    ) as job:
        while job.poll() is None:
            new = [psutil.Process(pid) for pid in set(psutil.pids()) - before if psutil.pid_exists(pid)]
            most.append(sum(below(process, job.pid) for process in new))
            time.sleep(0.05)
    assert job.returncode == 0 and time.monotonic() - started < 20
    assert 10 <= max(most) <= 16 + 4  # its own, and two of the sandbox', this job and its thread of control
    assert not [pid for pid in set(psutil.pids()) - before if running_program(pid)]


def below(process: psutil.Process, pid: int) -> bool:
    try:
        return any(parent.pid == pid for parent in process.parents())
    except psutil.NoSuchProcess:
        return False


def running_program(pid: int) -> bool:
    try:
        return "main.py" in psutil.Process(pid).cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def test_memory_and_time_and_output_and_disk_end() -> None:
    assert "MemoryError" in run("x = bytearray(10 << 30)").stderr
    started = time.monotonic()
    endless = run("while True: pass", limits=Limits(wall_s=0.5))
    assert (endless.exit_code, endless.ended) == (None, "wall clock") and time.monotonic() - started < 10
    assert run("while True: pass", limits=Limits(wall_s=30, cpu_s=1)).exit_code == -9
    gigabyte = run("for _ in range(1000): print('x' * 10**6)", limits=Limits(output_bytes=1000))
    assert (gigabyte.exit_code, gigabyte.ended, gigabyte.stdout) == (None, "output", "x" * 1000)
    files = "for i in range(9):\n    open(str(i), 'wb').write(b'0' * (1 << 20))"
    full = run(files, limits=Limits(disk_mb=4))
    assert "No space left on device" in full.stderr


@pytest.mark.parametrize(
    "program",
    [
        "open('{outside}', 'w')",
        "open('/usr/new', 'w')",
        "open('/new', 'w')",
        "open('{secret}').read()",
        "open('/proc/1/environ').read()",
        "open('/proc/{pid}/environ').read()",
        "import os; os.kill({pid}, 9)",
        "import os; os.kill(os.getppid(), 9)",
        "import ctypes\nif ctypes.CDLL(None).unshare(1 << 28): raise PermissionError('a user namespace of its own')",
        "import socket; socket.create_connection(('127.0.0.1', {port}), 2)",
        "import socket; socket.socket(socket.AF_UNIX).connect('\\0{name}')",
    ],
)
def test_what_is_outside_cannot_be_reached(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "s3cret")
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    with socket.create_server(("127.0.0.1", 0)) as canary, socket.socket(socket.AF_UNIX) as local:
        name = f"megarl-{os.getpid()}"
        local.bind(f"\0{name}")
        local.listen()
        names = {"outside": tmp_path / "new", "secret": secret, "pid": os.getpid(), "port": canary.getsockname()[1]}
        outcome = run(program.format(**names, name=name) + "\nprint('reached')")
        assert outcome.exit_code == 1 and outcome.stdout == "", outcome
        canary.settimeout(0.05)
        with pytest.raises(TimeoutError):
            canary.accept()
    assert "s3cret" not in outcome.stderr and not (tmp_path / "new").exists()


def test_the_program_ends_with_its_parent() -> None:
    program = "import time\ntime.sleep(300)"
    code = f"from megarl.sandbox import *\nrun({program!r}, '', Limits(wall_s=300))"
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        while not any(running_program(child.pid) for child in psutil.Process(parent.pid).children(recursive=True)):
            assert parent.poll() is None
            time.sleep(0.05)
        started = psutil.Process(parent.pid).children(recursive=True)
        parent.kill()
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not alive


def test_without_namespaces_the_limits_still_hold() -> None:
    limits = Limits(isolation="rlimits", wall_s=2.0)
    try:
        outcome = run("x = bytearray(10 << 30)", limits=limits)
    except SandboxError as error:  # the user nobody has no way to a Python below root's home
        assert "cannot start the program: PermissionError" in str(error)
    else:
        assert "MemoryError" in outcome.stderr
    with pytest.raises(SandboxError, match="isolation = 'none' is neither"):
        Limits(isolation="none")  # type: ignore[arg-type]
    with pytest.raises(SandboxError, match="memory_mb = 0"):
        Limits(memory_mb=0)


ADD = "Here:\n```python\ndef add(a, b):\n    return a + b\n{more}```\nDone."
TESTS = [{"call": "add(1, 2)", "returns": 3}, {"call": "add([1], [2])", "returns": [1, 2]}]


def grade(completion: str, tests: Any, **options: Any) -> float:
    (reward,) = code_reward([completion], tests=[tests], wall_s=2.0, **options)
    return reward


def test_programs_are_graded_by_what_they_print_and_return() -> None:
    echo = "```\nprint(input() + '!  ')\n```"
    tests = [{"stdin": "a\n", "stdout": "a!\n"}, {"stdin": "b\n", "stdout": "c!"}]
    assert grade(echo, tests) == 0.5 and grade(echo, tests, partial=False) == 0.0
    assert grade(ADD.format(more="print('noise')\n"), TESTS) == 1.0
    assert grade(ADD.format(more="").replace("a + b", "(a, b)"), [{"call": "add(1, 2)", "returns": [1, 2]}]) == 1.0
    assert grade(ADD.format(more="").replace("a + b", "a - b"), TESTS) == 0.0  # lists have no -, which costs that test
    assert grade("no code", TESTS) == 0.0
    assert program_in("```python\n1\n```\nor\n```\n2\n```") == "2\n"


@pytest.mark.parametrize(
    "trick",
    [
        "import json; json.dumps = lambda x: '[[99], [99]]'",
        "import json; json.loads = lambda x: True",
        "import builtins; builtins.eval = lambda *x: float('nan')",
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "import os\nfor fd in range(60):\n    try: os.write(fd, b'[[1], [1]]')\n    except OSError: 0\nos._exit(0)",
        "class Yes:\n    def __eq__(self, other): return True\ndef add(a, b): return Yes()",
    ],
)
def test_the_grader_cannot_be_patched(trick: str) -> None:
    """Each does what it can from inside the process; what is expected is not in there."""
    assert grade(ADD.format(more=f"{trick}\n"), TESTS) == 0.0


def test_a_test_that_is_none_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"a test is \{stdin, stdout\} or \{call, returns\}, not \{'input': '1'\}"):
        grade("```\n1\n```", [{"input": "1"}])
    with pytest.raises(ValueError, match="at least one test"):
        grade("```\n1\n```", [])
    with pytest.raises(ValueError, match="no record has the field 'cases'"):
        code_reward(["x"], tests_field="cases", tests=[TESTS])
