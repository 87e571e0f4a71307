"""Scores samples in worker processes, with a deadline for each sample.

Contract: `score` returns one result per sample, in order. A reward that raises, hangs, kills its process or returns
anything but one finite number costs that sample alone: its result has no total, and an error that names the prompt,
the sample and what happened. A reward that takes several samples in a call (`megarl.rewards.plan`) costs that call's
samples; exceptions that it returns in place of numbers cost one sample each. A hung worker is killed and replaced, and
its other samples go to the next free one. With on_error=abort `score` raises once all are done.

Workers are plain subprocesses that talk JSON over a pipe, not multiprocessing's: `spawn` imports the trainer's main
module again in each child (and with it torch), `fork` copies a process full of threads and CUDA state, and both
unpickle what user code sends. Columns mostly came from JSON, so that JSON loses nothing; other values (dates from
Parquet) arrive as `str`.

A worker gets samples only when it waits for them, so that sending to it cannot block. The calls of a chunk are
answered one by one, and a call's clock starts when the answer before it arrives.

A reward is somebody's code, and what a job has in its environment (tokens of hubs, keys of loggers and clouds) is not
for it: a worker gets the variables of `ENVIRONMENT`, and those that `reward.pass_env`, or a reward's own ``token_env``,
names.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from megarl.config import RewardConfig, RewardFunction
from megarl.rewards import COLUMNS, RewardError, check_arguments, resolve
from megarl.rewards.plan import BATCH_SIZE, Entry, calls_of, options, unit_size

START_TIMEOUT_S = 120.0  # to import the rewards' modules, perhaps large ones from a cold network disk
EXIT_TIMEOUT_S = 2.0  # for a worker's own exit handlers before it is killed
MAX_CHUNK = 32  # samples sent at once
# What a program needs to run at all: where things are, the language, the number of threads. Everything else stays here.
ENVIRONMENT = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|TERM|PWD|TZ|TMPDIR|TEMP|TMP|LANG|LANGUAGE|LC_\w+|LD_LIBRARY_PATH|LD_PRELOAD"
    r"|VIRTUAL_ENV|CONDA_PREFIX|PYTHON(PATH|HOME|HASHSEED|UNBUFFERED|WARNINGS|DONTWRITEBYTECODE|UTF8|IOENCODING)"
    r"|(OMP|MKL|OPENBLAS)_NUM_THREADS|SSL_CERT_(FILE|DIR)|HF_(HOME|HUB_OFFLINE|DATASETS_CACHE)|TRANSFORMERS_OFFLINE"
)
BOOTSTRAP = """
import sys
descriptor, parent, *sys.path = sys.argv[1:]
from megarl.rewards.worker import main
main(int(descriptor), int(parent))
"""


@dataclass(frozen=True)
class RewardInput:
    """One sample to score: its columns as single values, "completions" among them."""

    prompt_id: str
    sample_index: int
    columns: dict[str, Any]

    @property
    def name(self) -> str:
        """How errors speak of it."""
        return f"prompt {self.prompt_id}, sample {self.sample_index}"


@dataclass(frozen=True)
class RewardResult:
    """The weighted total and each reward's own value; or no total, and what went wrong."""

    total: float | None
    parts: dict[str, float]
    error: str | None


class WorkerFailedError(Exception):
    """A worker gave no answer and is dead; the message says why, as the end of a sentence."""


@dataclass
class Worker:
    """A worker process: `calls` are those it has yet to answer, `parts` its answers on their samples so far."""

    process: subprocess.Popen
    pipe: Connection
    deadline: float
    ready: bool = False
    calls: deque[tuple[str, list[int]]] = field(default_factory=deque)
    parts: dict[int, dict[str, float]] = field(default_factory=dict)


