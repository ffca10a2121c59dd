"""A pipelined, read-only SFTP client: many files in flight on one channel, md5 in byte order on the way.

The index names the files, so that nothing is listed and nothing is asked twice::

    for each file wanted, while there is room:   send OPEN
    HANDLE arrives:      send FSTAT and the first READ together
    ATTRS arrive:        send READs for the rest, as many as the window takes
    DATA arrive:         hash and write what continues the file; keep what came early; ask for what came short
    all bytes are there: md5 as expected, or else FSTAT once more, to tell a file that changed from a bad one
                         send CLOSE, hand out the result

Memory is bounded by ``window``, the bytes asked for and not yet processed. It works with an account that is
cut down to ``internal-sftp -R -p open,close,read,fstat,stat,lstat,realpath,limits``.

What this does not give: it never tries again. After :class:`ConnectionLost` the reader is of no more use.

Sources: draft-ietf-secsh-filexfer-02 (SFTP version 3), OpenSSH ``PROTOCOL`` section 4.8 (limits@openssh.com).
"""

from __future__ import annotations

import hashlib
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

from airflow_mdbackup.scheme.errors import ConnectionLost
from airflow_mdbackup.scheme.names import to_text

WINDOW = 16 << 20  # bytes asked for at a time; the channel's window must be larger
MAX_FILES = 128
_RECEIVE = 1 << 20
# OpenSSH sends at most 256 KiB. A server may answer with less than asked for, never with more.
_MAX_PACKET = (256 << 10) + 1024
_DEFAULT_READ = 32 << 10  # what every server must be able to send
_MAX_READ = 255 << 10
_MAX_HANDLE = 256


class _Type(IntEnum):
    INIT = 1
    VERSION = 2
    OPEN = 3
    CLOSE = 4
    READ = 5
    FSTAT = 8
    STAT = 17
    STATUS = 101
    HANDLE = 102
    DATA = 103
    ATTRS = 105
    EXTENDED = 200
    EXTENDED_REPLY = 201


class Code(IntEnum):
    """Status codes that the scheme tells apart."""

    EOF = 1
    NO_SUCH_FILE = 2
    PERMISSION_DENIED = 3


