"""Who is there: a roll call before jax starts, and a watch over all processes while they run.

jax aborts when a process is absent or dies, after minutes and without saying which host it was on.
So every process first says hello to process 0, on the port that jax's coordinator takes next, and
the connections stay open: one that breaks names the process at its other end, and every process
tells how often it has waited for others, so that one that stands still is named too. There is
nobody to save with then: all stop, and the same command resumes.

One JSON object a line. What strangers send is bounded, and their connections are closed.
"""

import contextlib
import dataclasses
import json
import os
import selectors
import socket
import sys
import threading
import time

from bivl.core.errors import UserError

LONGEST = 1 << 20  # bytes of a line
PERIOD = 2.0  # seconds between two looks at who has moved
GRACE = 10.0  # seconds in which others may find by themselves what has ended one
RESUME = "all processes stop; the same command resumes"


@dataclasses.dataclass
class Link:
    """A connection to another process."""

    socket: socket.socket
    buffer: bytes = b""

    def send(self, **message) -> None:
        """Sends a line; a connection that is broken is noticed by who reads it."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict] | None:
        """The lines that have come (waits for some); None when there will be no more."""
        try:
            data = self.socket.recv(1 << 16)
        except OSError:
            return None
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            return None
        if not data or len(self.buffer) > LONGEST:
            return None
        return messages if all(isinstance(m, dict) for m in messages) else None


def label(process: int, hosts) -> str:
    """How messages name a process: its number, and its host where that is known."""
    known = process < len(hosts) and hosts[process]
    return f"process {process} (host {hosts[process]})" if known else f"process {process}"


def _listen(port: int) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, backlog=1024, dualstack_ipv6=dual)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"process 0 cannot listen on port {port} ({error}); end the run that is left over on "
            "this host, or choose another port"
        ) from error


def _greet(link: Link, message: dict, links: dict[int, Link], hosts: list) -> str:
    """Enters a process that says hello in `links` and `hosts`; returns what is wrong with it."""
    process, host, count = (message.get(name) for name in ("process", "host", "count"))
    if not isinstance(process, int) or not isinstance(host, str) or not isinstance(count, int):
        return ""  # a stranger
    if count != len(hosts):
        return (
            f"process {process} (host {host[:64]}) was told of {count} processes, process 0 of "
            f"{len(hosts)}; start all with the same --num_processes"
        )
    if not 0 < process < count or process in links:
        return (
            f"two processes say that they are number {process}: on host {host[:64]} and on host "
            f"{hosts[process] if 0 <= process < count else '?'}; give each its own --process_id"
        )
    links[process], hosts[process] = link, host[:64]
    return ""


def call(port: int, count: int, seconds: float, expected=()) -> tuple[list[str], dict[int, Link]]:
    """Process 0's side of the roll call: -> host names in order, the links to the others.

    UserError, in every process that has come, naming those that did not come within `seconds`;
    `expected` may name the hosts in order.
    """
    end, links, problem = time.monotonic() + seconds, {}, ""
    hosts: list = [socket.gethostname(), *[None] * (count - 1)]
    with selectors.DefaultSelector() as waiting, _listen(port) as listener:
        waiting.register(listener, selectors.EVENT_READ)
        while None in hosts and not problem and (left := end - time.monotonic()) > 0:
            for key, _ in waiting.select(left):
                if key.data is None:
                    with contextlib.suppress(OSError):
                        new = Link(listener.accept()[0])
                        new.socket.settimeout(10)
                        waiting.register(new.socket, selectors.EVENT_READ, new)
                    continue
                messages = key.data.receive()
                if messages is None:  # a stranger, or one that has given up and may come again
                    waiting.unregister(key.fileobj)
                    key.data.socket.close()
                    for process in [p for p, link in links.items() if link is key.data]:
                        del links[process]
                        hosts[process] = None
                for message in messages or ():
                    problem = problem or _greet(key.data, message, links, hosts)
        for key in list(waiting.get_map().values()):  # strangers still connected
            if key.data is not None and key.data not in links.values() and not problem:
                key.data.socket.close()
            elif key.data is not None and problem:
                key.data.send(problem=problem)
    absent = [i for i, host in enumerate(hosts) if host is None]
    if absent and not problem:
        names = ", ".join(label(i, expected) for i in absent[:8])
        more = f" and {len(absent) - 8} more" if len(absent) > 8 else ""
        problem = (
            f"{names}{more} of {count} did not call process 0 (host {hosts[0]}) on port {port} "
            f"within {seconds:.0f} s; start the same command on every host at once, and let the "
            "firewall pass that port"
        )
    for link in links.values():
        link.send(**({"problem": problem} if problem else {"hosts": hosts}))
    if problem:
        raise UserError(problem)
    return hosts, links


def answer(address: str, process: int, count: int, seconds: float):
    """The others' side: -> host names in order, the link to process 0. UserError as for `call`."""
    host, _, port = address.rpartition(":")
    end, why = time.monotonic() + seconds, "no answer"
    while (left := end - time.monotonic()) > 0:
        try:
            found = socket.create_connection((host.strip("[]"), int(port)), min(left, 5))
        except (OSError, OverflowError) as error:
            why = str(error)
            time.sleep(min(0.3, left))
            continue
        link = Link(found)
        if found.getsockname() != found.getpeername():  # a free port of this host may meet itself
            link.send(process=process, host=socket.gethostname(), count=count)
            found.settimeout(seconds + 10)  # process 0 may have come last
            reply = _reply(link)
            if reply and "problem" in reply:
                raise UserError(str(reply["problem"])[:2000])
            if reply and isinstance(reply.get("hosts"), list) and len(reply["hosts"]) == count:
                found.settimeout(10)
                return [str(name) for name in reply["hosts"]], {0: link}
            why = "something else answers there, a run that is left over perhaps"
        found.close()
        time.sleep(0.3)
    raise UserError(
        f"process {process} (host {socket.gethostname()}) cannot reach process 0 at {address} "
        f"within {seconds:.0f} s ({why}); start the same command there, and let the firewall pass "
        "that port"
    )


