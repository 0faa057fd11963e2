"""A door to jax's coordinator that stays open for a while when the coordinator is gone.

The coordinator lives in process 0, and jax aborts every other process within milliseconds of losing
it, with a stack trace that names nobody and often before the watch has read who is gone. So jax is
given an address in its own process, and what it says there is passed on. Little is said there: who
has which devices, barriers, signs of life; arrays go other ways.
"""

import contextlib
import os
import socket
import threading
import time

PATIENCE = 60.0  # seconds that the watch has to name process 0


def start(address: str) -> str:
    """Passes connections on to HOST:PORT; returns the address that does so."""
    host, _, port = address.rpartition(":")
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = f"{direct},127.0.0.1" if direct else "127.0.0.1"  # gRPC reads it
    listener = socket.create_server(("127.0.0.1", 0))
    target = (host.strip("[]"), int(port))
    threading.Thread(target=_serve, args=(listener, target), name="relay", daemon=True).start()
    return f"127.0.0.1:{listener.getsockname()[1]}"


def _serve(listener: socket.socket, target: tuple[str, int]) -> None:
    while True:
        near, _ = listener.accept()
        try:
            far = socket.create_connection(target, 5)
        except OSError:
            near.close()  # who calls tries again
            continue
        far.settimeout(None)
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for source, sink in ((near, far), (far, near)):
            threading.Thread(target=_pass, args=(source, sink, far), daemon=True).start()


def _pass(source: socket.socket, sink: socket.socket, far: socket.socket) -> None:
    """Passes on what comes until one end closes; the near one is closed late if it was `far`."""
    ends = source
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            ends = sink
            sink.sendall(data)
            ends = source
    if ends is far:
        time.sleep(PATIENCE)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()
