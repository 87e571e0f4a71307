"""Answers of servers to calls that several of them work on together: one that fails says why all of them do, and one
that stands still is waited for no longer than it is useful."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

_SAYS_WHY_S = 5.0  # for servers to say what has ended an exchange
T = TypeVar("T")


class RemoteError(RuntimeError):
    """A server refused a call or did not answer."""


def apart(do: Callable[..., T], *arguments: Any, **more: Any) -> Future[T]:
    """What a call returns, from a thread that the end of the process does not wait for."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(do(*arguments, **more))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="megarl-push", daemon=True).start()
    return future


def first_error(answers: Mapping[str, Future[Any]]) -> str:
    """What the first of the servers (by address) that failed says, or which are silent."""
    concurrent.futures.wait(answers.values(), _SAYS_WHY_S, concurrent.futures.FIRST_EXCEPTION)
    for answer in answers.values():
        if answer.done() and (error := answer.exception()) is not None:
            return str(error)
    silent = [url for url, answer in answers.items() if not answer.done()]
    return f"no answer from {', '.join(silent)}" if silent else "no server says why"


def await_all(answers: Mapping[str, Future[Any]], patience: float) -> None:
    """Until all have answered. Raises what the first that fails says, or RemoteError after ``patience`` seconds."""
    done, pending = concurrent.futures.wait(answers.values(), patience, concurrent.futures.FIRST_EXCEPTION)
    for answer in done:
        answer.result()
    if pending:
        silent = [url for url, answer in answers.items() if answer in pending]
        raise RemoteError(f"no answer within {patience:.0f} s from {', '.join(silent)}")
