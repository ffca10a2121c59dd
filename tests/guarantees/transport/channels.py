"""Channels to an SFTP server that misbehaves, in one process."""

from __future__ import annotations

import random
import select
import struct
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

INIT, VERSION, OPEN, CLOSE, READ, FSTAT, REALPATH, STAT = 1, 2, 3, 4, 5, 8, 16, 17
STATUS, HANDLE, DATA, ATTRS, EXTENDED, EXTENDED_REPLY = 101, 102, 103, 105, 200, 201
EOF, NO_SUCH_FILE, PERMISSION_DENIED, FAILURE = 1, 2, 3, 4


def string(content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + content


def packet(kind: int, number: int, body: bytes = b"") -> bytes:
    return string(struct.pack(">BI", kind, number) + body)


def status(number: int, code: int, message: bytes = b"no") -> bytes:
    return packet(STATUS, number, struct.pack(">I", code) + string(message) + string(b""))


class CutChannel:
    """Passes on to another channel, and cuts the connection after ``limit`` bytes from the server."""

    def __init__(self, channel: object, limit: int) -> None:
        self._channel = channel
        self._left = limit

    def sendall(self, data: bytes) -> None:
        if self._left <= 0:
            raise ConnectionResetError(104, "Connection reset by peer")
        self._channel.sendall(data)  # type: ignore[attr-defined]

    def recv(self, size: int) -> bytes:
        data = self._channel.recv(min(size, max(self._left, 1)))[: max(self._left, 0)]  # type: ignore[attr-defined]
        self._left -= len(data)
        return data


class CutRequestsChannel:
    """Passes on to another channel, and cuts the connection after ``limit`` bytes for the server."""

    def __init__(self, channel: Any, limit: int) -> None:
        self._channel = channel
        self._left = limit

    def sendall(self, data: bytes) -> None:
        self._channel.sendall(data[: self._left])
        self._left -= len(data)
        if self._left < 0:
            raise BrokenPipeError(32, "Broken pipe")

    def recv(self, size: int) -> bytes:
        data: bytes = self._channel.recv(size)
        return data


class FlippedChannel:
    """Passes on to another channel; one bit of byte ``place`` from the server is turned over.

    :param bit: which, of 0 to 7.
    """

    def __init__(self, channel: Any, place: int, bit: int) -> None:
        self._channel = channel
        self._place = place
        self._bit = bit
        self.sendall = channel.sendall

    def recv(self, size: int) -> bytes:
        data = bytearray(self._channel.recv(size))
        if 0 <= self._place < len(data):
            data[self._place] ^= 1 << self._bit
        self._place -= len(data)
        return bytes(data)


class PacketChannel:
    """Passes on to the socket of a real server, but ``change`` says what becomes of each packet from there.

    :param change: given the number of a packet, its type and all of it, yields what to hand on; what it
        raises reaches the reader. Numbers 0 and 1 are the handshake's.
    :ivar passed: how many packets have come from the server.
    """

    def __init__(self, channel: Any, change: Callable[[int, int, bytes], Iterator[bytes]]) -> None:
        self._channel = channel
        self._change = change
        self.sendall = channel.sendall
        self.passed = 0
        self._in = b""
        self._out = b""

    def recv(self, size: int) -> bytes:
        while not self._out:
            if not self._take_in():
                return b""
            self._out = b"".join(self.changed())
        data, self._out = self._out[:size], self._out[size:]
        return data

    def _take_in(self) -> bool:
        """Receive what has come; false if that is the end of the connection."""
        received = self._channel.recv(1 << 20)
        self._in += received
        return bool(received)

    def packets(self) -> Iterator[bytes]:
        """Yield each whole packet that has come."""
        while len(self._in) >= 4 and len(self._in) >= 4 + (size := struct.unpack(">I", self._in[:4])[0]):
            whole, self._in = self._in[: 4 + size], self._in[4 + size :]
            yield whole

    def changed(self) -> Iterator[bytes]:
        for whole in self.packets():
            number, self.passed = self.passed, self.passed + 1
            yield from self._change(number, whole[4], whole)


class ShuffledChannel(PacketChannel):
    """Passes on what a real server answers in another order, as far as it has answered already."""

    def __init__(self, channel: Any, seed: int) -> None:
        super().__init__(channel, lambda number, kind, whole: iter([whole]))
        self._random = random.Random(seed)

    def changed(self) -> Iterator[bytes]:
        while select.select([self._channel], [], [], 0.001)[0] and self._take_in():
            pass
        packets = list(super().changed())
        self._random.shuffle(packets)
        yield from packets


class ScriptedServer:
    """An SFTP server with ``files`` in memory, behind the calls of a channel. Tests override its answers.

    An answer is the packets to send now. Where no packet is left to send, the channel stalls.

    :ivar most: bytes that one answer of the channel's ``recv`` holds.
    :ivar requests: the kinds of requests that came.
    """

    extensions = b""
    version = 3

    def __init__(self, files: dict[bytes, bytes], most: int = 1 << 20) -> None:
        self.files = files
        self.most = most
        self.handles: dict[bytes, bytes] = {}
        self.requests: list[int] = []
        self._in = b""
        self._out: deque[bytes] = deque()

    # --- the channel --------------------------------------------------------------------------------

    def sendall(self, data: bytes) -> None:
        self._in += data
        while len(self._in) >= 4 and len(self._in) >= 4 + (size := struct.unpack(">I", self._in[:4])[0]):
            request, self._in = self._in[4 : 4 + size], self._in[4 + size :]
            kind, number = struct.unpack(">BI", request[:5])
            self.requests.append(kind)
            self.send(self.answers[kind](self, number, request[5:]))

    def send(self, data: bytes) -> None:
        self._out.append(data)

    def recv(self, size: int) -> bytes:
        data = b""
        while not data:
            if not self._out:
                return self.silent()
            data = self._out.popleft()
        size = min(size, self.most)
        if data[size:]:
            self._out.appendleft(data[size:])
        return data[:size]

    def silent(self) -> bytes:
        raise TimeoutError("timed out")

    # --- answers ------------------------------------------------------------------------------------

    def on_init(self, number: int, body: bytes) -> bytes:
        return string(struct.pack(">BI", VERSION, self.version) + self.extensions)

    def on_open(self, number: int, body: bytes) -> bytes:
        (size,) = struct.unpack(">I", body[:4])
        path = body[4 : 4 + size]
        if path not in self.files:
            return status(number, NO_SUCH_FILE)
        handle = b"h%d" % len(self.handles)
        self.handles[handle] = path
        return packet(HANDLE, number, string(handle))

    def content(self, body: bytes) -> tuple[bytes, bytes]:
        """Return the content of the file whose handle begins a request's body, and what follows it."""
        (size,) = struct.unpack(">I", body[:4])
        path = self.handles.get(body[4 : 4 + size], b"")
        return self.files.get(path, b""), body[4 + size :]

    def on_fstat(self, number: int, body: bytes) -> bytes:
        content, _ = self.content(body)
        return packet(ATTRS, number, struct.pack(">IQIII", 1 | 4 | 8, len(content), 0o100644, 5, 5))

    def on_stat(self, number: int, body: bytes) -> bytes:
        return packet(ATTRS, number, struct.pack(">IQIII", 1 | 4 | 8, 0, 0o100644, 5, 5))

    def on_read(self, number: int, body: bytes) -> bytes:
        content, rest = self.content(body)
        offset, length = struct.unpack(">QI", rest)
        return self.read(number, content, offset, length)

    def read(self, number: int, content: bytes, offset: int, length: int) -> bytes:
        data = content[offset : offset + length]
        return packet(DATA, number, string(data)) if data else status(number, EOF)

    def on_close(self, number: int, body: bytes) -> bytes:
        return status(number, 0)

    def on_extended(self, number: int, body: bytes) -> bytes:
        return packet(EXTENDED_REPLY, number, struct.pack(">QQQQ", 262144, 261120, 261120, 1000))

    answers: ClassVar[dict[int, Callable[[ScriptedServer, int, bytes], bytes]]] = {
        INIT: lambda self, number, body: self.on_init(number, body),
        OPEN: lambda self, number, body: self.on_open(number, body),
        CLOSE: lambda self, number, body: self.on_close(number, body),
        READ: lambda self, number, body: self.on_read(number, body),
        FSTAT: lambda self, number, body: self.on_fstat(number, body),
        REALPATH: lambda self, number, body: status(number, PERMISSION_DENIED),
        STAT: lambda self, number, body: self.on_stat(number, body),
        EXTENDED: lambda self, number, body: self.on_extended(number, body),
    }
