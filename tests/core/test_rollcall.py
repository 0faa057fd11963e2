"""The roll call over real connections of this host."""

import concurrent.futures
import socket
import time

import pytest

from bivl.core import rollcall
from bivl.core.errors import Late, UserError


@pytest.fixture
def port():
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def meet(port, count, others, seconds=60.0, before=None):
    """Process 0's result of a roll call, and those of `others`, (number, count) each."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        zero = pool.submit(rollcall.call, port, count, seconds)
        if before:
            before()
        found = [
            pool.submit(rollcall.answer, f"127.0.0.1:{port}", number, told, seconds)
            for number, told in others
        ]
        return [task.exception() or task.result() for task in (zero, *found)]


def test_all_meet_and_know_each_other(port):
    here = socket.gethostname()
    (hosts, links), *others = meet(port, 3, [(1, 3), (2, 3)])
    assert hosts == [here] * 3 and sorted(links) == [1, 2]
    for hosts_too, to_zero in others:
        assert hosts_too == hosts and list(to_zero) == [0]
    for number, link in links.items():
        others[number - 1][1][0].send(ticks=number)
        assert link.receive() == [{"ticks": number}]


def test_strangers_are_passed_over(port):
    """One that says nothing, and some that speak otherwise."""
    strangers = []

    def knock():
        for text in (b"", b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"process": "1"}\n', b"\xff\n"):
            end = time.monotonic() + 60
            while True:
                try:
                    strangers.append(socket.create_connection(("127.0.0.1", port), 5))
                    break
                except OSError:
                    assert time.monotonic() < end
            strangers[-1].sendall(text)

    (hosts, links), (others, _) = meet(port, 2, [(1, 2)], before=knock)
    assert len(hosts) == 2 and hosts == others and list(links) == [1]
    for stranger in strangers:
        stranger.close()


@pytest.mark.parametrize(
    ("others", "named"),
    [
        ([(1, 4)], "process 1 .* was told of 4 processes, process 0 of 3"),
        ([(1, 3), (1, 3)], "two processes say that they are number 1"),
        ([(0, 3)], "two processes say that they are number 0"),
    ],
)
def test_a_wrong_start_is_named_in_all(port, others, named):
    found = meet(port, 3, others, seconds=60)
    assert all(isinstance(error, UserError) for error in found)
    for error in found:
        with pytest.raises(UserError, match=named):
            raise error


def test_the_absent_are_named_with_the_hosts_that_are_known(port):
    with pytest.raises(Late, match=r"process 1 \(host b\), process 2 \(host c\) of 3 did not"):
        rollcall.call(port, 3, 0.01, ("a", "b", "c"))
    with pytest.raises(Late, match=r"process 1 .* cannot reach process 0 at 127.0.0.1"):
        rollcall.answer(f"127.0.0.1:{port}", 1, 3, 0.01)


def test_those_who_came_are_late_too(port):
    """An absent third is nobody's mistake."""
    for error in meet(port, 3, [(1, 3)], seconds=3):
        assert isinstance(error, Late) and "process 2 of 3 did not call" in str(error)


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on port {port}"):
            rollcall.call(port, 2, 1)


def test_lines_are_bounded():
    ours, theirs = socket.socketpair()
    link = rollcall.Link(ours)
    with ours, theirs:
        ours.settimeout(60)
        while link.buffer is not None:
            theirs.sendall(b"x" * (1 << 15))
            if link.receive() is None:
                break
        assert len(link.buffer) <= rollcall.LONGEST + (1 << 16)
