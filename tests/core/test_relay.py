"""The relay between jax and its coordinator, over connections of this host."""

import contextlib
import os
import socket

import pytest

from bivl.core import relay


@pytest.fixture
def coordinator(monkeypatch):
    """Something that listens."""
    monkeypatch.setenv("no_proxy", "example.org")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(60)
        yield listener


def call(address):
    """A connection to HOST:PORT."""
    host, _, port = address.rpartition(":")
    found = socket.create_connection((host, int(port)), 60)
    found.settimeout(60)
    return found


def exactly(end, size):
    """That many bytes."""
    found = b""
    while len(found) < size:
        data = end.recv(size - len(found))
        assert data
        found += data
    return found


def test_what_is_said_arrives_both_ways(coordinator):
    near = call(relay.start(f"127.0.0.1:{coordinator.getsockname()[1]}"))
    far, _ = coordinator.accept()
    far.settimeout(60)
    with near, far:
        for sender, receiver in ((near, far), (far, near)):
            text = bytes(range(256)) * 64
            sender.sendall(text)
            assert exactly(receiver, len(text)) == text
        assert os.environ["no_proxy"] == "example.org,127.0.0.1"
        near.close()
        assert far.recv(1) == b""  # who hangs up here is not kept there


@pytest.mark.parametrize("speaks", [False, True])
def test_a_coordinator_that_dies_is_not_noticed_at_once(coordinator, monkeypatch, speaks):
    waited = []
    monkeypatch.setattr(relay.time, "sleep", waited.append)
    near = call(relay.start(f"127.0.0.1:{coordinator.getsockname()[1]}"))
    far, _ = coordinator.accept()
    with near:
        near.sendall(b"hello")
        assert far.recv(5) == b"hello"
        far.close()
        with contextlib.suppress(OSError):
            while speaks:
                near.sendall(b"are you there?")
        with contextlib.suppress(ConnectionError):
            assert near.recv(1) == b""
    assert waited and set(waited) == {relay.PATIENCE}


def test_one_that_is_not_there_yet_may_come(coordinator):
    address = f"127.0.0.1:{coordinator.getsockname()[1]}"
    coordinator.close()
    door = relay.start(address)
    with call(door) as near, contextlib.suppress(ConnectionError):
        assert near.recv(1) == b""
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))), call(door) as near:
        near.sendall(b"again")
