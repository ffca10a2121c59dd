"""Channels to an SFTP server that misbehaves, in one process."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from typing import ClassVar

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
