"""A watch over all processes while they run, which says whom they stop for.

The connections of the roll call stay open: one that breaks names the process at its other end, and
every process says every other second how often it has waited for the others, so that one that
stands still is named too. There is nobody to save with then: all stop, and the same command
resumes.

Of a death several things happen at once: the connection here breaks, collectives fail in the
threads that compute, jax aborts (`relay` holds that back). Only the first names the process; so
one whose main thread has failed asks process 0 what it knows before it says anything itself.
"""

import contextlib
import io
import os
import selectors
import socket
import sys
import threading
import time

from bivl.core.rollcall import Link, label

PERIOD = 2.0  # seconds between two signs of life
GRACE = 10.0  # seconds in which others may find by themselves what has ended one
RESUME = "all processes stop; the same command resumes"


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
        self.heard = dict.fromkeys(links, time.monotonic())
        self.ended: dict[int, tuple[float, str, int]] = {}  # when, why, exit code
        self.asking: set[int] = set()  # who wants to know whether another is to blame
        self.left = False
        self.code: int | None = None  # where this process has said its last line
        self.answered = threading.Event()
        for link in links.values():
            _keep_alive(link)

    def tick(self) -> None:
        """This process has come to a place where all meet."""
        self.ticks += 1

    def leave(self, problem: str = "", code: int = 1, ask: bool = False) -> None:
        """This process ends: as it should, or because of a `problem` that the others are told.

        It has said why by now and exits with `code`; or it will `ask` first, for its problem may
        follow from what has ended another: then the watch ends this process in that one's name.
        """
        if problem and not ask:
            self.code = code
        if self.left:
            return
        self.left = True
        if self.process == 0:
            self.ended[0] = (time.monotonic(), problem, code)
            self.asking |= {0} if ask else set()
        self._send(ended=problem[:500], code=code, ask=ask)
        if ask:
            self.answered.wait(GRACE)

    def _send(self, **message) -> None:
        with self.lock:
            for link in self.links.values():
                link.send(**message)

    def run(self) -> None:
        """The thread: until the process ends."""
        told = looked = time.monotonic()
        with selectors.DefaultSelector() as waiting:
            for process, link in self.links.items():
                waiting.register(link.socket, selectors.EVENT_READ, process)
            while True:
                # Those who ask now were failed by something older; its signs are there to be read.
                asking = self.asking.copy()
                for key, _ in waiting.select(PERIOD) if waiting.get_map() else ():
                    if not self._read(key.data):
                        waiting.unregister(key.fileobj)
                if not waiting.get_map():
                    time.sleep(PERIOD)
                now = time.monotonic()
                if now - told >= PERIOD:
                    told = now
                    self._send(ticks=self.ticks)
                self._forgive(now - looked - PERIOD)
                looked = now
                self._answer(asking)
                self._judge()

    def _read(self, process: int) -> bool:
        """Takes what another process sends; False when it has closed its connection."""
        messages, now = self.links[process].receive(), time.monotonic()
        self.heard[process] = now
        if messages is None and process not in self.ended:
            self._stop(f"{label(process, self.hosts)} is gone, killed or cut off; {RESUME}")
        for message in messages or ():
            code = message.get("code")
            code = code if isinstance(code, int) and 0 < code < 256 else 1
            if "stop" in message and self.process:
                self._stop(str(message["stop"]), code)
            if "heard" in message:
                self.answered.set()
            if "ended" in message:
                self.ended.setdefault(process, (now, str(message["ended"]), code))
                self.asking |= {process} if message.get("ask") else set()
            if isinstance(message.get("ticks"), int):
                ticks, since = self.moved[process]
                self.moved[process] = (message["ticks"], now if message["ticks"] > ticks else since)
        return messages is not None

    def _forgive(self, lost: float) -> None:
        """Seconds in which this process itself stood still are nobody's delay."""
        if lost > PERIOD:
            self.heard = {process: since + lost for process, since in self.heard.items()}
            self.moved = {p: (ticks, since + lost) for p, (ticks, since) in self.moved.items()}

    def _answer(self, asking: set[int]) -> None:
        """Tells those who asked that nobody else is known to be to blame, or stops for who is."""
        for process in asking:
            self.asking.discard(process)
            first = next((p for p, (_, why, _) in self.ended.items() if why), process)
            if first != process:
                self._stop_for(first)
            if process == self.process:
                self.answered.set()
            elif process in self.links:
                with self.lock:
                    self.links[process].send(heard=True)

    def _judge(self) -> None:
        """Stops all when one process has long ended, or long stood still, and others go on."""
        now = time.monotonic()
        for process, (since, why, _) in self.ended.items():
            if process != self.process and now - since > (GRACE if why else self.apart):
                self._stop_for(process)
        if not self.process and self.ticks != self.moved[0][0]:
            self.moved[0] = (self.ticks, now)
        if late := self._late(now) if self.still else []:
            names = ", ".join(label(process, self.hosts) for process in late[:8])
            self._stop(
                f"{names} stood still for {self.still:.0f} s, others wait; {RESUME}", 1, late
            )

    def _late(self, now: float) -> list[int]:
        """Who gives no sign of life, or else who is the last of all and has long been so."""
        running = [p for p in self.moved if p not in self.ended]
        silent = [p for p in running if now - self.heard.get(p, now) > self.still]
        if silent or self.process:
            return silent
        furthest = max(ticks for ticks, _ in self.moved.values())
        last = min((self.moved[p][0] for p in running), default=furthest)
        if last == furthest:
            return []
        since = {p: self.moved[p][1] for p in running if self.moved[p][0] == last}
        return [p for p in since if now - since[p] > self.still]

    def _stop_for(self, process: int) -> None:
        """Stops all because `process` has ended."""
        _, why, code = self.ended[process]
        why = why or f"{self.apart:.0f} s ago, while others go on"
        self._stop(f"{label(process, self.hosts)} has ended: {why}; {RESUME}", code)

    def _stop(self, why: str, code: int = 1, late=()) -> None:
        """Tells the others and ends this process at once: its main thread may wait for ever.

        Process 0 goes last: what it has sent is lost to those who have not read it by then.
        """
        if not self.process:
            self._send(stop=why, code=code)
            end = time.monotonic() + GRACE
            for process in (p for p in self.links if p not in late):
                link = self.links[process].socket
                with contextlib.suppress(OSError):
                    while (left := end - time.monotonic()) > 0:
                        link.settimeout(left)
                        if not link.recv(1 << 16):
                            break
        with contextlib.suppress(Exception):
            sys.__stdout__.flush()
        if self.code is None:
            sys.stderr = io.StringIO()  # a traceback of the main thread would come after it
            with contextlib.suppress(OSError):
                os.write(2, f"failed: {why}\n".encode())
        os._exit(code if self.code is None else self.code)