class RewardWorkers:
    """The worker processes of one rank, for use by one thread; when the thread that started them ends, so do they."""

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        self.weights = {entry.name: entry.weight for entry in config.functions}
        self.entries = self.checked_functions()
        tokens = [entry.args["token_env"] for entry in config.functions if entry.args.get("token_env")]
        self.visible = {*config.pass_env, *tokens}
        self.workers: list[Worker] = []
        try:
            self.workers += [self.start() for _ in range(config.workers)]
            while not all(worker.ready for worker in self.workers):
                for worker in answered([worker for worker in self.workers if not worker.ready]):
                    self.greet(worker)
        except BaseException:
            self.close()
            raise

    def checked_functions(self) -> list[Entry]:
        """Find every mistake that needs no worker to find."""
        if not self.config.functions:
            raise RewardError("reward.functions is empty; name at least one reward")
        if len(self.weights) < len(self.config.functions):
            raise RewardError("reward.functions names a reward twice; give the second one a function of its own")
        return [self.checked_function(function) for function in self.config.functions]

    def checked_function(self, given: RewardFunction) -> Entry:
        function, name = resolve(given.name), f"reward {given.name!r}"
        check_arguments(given.name, function, given.args)
        taken = [arg for arg in given.args if arg in COLUMNS]
        if taken:
            raise RewardError(f"{name}: {taken[0]!r} is a column and cannot be an option")
        every = options(function, given.args)
        size, total = every.get(BATCH_SIZE, 1), every.get("total_timeout_s", 0)
        if not isinstance(size, int) or size < 1:
            raise RewardError(f"{name}: {BATCH_SIZE} = {size!r} is not a number of samples, 1 or more")
        if total >= self.config.timeout_s:
            limit = f"reward.timeout_s = {self.config.timeout_s:g}, when its worker is killed"
            raise RewardError(f"{name}: total_timeout_s = {total:g} does not end before {limit}: raise the latter")
        return Entry(given.name, given.args, given.domains, size)

    def start(self) -> Worker:
        """Start a worker; it is ready for samples once it has answered."""
        here, there = Pipe()
        command = [sys.executable, "-c", BOOTSTRAP, str(there.fileno()), str(os.getpid()), *sys.path]
        # A session of its own keeps Ctrl-C from it, and lets `kill` reach the processes that a reward has started.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            env=environment(self.visible),
            pass_fds=[there.fileno()],
            start_new_session=True,
        )
        there.close()
        here.send_bytes(json.dumps([asdict(entry) for entry in self.entries]).encode())
        return Worker(process, here, time.monotonic() + START_TIMEOUT_S)

    def score(self, samples: Sequence[RewardInput]) -> list[RewardResult]:
        """One result per sample, in order."""
        if not self.workers:
            raise RewardError("the reward workers have been closed")
        domains = [self.domain(sample) for sample in samples]
        results = {
            index: RewardResult(None, {}, f"{samples[index].name}: {error}")
            for index, domain in enumerate(domains)
            if (error := self.why_unscored(domain))
        }
        pending = deque(index for index in range(len(samples)) if index not in results)
        try:
            while len(results) < len(samples):
                self.hand_out(samples, domains, pending)
                for worker in answered([worker for worker in self.workers if worker.calls or not worker.ready]):
                    if worker.ready:
                        self.take_answer(worker, samples, pending, results)
                    else:
                        self.greet(worker)
        except BaseException:  # answers still on their way would be taken for those of the next call
            self.close()
            raise
        errors = [results[index].error for index in range(len(samples)) if results[index].error]
        if errors and self.config.on_error == "abort":
            raise RewardError(f"{len(errors)} of {len(samples)} samples could not be scored; the first: {errors[0]}")
        return [results[index] for index in range(len(samples))]

    def domain(self, sample: RewardInput) -> str | None:
        """What its record has under `reward.domain_key`."""
        found = sample.columns.get(self.config.domain_key) if self.config.domain_key else None
        return None if found is None else str(found)

    def why_unscored(self, domain: str | None) -> str | None:
        """Why no reward is for samples of this domain, or None if one is."""
        if any(entry.applies(domain) for entry in self.entries):
            return None
        if domain is None:
            return f"its record has no {self.config.domain_key!r} (reward.domain_key), and every reward has domains"
        known = sorted({name for entry in self.entries for name in entry.domains})
        return f"no reward is for the domain {domain!r}, only for {', '.join(known)}"

    def hand_out(self, samples: Sequence[RewardInput], domains: list[str | None], pending: deque[int]) -> None:
        """Give each waiting worker a chunk, smaller and smaller so that all of them finish together."""
        unit = unit_size(self.entries)
        for worker in list(self.workers):
            if not (pending and worker.ready and not worker.calls):
                continue
            size = min(MAX_CHUNK, math.ceil(len(pending) / (2 * len(self.workers))))
            size = min(len(pending), -(-size // unit) * unit)
            chunk = [pending.popleft() for _ in range(size)]
            message = [(samples[index].columns, domains[index]) for index in chunk]
            try:
                worker.pipe.send_bytes(json.dumps(message, default=str).encode())
            except ConnectionError:  # it died while it had nothing to do
                pending.extendleft(reversed(chunk))
                kill(worker)
                self.replace(worker)
            else:
                worker.calls = deque(calls_of(self.entries, [(index, domains[index]) for index in chunk]))
                worker.parts = {index: {} for index in chunk}
                worker.deadline = time.monotonic() + self.config.timeout_s

    def greet(self, worker: Worker) -> None:
        """Take a starting worker's first answer."""
        try:
            error = receive(worker, START_TIMEOUT_S)["error"]
        except WorkerFailedError as failure:
            raise RewardError(f"a reward worker {failure} while it imported {', '.join(self.weights)}") from failure
        if error:
            raise RewardError(f"in a reward worker: {error}")
        worker.ready = True

    def take_answer(
        self, worker: Worker, samples: Sequence[RewardInput], pending: deque[int], results: dict[int, RewardResult]
    ) -> None:
        """Take what one reward says of the samples of a call, and file the results of those that are complete."""
        name, call = worker.calls.popleft()
        try:
            answers = receive(worker, self.config.timeout_s)
        except WorkerFailedError as failure:
            answers = [{"error": str(failure)}] * len(call)
            others = dict.fromkeys(index for _, later in worker.calls for index in later if index not in call)
            pending.extendleft(reversed(others))
            worker.calls.clear()
            self.replace(worker)
        for index, answer in zip(call, answers, strict=True):
            if "error" in answer:
                error = f"{samples[index].name}: reward {name!r} {answer['error']}"
                results[index] = RewardResult(None, worker.parts[index], error)
            else:
                worker.parts[index][name] = answer["value"]
        later = [(name, [index for index in call if index not in results]) for name, call in worker.calls]
        worker.calls = deque((name, call) for name, call in later if call)
        waiting = {index for _, call in worker.calls for index in call}
        for index in call:
            if index not in results and index not in waiting:
                results[index] = self.weighted(samples[index], worker.parts[index])
        worker.deadline = time.monotonic() + self.config.timeout_s

    def weighted(self, sample: RewardInput, parts: dict[str, float]) -> RewardResult:
        """The result of a sample with a finite number from every reward; large ones may still add up to infinity."""
        total = sum(self.weights[name] * value for name, value in parts.items())
        if math.isfinite(total):
            return RewardResult(total, parts, None)
        return RewardResult(None, parts, f"{sample.name}: the weighted sum of rewards {parts} is {total}")

    def replace(self, worker: Worker) -> None:
        """Start a new worker in the place of a dead one."""
        self.workers[self.workers.index(worker)] = self.start()

    def close(self) -> None:
        """End all workers, giving their exit handlers a moment."""
        for worker in self.workers:
            worker.pipe.close()
        for worker in self.workers:
            try:
                worker.process.wait(0 if worker.calls else EXIT_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                kill(worker)
        self.workers = []


def environment(more: set[str]) -> dict[str, str]:
    """Of this process's variables those that a worker gets: `ENVIRONMENT`'s, and the names in ``more``."""
    return {name: value for name, value in os.environ.items() if ENVIRONMENT.fullmatch(name) or name in more}


def answered(workers: list[Worker]) -> list[Worker]:
    """Wait until some of `workers` have answered, died or passed their deadline, and return those."""
    nearest = min(worker.deadline for worker in workers)
    readable = wait([worker.pipe for worker in workers], timeout=max(0.0, nearest - time.monotonic()))
    now = time.monotonic()
    return [worker for worker in workers if worker.pipe in readable or worker.deadline <= now]


def receive(worker: Worker, timeout_s: float) -> Any:
    """The answer that `worker` has given, even if this process was too slow to take it in time."""
    try:
        if worker.pipe.poll():
            return json.loads(worker.pipe.recv_bytes())
    except (EOFError, ConnectionError):
        code = kill(worker)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        raise WorkerFailedError(f"ended its worker process, which {how}") from None
    kill(worker)
    raise WorkerFailedError(f"timed out after {timeout_s:g} s")


def kill(worker: Worker) -> int:
    """Kill `worker` and what it has started; the exit code of one that was dead already is kept."""
    os.killpg(worker.process.pid, signal.SIGKILL)  # not yet waited for, so that the id is still its own
    worker.pipe.close()
    return worker.process.wait()
