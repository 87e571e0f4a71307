"""The process that runs reward functions, on the far side of `megarl.rewards.runner`'s pipe.

Contract, all messages JSON: first comes the list of functions (the fields of `plan.Entry`), answered by
{"error": null} or the reason why they cannot be used; then come lists of [columns, domain] of samples. Each call of
`plan.calls_of` is answered by a list with {"value": number} for each of its samples, or {"error": what went wrong},
which keeps the sample from further calls. The process ends when the pipe does, and is killed when its parent dies,
whatever it is doing.

Only the standard library and the rewards themselves are imported here, so that a worker starts in a tenth of a
second.
"""

import ctypes
import hashlib
import json
import math
import numbers
import os
import random
import signal
import sys
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from megarl.rewards import Reward, RewardError, check_arguments, resolve
from megarl.rewards.plan import Entry, calls_of, options

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
MAX_SHOWN = 500  # characters of a user's exception or value in an error


def main(descriptor: int, parent: int) -> None:
    """Serve the pipe on file `descriptor` until it ends."""
    # Ctrl-C and a scheduler's notices are for the trainer, which ends its workers when it is done with them. A handler
    # that does nothing, unlike SIG_IGN, is not inherited by the programs that a reward runs.
    for notice in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(notice, lambda *_: None)
    die_with(parent)
    os.set_inheritable(descriptor, False)  # processes that a reward starts must not keep the pipe open
    with Connection(descriptor) as pipe:
        try:
            entries = [Entry(**entry) for entry in json.loads(pipe.recv_bytes())]
            rewards = load(entries)
            send(pipe, {"error": None})
            while True:
                for answers in score(entries, rewards, json.loads(pipe.recv_bytes())):
                    send(pipe, answers)
        except RewardError as error:
            send(pipe, {"error": str(error)})
        except (EOFError, ConnectionError):
            return  # the parent closed the pipe, which is how it says goodbye


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies; elsewhere than on Linux the end of the pipe has to do."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the kernel was told
        sys.exit(1)


def send(pipe: Connection, message: Any) -> None:
    """Answer the parent."""
    pipe.send_bytes(json.dumps(message).encode())


def load(entries: list[Entry]) -> dict[str, tuple[Reward, dict[str, Any]]]:
    """Each reward's function and options by its name; keyword-only ones are given always, so that no column is."""
    rewards = {}
    for entry in entries:
        function = resolve(entry.name)
        check_arguments(entry.name, function, entry.args)
        rewards[entry.name] = (function, options(function, entry.args, keyword_only=True))
    return rewards


def score(
    entries: list[Entry], rewards: dict[str, tuple[Reward, dict[str, Any]]], samples: list[tuple[dict, str | None]]
) -> Iterator[list[dict[str, Any]]]:
    """The answers to every call that these samples need."""
    failed: set[int] = set()
    for name, keys in calls_of(entries, [(key, domain) for key, (_, domain) in enumerate(samples)]):
        left = [key for key in keys if key not in failed]
        if not left:
            continue
        answers = call(*rewards[name], [samples[key][0] for key in left])
        failed |= {key for key, answer in zip(left, answers, strict=True) if "error" in answer}
        yield answers


def call(function: Reward, args: dict[str, Any], samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a reward says of samples. An exception is all of theirs; one that it returns is of the sample in its place.

    A field that only some records have is None for the others.
    """
    names = dict.fromkeys(name for columns in samples for name in columns)
    batch = {name: [columns.get(name) for columns in samples] for name in names}
    seed_generators(samples)
    try:
        returned = function(**{**batch, **args})
    except BaseException as error:  # SystemExit too: whatever user code raises is an event with a name
        return [{"error": f"raised {describe(error)}"}] * len(samples)
    problem = what_is_wrong(returned, len(samples))
    if problem:
        return [{"error": f"returned {problem}"}] * len(samples)
    return [answer(value) for value in returned]


def seed_generators(samples: list[dict[str, Any]]) -> None:
    """Let a reward that draws lots draw the same for the same samples, in whichever worker and after whatever else: a
    run that resumes is then the run that did not stop. torch and numpy are seeded where a reward's module imports them:
    an import inside of the function comes too late for the first call."""
    seed = int.from_bytes(hashlib.blake2b(json.dumps(samples).encode(), digest_size=4).digest())
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


def answer(value: Any) -> dict[str, Any]:
    """What a reward says of one sample."""
    if isinstance(value, Exception):
        return {"error": f"failed: {describe(value)}"}
    problem = what_is_wrong_with(value)
    return {"error": f"returned {problem}"} if problem else {"value": float(value)}


def what_is_wrong(returned: Any, expected: int) -> str | None:
    """Why `returned` is not a list of so many things, or None if it is."""
    if not isinstance(returned, list | tuple):
        return f"{shown(returned)}, expected a list of {expected} number{'s' if expected > 1 else ''}"
    if len(returned) != expected:
        return f"{len(returned)} values, expected {expected} (one for each completion)"
    return None


def what_is_wrong_with(value: Any) -> str | None:
    """Why `value` is not a finite number, or None if it is."""
    if not isinstance(value, numbers.Real):
        return f"{shown(value)}, expected a number"
    try:
        return None if math.isfinite(value) else f"{float(value)}, expected a finite number"
    except OverflowError:
        return "an integer too large for a float, expected a finite number"


def shown(value: Any) -> str:
    """A value and its type, at a bounded length."""
    return "None" if value is None else f"{value!r:.{MAX_SHOWN}} of type {type(value).__name__}"


def describe(error: BaseException) -> str:
    """Type and message of `error`, and the last line that it passed through in the file that the reward is in."""
    message = "".join(traceback.format_exception_only(error)).strip()[:MAX_SHOWN]
    frames = traceback.extract_tb(error.__traceback__)
    frames = frames[1:] if frames and frames[0].filename == __file__ else frames  # the call in this file
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    return f"{message} ({own[-1].filename}:{own[-1].lineno})" if own else message
