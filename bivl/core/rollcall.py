"""The roll call: every process says hello to process 0 before jax starts.

jax aborts when a process is absent, after minutes and without saying which host it was on. So the
processes meet first, on the port that jax's coordinator takes next, and keep these connections for
the watch over each other (`watch`).

One JSON object a line. What strangers send is bounded, and their connections are closed.
"""

import contextlib
import dataclasses
import json
import selectors
import socket
import time

from bivl.core.errors import Late, UserError

LONGEST = 1 << 20  # bytes of a line


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

    Late, in every process that has come, naming those that did not come within `seconds`;
    `expected` may name the hosts in order. UserError, in all too, where they were started wrongly.
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
    late = bool(absent) and not problem
    if late:
        names = ", ".join(label(i, expected) for i in absent[:8])
        more = f" and {len(absent) - 8} more" if len(absent) > 8 else ""
        problem = (
            f"{names}{more} of {count} did not call process 0 (host {hosts[0]}) on port {port} "
            f"within {seconds:.0f} s; start the same command on every host at once, and let the "
            "firewall pass that port"
        )
    for link in links.values():
        link.send(**({"problem": problem, "late": late} if problem else {"hosts": hosts}))
    if problem:
        raise (Late if late else UserError)(problem)
    return hosts, links


def answer(address: str, process: int, count: int, seconds: float):
    """The others' side: -> host names in order, the link to process 0. Errors as for `call`."""
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
                kind = Late if reply.get("late") is True else UserError
                raise kind(str(reply["problem"])[:2000])
            if reply and isinstance(reply.get("hosts"), list) and len(reply["hosts"]) == count:
                found.settimeout(10)
                return [str(name) for name in reply["hosts"]], {0: link}
            why = "something else answers there, a run that is left over perhaps"
        found.close()
        time.sleep(0.3)
    raise Late(
        f"process {process} (host {socket.gethostname()}) cannot reach process 0 at {address} "
        f"within {seconds:.0f} s ({why}); start the same command there, and let the firewall pass "
        "that port"
    )


def _reply(link: Link) -> dict | None:
    while (messages := link.receive()) is not None:
        if messages:
            return messages[0]
    return None
