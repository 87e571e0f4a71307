"""The process that runs reward functions, on the far side of `megarl.rewards.runner`'s pipe.

Contract, all messages JSON: first comes the list of functions with their args, answered by {"error": null} or the
reason why they cannot be used; then come lists of samples, answered reward by reward with {"value": number}, or with
{"error": what went wrong}, which ends its sample. The process ends when the pipe does, and is killed when its parent
dies, whatever it is doing.

Only the standard library and the rewards themselves are imported here, so that a worker starts in a tenth of a
second.
"""

import ctypes
import json
import math
import numbers
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from megarl.rewards import Reward, RewardError, check_arguments, resolve

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
            functions = json.loads(pipe.recv_bytes())
            rewards = load(functions)
            send(pipe, {"error": None})
            while True:
                for columns in json.loads(pipe.recv_bytes()):
                    for answer in score(rewards, columns):
                        send(pipe, answer)
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


def send(pipe: Connection, message: dict[str, Any]) -> None:
    """Answer the parent."""
    pipe.send_bytes(json.dumps(message).encode())


def load(functions: list[dict[str, Any]]) -> dict[str, tuple[Reward, dict[str, Any]]]:
    """Each reward's function and options by its name."""
    rewards = {}
    for entry in functions:
        function = resolve(entry["name"])
        check_arguments(entry["name"], function, entry["args"])
        rewards[entry["name"]] = (function, entry["args"])
    return rewards


def score(rewards: dict[str, tuple[Reward, dict[str, Any]]], columns: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every reward's value for one sample, up to the first that fails."""
    for function, args in rewards.values():
        batch = {name: [value] for name, value in columns.items()}
        try:
            returned = function(**{**batch, **args})
        except BaseException as error:  # SystemExit too: whatever user code raises is an event with a name
            yield {"error": f"raised {describe(error)}"}
            return
        problem = what_is_wrong(returned)
        if problem:
            yield {"error": f"returned {problem}"}
            return
        yield {"value": float(returned[0])}


def what_is_wrong(returned: Any) -> str | None:
    """Why `returned` is not a list of one finite number, or None if it is."""
    if not isinstance(returned, list | tuple):
        return f"{shown(returned)}, expected a list of 1 number"
    if len(returned) != 1:
        return f"{len(returned)} values, expected 1 (one for each completion)"
    value = returned[0]
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
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is the call in this file
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    return f"{message} ({own[-1].filename}:{own[-1].lineno})" if own else message
