"""`megarl serve`: a server that dies is started anew, none outlives whoever started it, and strangers are refused."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from megarl.cli import main
from megarl.config import load
from megarl.rollout import serve as module
from megarl.rollout.auth import TOKEN, RequireToken, token_of
from megarl.rollout.serve import ServeError, arguments, discover, environment
from tests.distributed.tiny_models import qwen2

RECIPE = """
cluster: {{device: cpu}}
run: {{name: served, root: {folder}}}
model: {{path: {model}, dtype: fp32}}
data: {{path: {folder}/data.jsonl, max_prompt_length: 32}}
rollout: {{mode: remote, max_response_length: 32, max_num_seqs: 8, kv_cache_gb: 0.05, num_prompts_per_step: 4}}
train: {{train_global_batch_size: 32, train_mb_tokens: 64, logprob_mb_tokens: 64}}
"""


def recipe_in(folder: Path) -> Path:
    (folder / "data.jsonl").touch()
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(folder=folder, model=qwen2(folder / "model", seed=0)))
    return path


def wait_for(what: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.3)


def processes_of(session: int) -> list[int]:
    """The processes of a server's group, which is a session of its own."""
    return [p.pid for p in psutil.process_iter() if _group(p.pid) == session and p.status() != psutil.STATUS_ZOMBIE]


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_dead_server_is_started_anew_and_nothing_is_left_behind(tmp_path: Path) -> None:
    folder = tmp_path / "served" / "engines"
    command = [sys.executable, "-m", "megarl", "serve", str(recipe_in(tmp_path))]
    serve = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    try:
        wait_for(lambda: discover(folder), 200)
        (file,) = folder.glob("*.json")
        first = json.loads(file.read_text())
        assert first["world_size"] == 1 and first["url"].startswith("http://127.0.0.1:")
        group = processes_of(first["pid"])
        assert len(group) >= 2  # the server, and the engine's process
        os.kill(first["pid"], signal.SIGKILL)
        wait_for(lambda: discover(folder) and discover(folder) != [first["url"]], 200)
        assert processes_of(first["pid"]) == []
        (file,) = folder.glob("*.json")
        second = json.loads(file.read_text())
        serve.terminate()
        assert serve.wait(60) == 0
        assert processes_of(second["pid"]) == [] and discover(folder) == []
    finally:
        serve.kill()


def test_a_busy_server_is_left_alone_and_one_whose_engine_is_dead_is_not(tmp_path: Path, monkeypatch) -> None:
    """Two looks that it leaves unanswered are forgotten when it answers; the third in a row, or a 503, is its end."""
    monkeypatch.setattr(module, "_HEALTH_S", 0.1)
    says: list[int | None] = [None, None, 200, None, None, None, 503]

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if (code := says.pop(0)) is None:
                time.sleep(0.5)
            self.send_response(code or 200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Health)
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    server = module.Server(load([str(recipe_in(tmp_path))]), 0, "127.0.0.1", 0, True)
    alive = []
    for _ in range(7):
        if server.process is None:
            server.process = subprocess.Popen(["sleep", "60"], start_new_session=True)
            server.port, server.ready, server.silent = http.server_address[1], True, 0
        server.next_look = 0.0
        server.look()
        alive.append(server.process is not None)
    http.shutdown()
    assert alive == [True, True, True, True, True, False, False]


