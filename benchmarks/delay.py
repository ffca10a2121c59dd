"""A long line: a TCP proxy on 127.0.0.1 that hands on every byte half a round trip later.

A new connection waits one round trip first, as TCP's handshake would have it. Throughput is not limited: as
many bytes are under way as the two ends care to send, up to `UNDER_WAY`. The proxy is a process of its own,
which ends with the program that started it.

What this does not give: loss, jitter, or TCP's slow start, so that short transfers look better than on a
real line.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress

UNDER_WAY = 256 << 20  # bytes in each direction
BLOCK = 1 << 20


@contextmanager
def delayed(port: int, round_trip: float) -> Iterator[int]:
    """Give a port that leads to ``port``, ``round_trip`` milliseconds away; that port itself for 0."""
    if not round_trip:
        yield port
        return
    command = [sys.executable, "-m", "benchmarks.delay", str(port), str(round_trip / 1000)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as proxy:
        assert proxy.stdin is not None and proxy.stdout is not None
        try:
            yield int(proxy.stdout.readline())
        finally:
            proxy.stdin.close()


def main() -> None:
    """Lead to port argv[1], argv[2] seconds away, until standard input ends. Prints the port to use."""
    target, round_trip = int(sys.argv[1]), float(sys.argv[2])
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    _thread(_serve, listener, target, round_trip)
    sys.stdin.read()


def _serve(listener: socket.socket, target: int, round_trip: float) -> None:
    while True:
        client, _ = listener.accept()
        _thread(_connect, client, target, round_trip)


def _connect(client: socket.socket, target: int, round_trip: float) -> None:
    time.sleep(round_trip)
    try:
        server = socket.create_connection(("127.0.0.1", target))
    except OSError:
        client.close()
        return
    for one, other in ((client, server), (server, client)):
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        line = _Line(other, round_trip / 2)
        _thread(line.take_in, one)
        _thread(line.hand_on)


def _thread(target: object, *arguments: object) -> None:
    threading.Thread(target=target, args=arguments, daemon=True).start()  # type: ignore[arg-type]


class _Line:
    """One direction of a connection. An empty block is its end."""

    def __init__(self, target: socket.socket, delay: float) -> None:
        self._target = target
        self._delay = delay
        self._blocks: deque[tuple[float, bytes]] = deque()
        self._size = 0
        self._changed = threading.Condition()

    def take_in(self, source: socket.socket) -> None:
        data = b"-"
        while data:
            try:
                data = source.recv(BLOCK)
            except OSError:
                data = b""
            with self._changed:
                self._changed.wait_for(lambda: self._size < UNDER_WAY)
                self._blocks.append((time.monotonic() + self._delay, data))
                self._size += len(data)
                self._changed.notify()

    def hand_on(self) -> None:
        data = b"-"
        with suppress(OSError):
            while data:
                with self._changed:
                    self._changed.wait_for(lambda: self._blocks)
                    due, data = self._blocks.popleft()
                    self._size -= len(data)
                    self._changed.notify()
                time.sleep(max(0.0, due - time.monotonic()))
                self._target.sendall(data)
            self._target.shutdown(socket.SHUT_WR)


if __name__ == "__main__":
    main()
