"""Ports for processes that have yet to start."""

import socket

import pytest

from megarl.parallel import ports


def test_a_free_port_is_none_that_is_taken_or_that_connections_are_given(monkeypatch):
    """Of two ports one is taken: the other is found. With none left that is said."""
    first = ports.free_port()
    assert 10_000 <= first < 30_000
    with socket.socket() as taken, socket.socket() as other:
        taken.bind(("127.0.0.1", first))
        monkeypatch.setattr(ports, "_FIRST", first)
        monkeypatch.setattr(ports, "_LAST", first + 2)
        assert {ports.free_port() for _ in range(5)} == {first + 1}
        other.bind(("127.0.0.1", first + 1))
        with pytest.raises(OSError, match=r"cannot be bound at 127\.0\.0\.1"):
            ports.free_port()