def test_what_dead_servers_of_this_machine_left_is_cleared_away(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    here = socket.gethostname()
    entries = [(here, 1, ended.pid), (here, 2, os.getpid()), (f"{here}-2", 3, ended.pid)]
    for host, port, pid in entries:
        (tmp_path / f"{host}-{port}.json").write_text(json.dumps({"url": f"{host}:{port}", "host": host, "pid": pid}))
    module._forget_the_dead(tmp_path)
    assert discover(tmp_path) == [f"{here}-2:3", f"{here}:2"]


@pytest.fixture
def signals() -> Iterator[None]:
    """What `serve` does with them is not the next test's."""
    names = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    before = {name: signal.getsignal(name) for name in names}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize(("broken", "code"), [("1", 0), ("01", 1)])
def test_a_server_that_cannot_start_is_given_up_alone(tmp_path: Path, monkeypatch, capfd, broken, code) -> None:
    """Three starts; the other stays until it is told to stop, and with the last one the command ends."""
    program = f"""
import http.server, os, sys

class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

if os.environ["NUMBER"] in "{broken}":
    sys.exit("no such GPU")
http.server.ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), Health).serve_forever()
"""
    monkeypatch.setattr(module, "_LONGEST_PAUSE_S", 0.1)
    monkeypatch.setattr(module, "_POLL_S", 0.05)
    monkeypatch.setattr(module, "arguments", lambda cfg, host, port, **_: ["-c", program, host, str(port)])
    monkeypatch.setattr(module, "environment", lambda cfg, number, *_, **__: os.environ | {"NUMBER": str(number)})
    said: list[str] = []

    def stop_when_given_up() -> None:
        while "is given up" not in "".join(said):
            time.sleep(0.1)
            said.append(capfd.readouterr().err)
        os.kill(os.getpid(), signal.SIGTERM)

    cfg = load([str(recipe_in(tmp_path)), "rollout.num_engines=2"])
    if code == 0:
        threading.Thread(target=stop_when_given_up, daemon=True).start()
    assert module.serve(cfg, host="127.0.0.1", first_gpu=0) == code
    said.append(capfd.readouterr().err)
    assert "3 starts of server 1 in a row came to nothing; the last one's log ends:\nno such GPU" in "".join(said)
    assert discover(tmp_path / "served" / "engines") == []


def test_the_command_line_is_the_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load([str(recipe_in(tmp_path)), "rollout.tensor_parallel_size=2"])
    said = " ".join(arguments(cfg, "127.0.0.1", 8123, on_cpu=True))
    for words in (
        f"--model {tmp_path}/model --host 127.0.0.1 --port 8123 --dtype float32",
        "--tensor-parallel-size 2 --max-model-len 64 --max-num-seqs 8",
        "--logprobs-mode processed_logprobs",
        "--middleware megarl.rollout.auth.RequireToken",
        '--weight-transfer-config {"backend": "megarl"}',
        f"--kv-cache-memory-bytes {int(0.05 * 2**30)}",
    ):
        assert words in said
    assert "--quantization" not in said
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    env = environment(cfg, 1, "secret", first_gpu=4, on_cpu=False)
    assert env["CUDA_VISIBLE_DEVICES"] == "6,7" and env[TOKEN] == "secret" and "secret" not in said
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "8,9,GPU-a,GPU-b")
    assert environment(cfg, 1, "secret", first_gpu=0, on_cpu=False)["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"
    with pytest.raises(ServeError, match="are 4 GPUs: there is none with the number 5 for server 2"):
        environment(cfg, 2, "secret", first_gpu=0, on_cpu=False)


def test_serving_a_colocated_recipe_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(recipe_in(tmp_path)), "rollout.mode=colocated"]) == 2
    assert "whose engines are in the trainer" in capsys.readouterr().err


def test_the_token_is_one_for_all_and_for_this_user_alone(tmp_path: Path) -> None:
    token = token_of(tmp_path / "engines")
    assert token_of(tmp_path / "engines") == token and len(token) >= 32
    assert (tmp_path / "engines" / "token").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in (tmp_path / "engines").iterdir()] == ["token"]


def test_strangers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, "right")
    reached: list[str] = []

    async def app(scope, receive, send) -> None:
        reached.append(scope["path"])

    def status(**headers: str) -> int | None:
        sent: list[dict] = []

        async def send(message) -> None:
            sent.append(message)

        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "path": "/update_weights", "headers": raw}
        asyncio.run(RequireToken(app)(scope, None, send))
        return sent[0]["status"] if sent else None

    assert status() == 401 and status(authorization="Bearer wrong") == 401 and reached == []
    assert status(authorization="Bearer right") is None and reached == ["/update_weights"]
