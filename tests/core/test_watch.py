"""What the watch judges, at a clock that the test sets."""

import socket

import pytest

from bivl.core import rollcall, watch


class Stopped(Exception):
    """Instead of the end of the process."""


@pytest.fixture
def watched(monkeypatch):
    """Process 0's watch over three, at a clock that the test sets, and links to speak through."""
    now = [100.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])

    def stop(self, why, code=1, late=()):
        raise Stopped(f"{why} [{code}]")

    monkeypatch.setattr(watch.Watch, "_stop", stop)
    ends = [socket.socketpair() for _ in (1, 2)]
    monkeypatch.setattr(watch, "_keep_alive", lambda link: None)
    links = {i + 1: rollcall.Link(pair[0]) for i, pair in enumerate(ends)}
    found = watch.Watch(0, ["a", "b", "c"], links, (60, 30))
    yield found, [rollcall.Link(pair[1]) for pair in ends], now
    for pair in ends:
        for end in pair:
            end.close()


def test_one_that_stands_still_while_others_go_on_is_named(watched):
    found, (one, two), now = watched
    for link in (one, two):
        link.send(ticks=1)
    found.tick()
    assert found._read(1) and found._read(2)
    now[0] += 1000
    for number, link in ((1, one), (2, two)):
        link.send(ticks=1)
        found._read(number)
    found._judge()  # all are at the same place, a compilation say
    one.send(ticks=2)
    found._read(1)
    found.tick()
    found.tick()
    with pytest.raises(Stopped, match=r"^process 2 \(host c\) stood still for 60 s"):
        found._judge()
    two.send(ticks=2)
    found._read(2)
    found._judge()


def test_one_that_gives_no_sign_of_life_is_named_wherever_it_stands(watched):
    """The whole process has stopped, in the middle of an update: nobody can be ahead of it."""
    found, (one, two), now = watched
    for seconds, link in ((59, one), (2, two)):
        now[0] += seconds
        link.send(ticks=0)
        found._read(1 if link is one else 2)
        found._judge()
    now[0] += 57
    two.send(ticks=0)
    found._read(2)
    found._forgive(1.0)  # a moment late oneself: that is no reason
    found._judge()
    found._forgive(20.0)  # but what this process itself was stopped for is nobody's delay
    now[0] += 20
    two.send(ticks=0)
    found._read(2)
    found._judge()
    now[0] += 3
    with pytest.raises(Stopped, match=r"^process 1 \(host b\) stood still for 60 s"):
        found._judge()


def test_process_0_is_watched_by_the_others(watched):
    _, (one, _), now = watched
    found = watch.Watch(1, ["a", "b", "c"], {0: one}, (60, 30))
    found.tick()
    now[0] += 59
    found._judge()
    now[0] += 2
    with pytest.raises(Stopped, match=r"^process 0 \(host a\) stood still for 60 s"):
        found._judge()


def test_one_that_is_gone_is_named_and_one_that_says_goodbye_is_not(watched):
    found, (one, two), now = watched
    one.send(ended="")
    assert found._read(1)
    one.socket.close()
    assert not found._read(1)
    two.socket.close()
    with pytest.raises(Stopped, match=r"process 2 \(host c\) is gone"):
        found._read(2)
    now[0] += 31
    with pytest.raises(Stopped, match=r"process 1 \(host b\) has ended: 30 s ago"):
        found._judge()


def test_why_one_has_ended_is_told_to_all(watched):
    found, (one, _), now = watched
    one.send(ended="error: no such folder")
    found._read(1)
    found._judge()  # the others may find it by themselves
    now[0] += watch.GRACE + 1
    with pytest.raises(Stopped, match=r"process 1 \(host b\) has ended: error: no such folder"):
        found._judge()


def test_one_that_fails_asks_whether_another_is_to_blame(watched):
    """Processes 2 and then 1 fail, 2 of itself; 0 tells each what it is to say."""
    found, (one, two), _ = watched
    two.send(ended="OSError: no space left", code=2, ask=True)
    found._read(2)
    assert found.asking == {2}
    found._answer({2})
    assert two.receive() == [{"heard": True}] and not found.asking
    found._judge()
    one.send(ended="RuntimeError: connection closed by peer", code=1, ask=True)
    found._read(1)
    with pytest.raises(Stopped, match=r"process 2 \(host c\) has ended: OSError.*\[2\]"):
        found._answer({1})


def test_process_0_asks_itself_and_the_first_word_of_one_stays(watched):
    found, (one, _), now = watched
    one.send(ended="OSError: no space left", ask=True)
    one.send(ended="")
    found._read(1)
    found.answered.set()
    found.leave("RuntimeError: connection closed by peer", ask=True)
    found.leave()
    assert found.code is None  # it has not spoken yet
    assert found.asking == {0, 1} and one.receive()[0]["ended"].startswith("RuntimeError")
    with pytest.raises(Stopped, match=r"process 1 \(host b\) has ended: OSError"):
        found._answer({0})
    now[0] += watch.GRACE + 1
    with pytest.raises(Stopped, match=r"process 1 \(host b\) has ended: OSError"):
        found._judge()
