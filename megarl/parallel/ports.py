"""Ports for processes that have yet to start."""

from __future__ import annotations

import random
import socket

# Below those that systems give to connections by themselves (from 32768 on Linux, from 49152 elsewhere): of these, one
# that is free now may be taken before its process has started, which can be half a minute.
_FIRST, _LAST = 10_000, 30_000


def free_port(host: str = "127.0.0.1") -> int:
    """One on which nobody listens at ``host``. Raises OSError where there is none."""
    chance = random.SystemRandom()  # as many runs begin at once as a machine has
    for _ in range(1000):
        with socket.socket() as probe:
            try:
                probe.bind((host, chance.randrange(_FIRST, _LAST)))
            except OSError:
                continue
            port: int = probe.getsockname()[1]
            return port
    raise OSError(f"1000 ports from {_FIRST} to {_LAST} cannot be bound at {host}")