class Channel(Protocol):
    """What is needed of a connected channel. Both calls raise :class:`TimeoutError` when they stall."""

    def sendall(self, data: bytes, /) -> Any: ...

    def recv(self, size: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Attributes:
    """What the server tells of a file; None for what it leaves out. ``mtime`` in Unix seconds."""

    size: int | None
    mode: int | None
    mtime: int | None


@dataclass(frozen=True, slots=True)
class Refusal:
    """A status with which the server answered instead of what was asked for."""

    code: int
    message: str


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file to read.

    :ivar md5: the md5 that it should have, or None if any will do.
    :ivar write: takes the bytes in order, in blocks.
    :ivar key: the caller's own; handed back with the result.
    """

    path: bytes
    md5: bytes | None
    write: Callable[[bytes], object]
    key: Any = None


@dataclass(frozen=True, slots=True)
class Fetched:
    """What became of a :class:`Wanted` file. ``after`` is asked for only if the md5 is not the expected."""

    wanted: Wanted
    md5: bytes
    size: int
    before: Attributes | None
    after: Attributes | None
    refusal: Refusal | None


@dataclass(frozen=True, slots=True)
class Stated:
    """The answer to :meth:`Reader.submit_stat`: attributes, or a refusal."""

    key: Any
    attributes: Attributes | None
    refusal: Refusal | None


class _Transfer:
    """A file on its way."""

    # fmt: off
    __slots__ = ("after", "asked", "before", "checked", "early", "end", "handle", "md5", "pending",
                 "position", "refusal", "wanted")
    # fmt: on

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.handle = b""
        self.md5 = hashlib.md5(usedforsecurity=False)
        self.position = 0  # all bytes before it are hashed and written
        self.early: dict[int, bytes] = {}  # data beyond the position, by offset
        self.asked = 0  # READs are sent for all bytes before it
        self.pending = 0  # FSTAT and READ requests that are not answered yet
        self.end: int | None = None  # where the file ends, once known
        self.before: Attributes | None = None
        self.after: Attributes | None = None
        self.checked = False  # FSTAT was sent a second time
        self.refusal: Refusal | None = None


class Reader:
    """Reads files over one channel. One thread at a time.

    :param channel: a channel on which the SFTP subsystem has just been started.
    :raises ConnectionLost: no SFTP server answers.
    """

    def __init__(self, channel: Channel, *, window: int = WINDOW, max_files: int = MAX_FILES) -> None:
        self._channel = channel
        self._out = bytearray()
        self._in = b""
        self._next_id = 0
        # By request id: what was asked, of which transfer (or with which key), from where, how much.
        self._asked: dict[int, tuple[_Type, Any, int, int]] = {}
        self._hungry: deque[_Transfer] = deque()  # transfers with READs to send
        self._files = 0
        self._claimed = 0  # bytes asked for and not yet processed
        self._results: list[Fetched | Stated] = []
        self._window = window
        self._max_files = max_files
        self._read_size = _DEFAULT_READ
        self.received = 0  # bytes of file contents
        self._handshake()

    # --- the caller's side --------------------------------------------------------------------------

    @property
    def room(self) -> bool:
        """Whether another request can be submitted now."""
        return self._files < self._max_files and self._claimed + self._read_size <= self._window

    @property
    def busy(self) -> bool:
        """Whether results are still to come."""
        return self._files > 0 or bool(self._results)

    def submit(self, wanted: Wanted) -> None:
        """Ask for a file. Its result comes from :meth:`wait`."""
        self._files += 1
        self._claimed += self._read_size
        # pflags READ, no attributes
        body = struct.pack(">I", len(wanted.path)) + wanted.path + b"\0\0\0\1\0\0\0\0"
        self._ask(_Type.OPEN, body, _Transfer(wanted))

    def submit_stat(self, path: bytes, key: Any) -> None:
        """Ask for the attributes of a path, following symlinks. The result comes from :meth:`wait`."""
        self._files += 1
        self._ask(_Type.STAT, struct.pack(">I", len(path)) + path, key)

    def wait(self) -> list[Fetched | Stated]:
        """Return the next results, at least one if any are to come.

        :raises ConnectionLost: the connection broke, stalled, or the server broke the protocol.
        :raises OSError: from a file's ``write``.
        """
        while not self._results and self._files:
            self._send_reads()
            self._flush()
            self._receive()
            self._parse()
        results, self._results = self._results, []
        return results

    # --- requests -----------------------------------------------------------------------------------

    def _ask(self, kind: _Type, body: bytes, subject: Any, offset: int = 0, length: int = 0) -> None:
        self._next_id = number = (self._next_id + 1) & 0xFFFFFFFF
        self._asked[number] = (kind, subject, offset, length)
        self._out += struct.pack(">IBI", 5 + len(body), kind, number)
        self._out += body

    def _ask_fstat(self, transfer: _Transfer) -> None:
        transfer.pending += 1
        self._ask_handle(_Type.FSTAT, transfer)

    def _ask_handle(self, kind: _Type, transfer: _Transfer) -> None:
        self._ask(kind, struct.pack(">I", len(transfer.handle)) + transfer.handle, transfer)

    def _ask_read(self, transfer: _Transfer, offset: int, length: int) -> None:
        handle = transfer.handle
        body = struct.pack(">I", len(handle)) + handle + struct.pack(">QI", offset, length)
        transfer.pending += 1
        self._ask(_Type.READ, body, transfer, offset, length)

    def _send_reads(self) -> None:
        while self._hungry and self._claimed + self._read_size <= self._window:
            transfer = self._hungry[0]
            if transfer.end is None or transfer.asked >= transfer.end or transfer.refusal:
                self._hungry.popleft()
                continue
            length = min(self._read_size, transfer.end - transfer.asked)
            self._ask_read(transfer, transfer.asked, length)
            self._claimed += length
            transfer.asked += length

    def _flush(self) -> None:
        if self._out:
            data, self._out = bytes(self._out), bytearray()
            try:
                self._channel.sendall(data)
            except TimeoutError:
                raise ConnectionLost("the connection stalled: the server takes no more requests") from None
            except (OSError, EOFError) as error:
                raise ConnectionLost(f"the connection broke: {error or type(error).__name__}") from error

    # --- replies ------------------------------------------------------------------------------------

    def _receive(self) -> None:
        try:
            data = self._channel.recv(_RECEIVE)
        except TimeoutError:
            raise ConnectionLost("the connection stalled: no reply from the server in time") from None
        except (OSError, EOFError) as error:
            raise ConnectionLost(f"the connection broke: {error or type(error).__name__}") from error
        if not data:
            raise ConnectionLost("the server closed the connection")
        self._in = self._in + data if self._in else data

    def _packet(self, position: int) -> int | None:
        """Return the end of the packet that begins at ``position``, or None if it is not all there yet."""
        if len(self._in) - position < 4:
            return None
        (length,) = struct.unpack_from(">I", self._in, position)
        if not 5 <= length <= _MAX_PACKET:
            start = to_text(self._in[position : position + 40])
            raise ConnectionLost(
                f"the server does not speak SFTP; it sent {start!r}. Does a login shell print text?"
            )
        end = position + 4 + length
        return end if end <= len(self._in) else None

    def _parse(self) -> None:
        position = 0
        while (end := self._packet(position)) is not None:
            kind, number = struct.unpack_from(">BI", self._in, position + 4)
            try:
                asked = self._asked.pop(number)
            except KeyError:
                raise ConnectionLost("the server answered a request that was never made") from None
            try:
                self._handle(kind, self._in[position + 9 : end], *asked)
            except (struct.error, IndexError):
                raise ConnectionLost("the server sent a malformed packet") from None
            position = end
        self._in = self._in[position:]

    def _handle(self, kind: int, body: bytes, asked: _Type, subject: Any, offset: int, length: int) -> None:
        if asked is _Type.READ:
            self._on_read(kind, body, subject, offset, length)
        elif asked is _Type.OPEN:
            self._on_open(kind, body, subject)
        elif asked is _Type.FSTAT:
            self._on_fstat(kind, body, subject)
        elif asked is _Type.STAT:
            self._files -= 1
            if kind == _Type.ATTRS:
                self._results.append(Stated(subject, _attributes(body), None))
            else:
                self._results.append(Stated(subject, None, _refusal(kind, body)))

    def _on_open(self, kind: int, body: bytes, transfer: _Transfer) -> None:
        if kind != _Type.HANDLE:
            self._claimed -= self._read_size
            transfer.refusal = _refusal(kind, body)
            self._finish(transfer)
            return
        transfer.handle = _string(body, _MAX_HANDLE)
        transfer.asked = self._read_size
        self._ask_fstat(transfer)
        self._ask_read(transfer, 0, self._read_size)

    def _on_fstat(self, kind: int, body: bytes, transfer: _Transfer) -> None:
        transfer.pending -= 1
        attributes = _attributes(body) if kind == _Type.ATTRS else None
        if transfer.checked:
            transfer.after = attributes
        elif attributes is None:
            transfer.refusal = transfer.refusal or _refusal(kind, body)
        else:
            transfer.before = attributes
            if attributes.size is None:
                raise ConnectionLost("the server does not tell the size of a file")
            transfer.end = attributes.size if transfer.end is None else min(attributes.size, transfer.end)
            self._hungry.append(transfer)
        self._advance(transfer)

    def _on_read(self, kind: int, body: bytes, transfer: _Transfer, offset: int, length: int) -> None:
        transfer.pending -= 1
        if kind == _Type.DATA:
            data = _string(body, length)
            if not data:
                raise ConnectionLost("the server sent an empty block")
            self.received += len(data)
            self._take(transfer, offset, data)
            rest, offset = length - len(data), offset + len(data)
            # What came short is asked for again, unless it is known to be the end.
            if rest and (transfer.end is None or offset < transfer.end):
                self._ask_read(transfer, offset, rest)
            else:
                self._claimed -= rest
        else:
            self._claimed -= length
            refusal = _refusal(kind, body)
            if refusal.code == Code.EOF:
                transfer.end = offset if transfer.end is None else min(offset, transfer.end)
            else:
                transfer.refusal = transfer.refusal or refusal
        self._advance(transfer)

    def _take(self, transfer: _Transfer, offset: int, data: bytes) -> None:
        if offset != transfer.position:
            transfer.early[offset] = data
            return
        while data:
            transfer.md5.update(data)
            transfer.wanted.write(data)
            transfer.position += len(data)
            self._claimed -= len(data)
            data = transfer.early.pop(transfer.position, b"")

    def _advance(self, transfer: _Transfer) -> None:
        """End the transfer if nothing more is to come."""
        if transfer.pending:
            return
        if transfer.refusal is None and not transfer.checked:
            if transfer.end is not None and transfer.asked < transfer.end:
                return
            expected = transfer.wanted.md5
            if expected is not None and expected != transfer.md5.hexdigest().encode():
                transfer.checked = True
                self._ask_fstat(transfer)
                return
        self._ask_handle(_Type.CLOSE, transfer)
        self._finish(transfer)

    def _finish(self, transfer: _Transfer) -> None:
        self._files -= 1
        self._claimed -= sum(map(len, transfer.early.values()))  # beyond a hole, so never taken
        md5 = transfer.md5.hexdigest().encode()
        size, before, after = transfer.position, transfer.before, transfer.after
        self._results.append(Fetched(transfer.wanted, md5, size, before, after, transfer.refusal))

    # --- the beginning ------------------------------------------------------------------------------

    def _handshake(self) -> None:
        self._out += struct.pack(">IBI", 5, _Type.INIT, 3)
        kind, body = self._one_packet()
        if kind != _Type.VERSION:
            raise ConnectionLost("the server does not speak SFTP: it did not answer with its version")
        try:
            extensions = _extensions(body)
        except struct.error:
            raise ConnectionLost("the server sent a malformed version packet") from None
        if extensions.get(b"limits@openssh.com") != b"1":
            return
        name = b"limits@openssh.com"
        self._out += struct.pack(">IBII", 9 + len(name), _Type.EXTENDED, 0, len(name)) + name
        kind, body = self._one_packet()
        if kind == _Type.EXTENDED_REPLY and len(body) >= 32:
            _, read_size, _, handles = struct.unpack_from(">QQQQ", body)
            if read_size:
                self._read_size = min(read_size, _MAX_READ)
            if handles:
                self._max_files = max(1, min(self._max_files, handles - 1))

    def _one_packet(self) -> tuple[int, bytes]:
        """Send what is waiting, and return type and body (behind version or id) of the next packet."""
        self._flush()
        while (end := self._packet(0)) is None:
            self._receive()
        kind, body = self._in[4], self._in[9:end]
        self._in = self._in[end:]
        return kind, body


# --- parts of packets -------------------------------------------------------------------------------


def _string(body: bytes, limit: int, position: int = 0) -> bytes:
    (length,) = struct.unpack_from(">I", body, position)
    if length > limit or position + 4 + length > len(body):
        raise ConnectionLost("the server sent more than was asked for, or a broken packet")
    return body[position + 4 : position + 4 + length]


def _extensions(body: bytes) -> dict[bytes, bytes]:
    found = {}
    position = 0
    while position < len(body):
        name = _string(body, _MAX_PACKET, position)
        data = _string(body, _MAX_PACKET, position + 4 + len(name))
        found[name] = data
        position += 8 + len(name) + len(data)
    return found


def _attributes(body: bytes) -> Attributes:
    (flags,) = struct.unpack_from(">I", body)
    position = 4
    size = mode = mtime = None
    if flags & 1:
        (size,) = struct.unpack_from(">Q", body, position)
        position += 8
    if flags & 2:  # owner and group
        position += 8
    if flags & 4:
        (mode,) = struct.unpack_from(">I", body, position)
        position += 4
    if flags & 8:
        _, mtime = struct.unpack_from(">II", body, position)
    return Attributes(size, mode, mtime)


def _refusal(kind: int, body: bytes) -> Refusal:
    if kind != _Type.STATUS:
        raise ConnectionLost(
            f"the server answered with a packet of type {kind} that does not fit the request"
        )
    (code,) = struct.unpack_from(">I", body)
    message = _string(body, _MAX_PACKET, 4)[:200] if len(body) >= 8 else b""
    return Refusal(code, to_text(message) or f"status {code}")