def _reply(link: Link) -> dict | None:
    while (messages := link.receive()) is not None:
        if messages:
            return messages[0]
    return None


def _keep_alive(link: Link) -> None:
    """A host that loses power closes nothing: its connections break after half a minute."""
    link.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            link.socket.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Watch(threading.Thread):
    """Ends this process, with a line that says who is to blame, when another is lost or late.

    Process 0 watches all others and tells them; the others watch process 0.
    """

    def __init__(self, process: int, hosts: list[str], links: dict[int, Link], limits):
        """`limits`: seconds that a process may stand still while others go on (0: for ever), and
        that the others may go on when one has ended."""
        super().__init__(name="watch", daemon=True)
        self.process, self.hosts, self.links = process, hosts, links
        self.still, self.apart = limits
        self.ticks, self.lock = 0, threading.Lock()
        self.moved = dict.fromkeys(range(len(hosts)), (0, time.monotonic()))
        self.ended: dict[int, tuple[float, str]] = {}
        for link in links.values():
            _keep_alive(link)

    def tick(self) -> None:
        """This process has come to a place where all meet."""
        self.ticks += 1

    def leave(self, problem: str = "") -> None:
        """This process ends: as it should, or because of a `problem` that the others are told."""
        self._send(ended=problem[:500])

    def _send(self, **message) -> None:
        with self.lock:
            for link in self.links.values():
                link.send(**message)

    def run(self) -> None:
        """The thread: until the process ends."""
        told = 0
        with selectors.DefaultSelector() as waiting:
            for process, link in self.links.items():
                waiting.register(link.socket, selectors.EVENT_READ, process)
            while True:
                for key, _ in waiting.select(PERIOD) if waiting.get_map() else ():
                    if not self._read(key.data):
                        waiting.unregister(key.fileobj)
                if not waiting.get_map():
                    time.sleep(PERIOD)
                if self.ticks != told and self.process:
                    told = self.ticks
                    self._send(ticks=told)
                self._judge()

    def _read(self, process: int) -> bool:
        """Takes what another process sends; False when it has closed its connection."""
        messages = self.links[process].receive()
        if messages is None and process not in self.ended:
            self._stop(f"{label(process, self.hosts)} is gone, killed or cut off; {RESUME}")
        for message in messages or ():
            if "stop" in message and not self.process:
                continue
            if "stop" in message:
                self._stop(str(message["stop"]))
            if "ended" in message:
                self.ended[process] = (time.monotonic(), str(message["ended"]))
            if isinstance(message.get("ticks"), int):
                self.moved[process] = (message["ticks"], time.monotonic())
        return messages is not None

    def _judge(self) -> None:
        """Stops all when one process has long ended, or long stood still, and others go on."""
        now = time.monotonic()
        for process, (since, why) in self.ended.items():
            if now - since > (GRACE if why else self.apart):
                why = why or f"{self.apart:.0f} s ago, while others go on"
                self._stop(f"{label(process, self.hosts)} has ended: {why}; {RESUME}")
        if self.process or not self.still:
            return
        if self.ticks != self.moved[0][0]:
            self.moved[0] = (self.ticks, now)
        furthest = max(ticks for ticks, _ in self.moved.values())
        late = [
            label(process, self.hosts)
            for process, (ticks, since) in self.moved.items()
            if ticks < furthest and now - since > self.still and process not in self.ended
        ]
        if late:
            names = ", ".join(late[:8])
            self._stop(f"{names} stood still for {self.still:.0f} s, others wait; {RESUME}")

    def _stop(self, why: str) -> None:
        """Tells the others and ends this process at once: its main thread may wait for ever."""
        self._send(stop=why)
        if not self.process:
            time.sleep(0.5)  # jax ends the others when its coordinator does: let them speak first
        with contextlib.suppress(Exception):
            sys.__stdout__.flush()
        with contextlib.suppress(OSError):
            os.write(2, f"failed: {why}\n".encode())
        os._exit(1)
