"""A pipelined, read-only SFTP client: many files in flight on one channel, md5 in byte order on the way.

The index names the files, so that nothing is listed and nothing is asked twice::

    for each file wanted, while there is room:   send OPEN
    HANDLE arrives:      send FSTAT and the first READ together
    ATTRS arrive:        a small file is collected in memory; a large one waits for its turn, and then gets a
                         sink, which may have its beginning already
    as the window allows:  send READs for the rest, file by file
    DATA arrive:         hand on what continues the file, keep what came early, ask for what came short
    all bytes are there: md5 as expected, or else FSTAT once more, to tell a file that changed from a bad one
                         send CLOSE, hand out the result

Servers differ, and what one of them does not do is done in another way::

    OPEN fails while others are open     fewer files are in flight from now on, and it is asked again
    OPEN fails, or a READ twice          the file is tried once more when nothing else is on its way
    FSTAT fails, or tells no size        STAT by name is asked, or else the file is read to its end
    the md5 is wrong, and FSTAT tells    the file is read on behind what was said to be its end
    the same size again

Memory is bounded by ``window``, the bytes asked for and not yet processed. It works with an account that is
cut down to ``internal-sftp -R -p open,close,read,fstat,stat,lstat,realpath,limits``.

A server may be slow, but not without end: the channel ends a silence, and the reader ends a trickle, which is
less than 1 KiB in all the time that we are patient.

What this does not give: after :class:`ConnectionLost` the reader is of no more use. A server that opens a
named pipe waits for its other end, with all other files; who fears that there is one asks for attributes
first. How long requests may take to be sent is the channel's to limit.

Sources: draft-ietf-secsh-filexfer-02 (SFTP version 3), OpenSSH ``PROTOCOL`` section 4.8 (limits@openssh.com).
"""

from __future__ import annotations

import hashlib
import stat
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

from airflow_mdbackup.scheme.errors import ConnectionLost
from airflow_mdbackup.scheme.names import to_text

WINDOW = 32 << 20  # bytes asked for at a time, and at most so many held in memory
SMALL = 256 << 10  # up to this size a file is collected in memory
_MAX_FILES = 128  # in flight, unless the server tells how many it can have open
_TRIES = 3  # to open a file while others are open
_MOST_LAST = 256  # files that wait for their last try
_DEPTH = 4  # READs in flight for a file whose size is not known
_MOST_FILES = 1000  # in flight, whatever it tells: what fills a line of 20 ms with small files
_MOST_CLOSING = 100_000  # CLOSE requests without an answer, which nothing else bounds
_RECEIVE = 1 << 20
_LITTLE = 64 << 10  # bytes that are little to receive at once
_LEAST = 1 << 10  # bytes that are too few for all the time that we are patient
PATIENCE = 300.0  # seconds
_MOMENT = 0.001  # seconds
# OpenSSH sends at most 256 KiB. A server may answer with less than asked for, never with more.
_MAX_PACKET = (256 << 10) + 1024
_DEFAULT_READ = 32 << 10  # what every server must be able to send
_MAX_READ = 255 << 10
_FIRST = 32 << 10  # asked for before the size is known
_MAX_HANDLE = 256
_HEAD = struct.Struct(">IBI").pack  # length, type, id
_LENGTH = struct.Struct(">I").unpack_from
_KIND = struct.Struct(">BI").unpack_from  # type, id
_READ = struct.Struct(">QI").pack
_ATTRIBUTES = struct.Struct(">IQIIIII").unpack_from  # flags, size, owner, group, mode, atime, mtime
_EMPTY = memoryview(b"")
_NOTHING = b"d41d8cd98f00b204e9800998ecf8427e"  # the md5 of no bytes
_SPECIAL = {
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symlink",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a device",
    stat.S_IFCHR: "a device",
}


class _Type:
    """Types of packets. Plain numbers, since they are compared by the million."""

    INIT = 1
    VERSION = 2
    OPEN = 3
    CLOSE = 4
    READ = 5
    FSTAT = 8
    REALPATH = 16
    STAT = 17
    STATUS = 101
    HANDLE = 102
    DATA = 103
    ATTRS = 105
    EXTENDED = 200
    EXTENDED_REPLY = 201


class Code(IntEnum):
    """Status codes that the scheme tells apart; those below zero are no server's, but our own."""

    UNWANTED = -1
    SPECIAL = -2  # a directory, named pipe, socket or device
    TOO_LONG = -3  # it goes on behind what the sink takes
    EOF = 1
    NO_SUCH_FILE = 2
    PERMISSION_DENIED = 3
    FAILURE = 4
    UNSUPPORTED = 8


class Channel(Protocol):
    """What is needed of a connected channel. Both calls raise :class:`TimeoutError` when they stall."""

    def sendall(self, data: bytes, /) -> Any: ...

    def recv(self, size: int, /) -> bytes: ...


class NoSftp(ConnectionLost):
    """The server does not speak SFTP.

    :ivar sent: what it sent instead.
    """

    def __init__(self, sent: bytes) -> None:
        self.sent = sent
        super().__init__(
            f"the server does not speak SFTP; it sent {to_text(sent)!r}. Does a login shell print text?"
        )


class Attributes(NamedTuple):
    """What the server tells of a file; None for what it leaves out. ``mtime`` in Unix seconds."""

    size: int | None
    mode: int | None
    mtime: int | None


class Refusal(NamedTuple):
    """A status with which the server answered instead of what was asked for."""

    code: int
    message: str


class Sink(Protocol):
    """Where the bytes of a file go that is larger than :data:`SMALL`, or may be."""

    position: int
    """How many bytes are there already, from an earlier try."""

    room: int | None
    """How many bytes it takes of a file that goes on behind the size that was told, if any; None: all."""

    def write(self, data: bytes | memoryview, /) -> None:
        """Take the bytes that follow. They do not change afterwards."""

    def digest(self) -> bytes:
        """Return the md5 of all bytes, in hexadecimal digits."""


class Stream:
    """A sink that hashes what it passes on."""

    def __init__(self, write: Callable[[bytes | memoryview], object]) -> None:
        self.position = 0
        self.room: int | None = None
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._write = write

    def write(self, data: bytes | memoryview) -> None:
        self._md5.update(data)
        self._write(data)

    def digest(self) -> bytes:
        return self._md5.hexdigest().encode()


class Wanted(NamedTuple):
    """A file to read.

    :ivar md5: the md5 that it should have, or None if any will do.
    :ivar open: called when it is the turn of a file that is larger than :data:`SMALL`; returns where it
        goes, or None if it is not wanted after all: then it is refused with :attr:`Code.UNWANTED`.
    :ivar key: the caller's own; handed back with the result.
    """

    path: bytes
    md5: bytes | None
    open: Callable[[Attributes], Sink | None]
    key: Any = None


class Fetched(NamedTuple):
    """What became of a :class:`Wanted` file. ``after`` is asked for only if the md5 is not the expected.

    :ivar md5: of the bytes that came, in hexadecimal digits.
    :ivar content: all that came of a small file; None if it went to the sink.
    """

    wanted: Wanted
    md5: bytes
    size: int
    before: Attributes | None
    after: Attributes | None
    refusal: Refusal | None
    content: bytes | None = None


class Stated(NamedTuple):
    """The answer to a request for attributes."""

    key: Any
    attributes: Attributes | None
    refusal: Refusal | None


class _Memory:
    """The sink of a small file."""

    def __init__(self) -> None:
        self.position = 0
        self.room: int | None = None
        self.content = b""

    def write(self, data: bytes | memoryview) -> None:
        self.content += data

    def digest(self) -> bytes:
        return hashlib.md5(self.content, usedforsecurity=False).hexdigest().encode()


class _Early:
    """Data that came before what stands in front of it, by offset.

    Pieces that follow one another are one, so that there are no more of them than READs in flight, however
    little the server sends at a time.
    """

    def __init__(self) -> None:
        self._pieces: dict[int, bytearray] = {}
        self._ends: dict[int, int] = {}  # where pieces end, and begin

    def add(self, offset: int, data: bytes | memoryview) -> None:
        start = self._ends.pop(offset, None)
        if start is None:
            start = offset
            # A copy, since a part would keep all that arrived with it in memory.
            self._pieces[start] = bytearray(data)
        else:
            self._pieces[start] += data
        self._ends[offset + len(data)] = start

    def pop(self, offset: int) -> memoryview:
        """Take out what begins at ``offset``; empty if nothing does."""
        data = self._pieces.pop(offset, None)
        if data is None:
            return _EMPTY
        del self._ends[offset + len(data)]
        return memoryview(data)

    def pop_all(self) -> list[tuple[int, memoryview]]:
        """Take out everything, in order."""
        pieces, self._pieces, self._ends = sorted(self._pieces.items()), {}, {}
        return [(offset, memoryview(data)) for offset, data in pieces]

    @property
    def size(self) -> int:
        return sum(map(len, self._pieces.values()))


class _Transfer:
    """A file on its way."""

    # fmt: off
    __slots__ = ("after", "asked", "before", "digest", "early", "end", "failed", "handle", "is_at_end",
                 "is_large", "is_last", "pending", "position", "refusal", "sink", "tries", "wanted")
    # fmt: on

    def __init__(self, wanted: Wanted, *, is_last: bool = False) -> None:
        self.wanted = wanted
        self.is_last = is_last  # whether no further try follows this one
        self.tries = 0  # to open it, which were refused
        self.handle = b""  # with its length in front, as requests have it
        self.is_large: bool | None = None  # once the size is known
        self.sink: Sink | None = None  # of a large file when it is its turn
        self.position = 0  # all bytes before it went to the sink
        self.early: _Early | None = None  # data beyond the position
        self.asked = 0  # READs are sent for all bytes before it
        self.pending = 0  # FSTAT and READ requests that are not answered yet
        self.end: int | None = None  # where the file ends, once known
        self.is_at_end = False  # whether the server itself has said so
        self.before: Attributes | None = None
        self.after: Attributes | None = None
        self.digest: bytes | None = None  # once all bytes are there; then FSTAT is sent a second time
        self.failed: set[int] = set()  # offsets at which a READ has failed once
        self.refusal: Refusal | None = None


class Reader:
    """Reads files over one channel. One thread at a time.

    :param channel: a channel on which the SFTP subsystem has just been started.
    :param window: bytes asked for and not yet processed, at least 1 MiB. A channel's own should be larger.
    :param throttle: called with the number of bytes received, each time; waits as long as a limit says, and
        returns the bytes per second that hold now, or None for no limit.
    :param patience: seconds of waiting in which at least 1 KiB must come; several times as long as the
        channel may be silent. What the throttle, the disk and the caller take does not count.
    :param clock: tells seconds.
    :raises ConnectionLost: no SFTP server answers.
    """

    def __init__(
        self,
        channel: Channel,
        *,
        window: int = WINDOW,
        throttle: Callable[[int], int | None] | None = None,
        patience: float = PATIENCE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.throttle = throttle
        self._channel = channel
        self._patience = patience
        self._clock = clock
        self._waited = 0.0  # seconds for the server, since it was last judged
        self._brought = 0  # bytes that came in them
        self._out = bytearray()
        self._in: list[bytes] = []  # what has arrived and is not parsed
        self._arrived = 0  # bytes of it
        self._needed = 4  # bytes of it with which the next packet is whole, as far as is known
        self._next_id = 0
        # By request id: who takes the answer, of which transfer (or key), from where, how much was asked.
        self._asked: dict[int, tuple[Callable[..., None], Any, int, int]] = {}
        self._fresh: deque[_Transfer] = deque()  # transfers whose first READ is to be sent
        self._hungry: deque[_Transfer] = deque()  # transfers whose size is known, with READs to send
        self._files = 0
        self._again: deque[_Transfer] = deque()  # could not be opened while others were open
        self._last: deque[_Transfer] = deque()  # failed, and have another try when nothing else is on its way
        self._held = 0  # handles that the server has given and not said to have taken back
        self._opened = 0  # files, since the number of those in flight changed
        self._closing = 0  # CLOSE requests that are not answered yet
        self._claimed = 0  # bytes asked for and not yet processed
        self._results: list[Fetched | Stated] = []
        self._coming = 0  # bytes asked for and not yet answered
        self._window = max(window, 4 * SMALL)
        self._ahead = self._window  # bytes that may be coming; fewer under a limit
        self._portion = _RECEIVE  # bytes to receive at once, likewise
        self._allowed = _MAX_FILES  # files in flight, until the server refuses one
        self._max_files = self._allowed
        self._read_size = _DEFAULT_READ
        self.received = 0  # bytes of file contents
        self._little = False  # whether there was little to receive the last time
        self.round_trip = 0.0  # seconds from a request to its answer
        self._handshake()

    # --- the caller's side --------------------------------------------------------------------------

    @property
    def room(self) -> bool:
        """Whether another request can be submitted now."""
        if len(self._last) >= _MOST_LAST:
            return False
        is_free = self._max_files == self._allowed or self._held < self._max_files
        return is_free and self._files - len(self._last) < self._max_files

    @property
    def busy(self) -> bool:
        """Whether results are still to come."""
        return self._files > 0 or bool(self._results)

    def submit(self, wanted: Wanted) -> None:
        """Ask for a file. Its result comes from :meth:`wait`."""
        self._files += 1
        self._ask_open(_Transfer(wanted))

    def submit_stat(self, path: bytes, key: Any) -> None:
        """Ask for the attributes of a file, following symlinks. The result comes from :meth:`wait`.

        What is no regular file is refused with :attr:`Code.SPECIAL`.
        """
        self._files += 1
        self._ask(_Type.STAT, _packed(path), self._on_stat, key)

    def wait(self) -> list[Fetched | Stated]:
        """Return the next results, at least one if any are to come.

        :raises ConnectionLost: the connection broke, stalled, or the server broke the protocol.
        :raises OSError: from a file's sink, or the throttle.
        """
        while self._files and not self._results:
            self._turn()
        results, self._results = self._results, []
        return results

    def take_turn(self) -> list[Fetched | Stated]:
        """Send and receive once, and return what results that gives; see :meth:`wait`.

        With large files it may take hours to the next result.
        """
        if self._files and not self._results:
            self._turn()
        results, self._results = self._results, []
        return results

    def _turn(self) -> None:
        if self._closing > _MOST_CLOSING:
            raise ConnectionLost("the server does not answer that it closes files")
        self._try_again()
        self._send_reads()
        self._flush()
        if not self._results:
            self._receive()
            self._parse()

    # --- requests -----------------------------------------------------------------------------------

    def _ask(
        self,
        kind: int,
        body: bytes,
        answer: Callable[..., None],
        subject: Any,
        offset: int = 0,
        length: int = 0,
    ) -> None:
        self._next_id = number = (self._next_id + 1) & 0xFFFFFFFF
        self._asked[number] = (answer, subject, offset, length)
        self._out += _HEAD(5 + len(body), kind, number)
        self._out += body

    def _ask_open(self, transfer: _Transfer) -> None:
        # pflags READ, no attributes
        self._ask(_Type.OPEN, _packed(transfer.wanted.path) + b"\0\0\0\1\0\0\0\0", self._on_open, transfer)

    def _try_again(self) -> None:
        """Open files again that were refused, as far as fewer are open now."""
        on_their_way = self._files - len(self._again) - len(self._last)
        while self._again and max(on_their_way, self._held) < self._max_files:
            self._ask_open(self._again.popleft())
            on_their_way += 1
        if self._last and not on_their_way and not self._held:
            self._ask_open(self._last.popleft())

    def _ask_fstat(self, transfer: _Transfer) -> None:
        transfer.pending += 1
        self._ask(_Type.FSTAT, transfer.handle, self._on_fstat, transfer)

    def _ask_read(self, transfer: _Transfer, offset: int, length: int) -> None:
        transfer.pending += 1
        self._claimed += length
        self._coming += length
        body = transfer.handle + _READ(offset, length)
        self._ask(_Type.READ, body, self._on_read, transfer, offset, length)

    def _send_reads(self) -> None:
        """Send READs for as much as the window takes.

        First READs take no more than half of it, so that what they bring, and wait with for the rest of its
        file, never keeps that rest from being asked for.
        """
        while self._hungry and self._coming < self._ahead and self._claimed + self._read_size <= self._window:
            transfer = self._hungry[0]
            if transfer.is_large and transfer.sink is None and transfer.refusal is None:
                self._open_sink(transfer)
            if transfer.end is None and transfer.refusal is None:
                room = transfer.sink.room if transfer.sink is not None else None
                if room is not None and transfer.asked > room:
                    transfer.refusal = Refusal(Code.TOO_LONG, "it goes on and on")
                    self._advance(transfer)
                if transfer.pending >= _DEPTH:
                    break  # it may end anywhere
            rest = self._read_size if transfer.end is None else transfer.end - transfer.asked
            length = min(self._read_size, self._ahead, rest)
            if length <= 0 or transfer.refusal:
                self._hungry.popleft()
                continue
            self._ask_read(transfer, transfer.asked, length)
            transfer.asked += length
        while self._fresh:
            transfer = self._fresh[0]
            if transfer.before is None and transfer.refusal is None:
                if self._coming >= self._ahead or self._claimed + _FIRST > self._window // 2:
                    break
                transfer.asked = _FIRST
                self._ask_read(transfer, 0, _FIRST)
            # Else its size came first, and it went on with that.
            self._fresh.popleft()

    def _open_sink(self, transfer: _Transfer) -> None:
        """Give a large file its sink, and that what has come of it."""
        assert transfer.before is not None
        transfer.sink = transfer.wanted.open(transfer.before)
        if transfer.sink is None:
            transfer.refusal = Refusal(Code.UNWANTED, "not wanted")
        else:
            transfer.position = transfer.sink.position
            transfer.asked = max(transfer.asked, transfer.position)
            self._take_early(transfer)
        self._advance(transfer)  # if the sink has all of it already

    def _flush(self) -> None:
        if self._out:
            data, self._out = bytes(self._out), bytearray()
            try:
                self._channel.sendall(data)
            except TimeoutError:
                raise ConnectionLost("the connection stalled: the server takes no more requests") from None
            except (OSError, EOFError) as error:
                raise ConnectionLost(f"the connection broke: {str(error) or type(error).__name__}") from error

    # --- replies ------------------------------------------------------------------------------------

    def _receive(self) -> None:
        """Take in what has arrived, until it is at least one whole packet."""
        if self._little and self._files > self._max_files // 2:
            # Many are on their way, so that a moment's wait costs nothing and brings more of them at once.
            time.sleep(_MOMENT)
        while True:
            began = self._clock()
            try:
                data = self._channel.recv(self._portion)
            except TimeoutError:
                raise ConnectionLost("the connection stalled: no reply from the server in time") from None
            except (OSError, EOFError) as error:
                raise ConnectionLost(f"the connection broke: {str(error) or type(error).__name__}") from error
            if not data:
                raise ConnectionLost("the server closed the connection")
            self._judge_pace(self._clock() - began, len(data))
            self._in.append(data)
            self._arrived += len(data)
            self._little = len(data) < _LITTLE
            if self.throttle is not None:
                self._keep_to(self.throttle(len(data)))
            if self._arrived >= self._needed:
                return

    def _judge_pace(self, seconds: float, size: int) -> None:
        """Give up a server that sends a byte now and then, and so is never silent for long."""
        self._waited += seconds
        self._brought += size
        if self._waited < self._patience:
            return
        if self._brought < _LEAST:
            raise ConnectionLost(
                f"the connection stalled: only {self._brought} bytes came while we waited for "
                f"{self._waited:.0f} s"
            )
        self._waited, self._brought = 0.0, 0

    def _keep_to(self, rate: int | None) -> None:
        """Under a limit, ask for half a second's worth ahead, and receive it little by little."""
        if rate is None:
            self._ahead, self._portion = self._window, _RECEIVE
        else:
            self._ahead, self._portion = max(rate // 2, _FIRST), min(max(rate // 32, 4096), _RECEIVE)

    def _packets(self) -> Iterator[tuple[int, int, memoryview]]:
        """Yield type, id and body of each whole packet that has arrived."""
        data = self._in[0] if len(self._in) == 1 else b"".join(self._in)
        view = memoryview(data)
        position, size = 0, len(data)
        self._needed = 4
        try:
            while size - position >= 4:
                (length,) = _LENGTH(data, position)
                if not 5 <= length <= _MAX_PACKET:
                    raise NoSftp(data[position : position + 40])
                start, position = position, position + 4 + length
                if position > size:
                    self._needed, position = 4 + length, start
                    break
                kind, number = _KIND(data, start + 4)
                yield kind, number, view[start + 9 : position]
        finally:
            self._in = [data[position:]]
            self._arrived = size - position

    def _parse(self) -> None:
        for kind, number, body in self._packets():
            try:
                answer, subject, offset, length = self._asked.pop(number)
            except KeyError:
                raise ConnectionLost("the server answered a request that was never made") from None
            try:
                answer(kind, body, subject, offset, length)
            except (struct.error, IndexError):
                raise ConnectionLost("the server sent a malformed packet") from None

    def _on_stat(self, kind: int, body: memoryview, key: Any, *_: int) -> None:
        self._files -= 1
        if kind != _Type.ATTRS:
            refusal = _refusal(kind, body)
            unknown = Attributes(None, None, None) if refusal.code == Code.UNSUPPORTED else None
            self._results.append(Stated(key, unknown, None if unknown else refusal))
            return
        attributes = _attributes(body)
        special = _special(attributes)
        self._results.append(Stated(key, None if special else attributes, special))

    def _on_open(self, kind: int, body: memoryview, transfer: _Transfer, *_: int) -> None:
        if kind != _Type.HANDLE:
            self._on_not_opened(transfer, _refusal(kind, body))
            return
        self._held += 1
        self._opened += 1
        if self._max_files < self._allowed and self._opened >= self._max_files:
            self._opened, self._max_files = 0, self._max_files + 1
        transfer.handle = bytes(body[: 4 + len(_string(body, _MAX_HANDLE))])
        self._ask_fstat(transfer)
        free = self._coming < self._ahead and self._claimed + _FIRST <= self._window // 2
        if free and not self._fresh:
            transfer.asked = _FIRST
            self._ask_read(transfer, 0, _FIRST)
        else:
            self._fresh.append(transfer)

    def _on_not_opened(self, transfer: _Transfer, refusal: Refusal) -> None:
        transfer.tries += 1
        if refusal.code == Code.FAILURE and self._held and transfer.tries <= _TRIES:
            # As many as are open may be all that it allows. One more is tried after each round of them, since
            # the reason may have been another one.
            self._opened, self._max_files = 0, min(self._max_files, self._held)
            self._again.append(transfer)
        else:
            transfer.refusal = refusal
            self._end(transfer)

    def _on_fstat(self, kind: int, body: memoryview, transfer: _Transfer, by_name: int, _: int) -> None:
        transfer.pending -= 1
        attributes = _attributes(body) if kind == _Type.ATTRS else None
        if attributes is None:
            _refusal(kind, body)  # if it is one
        if (attributes is None or attributes.size is None) and not by_name:
            transfer.pending += 1
            self._ask(_Type.STAT, _packed(transfer.wanted.path), self._on_fstat, transfer, True)
            return
        attributes = attributes or Attributes(None, None, None)
        if transfer.digest is not None:
            transfer.after = attributes
        elif special := _special(attributes):
            transfer.refusal = special  # it says more than what a read of it was answered with
        else:
            self._on_size(transfer, attributes)
        self._advance(transfer)

    def _on_size(self, transfer: _Transfer, attributes: Attributes) -> None:
        """Have a transfer go on, now that its size is known, or known not to be told."""
        transfer.before = attributes
        if attributes.size is not None:
            transfer.end = attributes.size if transfer.end is None else min(attributes.size, transfer.end)
        if transfer.end is not None:
            self._on_end(transfer)
        elif not transfer.pending and transfer.refusal is None:
            self._ask_on(transfer)

    def _on_end(self, transfer: _Transfer) -> None:
        """Have a transfer go on, now that it is known where it ends."""
        assert transfer.end is not None
        transfer.is_large = transfer.end > SMALL
        if transfer.early and not transfer.is_large:
            self._take_early(transfer)
        if transfer.asked < transfer.end:
            self._hungry.append(transfer)

    def _ask_on(self, transfer: _Transfer) -> None:
        """Ask for what follows of a file whose end is not known."""
        if transfer.asked < SMALL and not transfer.is_large:  # it may be a small one
            self._ask_read(transfer, transfer.asked, self._read_size)
            transfer.asked += self._read_size
        elif not transfer.is_large:
            transfer.is_large = True
            self._hungry.append(transfer)

    def _on_read(self, kind: int, body: memoryview, transfer: _Transfer, offset: int, length: int) -> None:
        transfer.pending -= 1
        self._coming -= length
        if kind == _Type.DATA:
            (size,) = _LENGTH(body)
            if size > length or size + 4 > len(body):
                raise ConnectionLost("the server sent more than was asked for, or a broken packet")
            if not size:
                self._on_eof(transfer, offset, length)
                return
            self.received += size
            if size == transfer.end and not transfer.pending and not offset and transfer.sink is None:
                self._on_whole(transfer, bytes(body[4 : 4 + size]), length)
                return
            self._take(transfer, offset, body[4 : 4 + size])
            rest, offset = length - size, offset + size
            self._claimed -= rest
            # What came short is asked for again, unless it is known to be the end.
            if rest and (transfer.end is None or offset < transfer.end):
                self._ask_read(transfer, offset, rest)
            elif transfer.end is None and transfer.before is not None and not transfer.pending:
                self._ask_on(transfer)
        else:
            refusal = _refusal(kind, body)
            if refusal.code == Code.EOF:
                self._on_eof(transfer, offset, length)
                return
            self._claimed -= length
            if refusal.code == Code.FAILURE and offset not in transfer.failed and transfer.refusal is None:
                transfer.failed.add(offset)
                self._ask_read(transfer, offset, length)
                return
            transfer.refusal = transfer.refusal or refusal
        self._advance(transfer)

    def _on_eof(self, transfer: _Transfer, offset: int, claimed: int) -> None:
        """Note that a file has nothing from this offset on."""
        self._claimed -= claimed
        transfer.is_at_end = True
        was_known = transfer.end is not None
        transfer.end = offset if transfer.end is None else min(offset, transfer.end)
        if not was_known and transfer.before is not None and not transfer.is_large:
            self._on_end(transfer)
        self._advance(transfer)

    def _on_whole(self, transfer: _Transfer, content: bytes, claimed: int) -> None:
        """End a transfer that came in one piece, as most do: the short way to what the rest of us does."""
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest().encode()
        self._claimed -= claimed
        if md5 != transfer.wanted.md5:
            self._claimed += len(content)
            self._take(transfer, 0, content)
            self._advance(transfer)
            return
        self._files -= 1
        self._close(transfer)
        self._results.append(
            Fetched(transfer.wanted, md5, len(content), transfer.before, None, transfer.refusal, content)
        )

    def _take(self, transfer: _Transfer, offset: int, data: bytes | memoryview) -> None:
        """Hand on what continues the file, and keep what is beyond."""
        sink, position, early = transfer.sink, transfer.position, transfer.early
        if sink is None and transfer.is_large is False:
            sink = transfer.sink = _Memory()
        if sink is None or offset > position:
            if early is None:
                early = transfer.early = _Early()
            early.add(offset, data)
            return
        while data:
            if type(sink) is not _Memory:  # what is in memory stays claimed
                self._claimed -= len(data)
            if offset < position:  # the sink has its beginning already
                data = data[position - offset :]
            if data:
                sink.write(data)
            transfer.position = offset = position = position + len(data)
            data = early.pop(position) if early else _EMPTY

    def _take_early(self, transfer: _Transfer) -> None:
        """Hand on what came before there was a sink."""
        for offset, data in transfer.early.pop_all() if transfer.early else ():
            self._take(transfer, offset, data)

    def _advance(self, transfer: _Transfer) -> None:
        """End the transfer if nothing more is to come."""
        if transfer.pending:
            return
        if transfer.refusal is None and transfer.digest is None:
            if transfer.end is None or transfer.asked < transfer.end:
                return
            if transfer.sink is None:  # empty; or shorter than it was said to be, and here before its turn
                transfer.sink = _Memory()
                self._take_early(transfer)
            transfer.digest = transfer.sink.digest()
            expected = transfer.wanted.md5
            if expected is not None and expected != transfer.digest:
                self._ask_fstat(transfer)
                return
        if self._reads_on(transfer):
            return
        self._close(transfer)
        self._end(transfer)

    def _reads_on(self, transfer: _Transfer) -> bool:
        """Read on behind what was said to be the end of a file, if that may be why its md5 is wrong."""
        if transfer.refusal is not None or transfer.is_at_end or transfer.digest == transfer.wanted.md5:
            return False
        assert transfer.before is not None
        if transfer.after is not None and transfer.after.size not in (None, transfer.before.size):
            return False  # it has changed meanwhile
        transfer.digest = transfer.after = transfer.end = None
        transfer.asked = transfer.position
        if isinstance(transfer.sink, _Memory):  # where it may not stay
            transfer.early = _Early()
            transfer.early.add(0, transfer.sink.content)
            transfer.sink, transfer.position, transfer.is_large = None, 0, None
        if transfer.is_large:
            self._hungry.append(transfer)
        else:
            self._ask_on(transfer)
        return True

    def _close(self, transfer: _Transfer) -> None:
        self._closing += 1
        self._ask(_Type.CLOSE, transfer.handle, self._on_closed, None)

    def _on_closed(self, *_: Any) -> None:
        self._closing -= 1
        self._held -= 1

    def _end(self, transfer: _Transfer) -> None:
        """Hand out what became of a transfer, or have it tried once more."""
        failed = transfer.refusal is not None and transfer.refusal.code == Code.FAILURE
        if failed and not transfer.is_last:
            self._give_back(transfer)
            self._last.append(_Transfer(transfer.wanted, is_last=True))
        else:
            self._finish(transfer)

    def _finish(self, transfer: _Transfer) -> None:
        self._files -= 1
        content = self._give_back(transfer)
        md5, size = transfer.digest or _NOTHING, transfer.position
        told = transfer.before, transfer.after, transfer.refusal
        self._results.append(Fetched(transfer.wanted, md5, size, *told, content))

    def _give_back(self, transfer: _Transfer) -> bytes | None:
        """Let go of what a transfer has in memory, and return that if it is a small file."""
        if transfer.early:
            self._claimed -= transfer.early.size  # beyond a hole, or there was no sink
        if not isinstance(transfer.sink, _Memory):
            return None
        self._claimed -= len(transfer.sink.content)
        return transfer.sink.content

    # --- the beginning ------------------------------------------------------------------------------

    def _handshake(self) -> None:
        self._out += _HEAD(5, _Type.INIT, 3)
        kind, body = self._one_packet()
        if kind != _Type.VERSION:
            raise ConnectionLost("the server does not speak SFTP: it did not answer with its version")
        try:
            extensions = _extensions(body)
        except struct.error:
            raise ConnectionLost("the server sent a malformed version packet") from None
        name, request = b"limits@openssh.com", _Type.EXTENDED
        if extensions.get(name) != b"1":
            # For the time that its answer takes, whatever that is: VERSION may have waited for a login.
            name, request = b".", _Type.REALPATH
        self._out += struct.pack(">IBII", 9 + len(name), request, 0, len(name)) + name
        kind, body = self._one_packet()
        if kind == _Type.EXTENDED_REPLY and len(body) >= 32:
            _, read_size, _, handles = struct.unpack_from(">QQQQ", body)
            # Less than what every server must be able to send would only mean more requests in flight.
            self._read_size = max(_DEFAULT_READ, min(read_size, _MAX_READ))
            if handles:
                self._allowed = self._max_files = max(1, min(_MOST_FILES, handles - 1))

    def _one_packet(self) -> tuple[int, memoryview]:
        """Send what is waiting, and return type and body (behind version or id) of the next packet."""
        asked = time.monotonic()
        self._flush()
        while True:
            self._receive()
            for kind, _, body in self._packets():
                self.round_trip = time.monotonic() - asked
                return kind, body


# --- parts of packets -------------------------------------------------------------------------------


def _packed(text: bytes) -> bytes:
    return len(text).to_bytes(4, "big") + text


def _string(body: memoryview, limit: int, position: int = 0) -> bytes:
    (length,) = struct.unpack_from(">I", body, position)
    if length > limit or position + 4 + length > len(body):
        raise ConnectionLost("the server sent more than was asked for, or a broken packet")
    return bytes(body[position + 4 : position + 4 + length])


def _extensions(body: memoryview) -> dict[bytes, bytes]:
    found = {}
    position = 0
    while position < len(body):
        name = _string(body, _MAX_PACKET, position)
        data = _string(body, _MAX_PACKET, position + 4 + len(name))
        found[name] = data
        position += 8 + len(name) + len(data)
    return found


def _attributes(body: memoryview) -> Attributes:
    (flags,) = _LENGTH(body)
    if flags & 15 == 15:  # all that we ask of it, as OpenSSH sends it
        _, size, _, _, mode, _, mtime = _ATTRIBUTES(body)
        return Attributes(size, mode, mtime)
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


def _special(attributes: Attributes) -> Refusal | None:
    """Return a refusal of what is there but is no regular file, as far as the server tells."""
    what = _SPECIAL.get(stat.S_IFMT(attributes.mode or 0))
    return Refusal(Code.SPECIAL, f"not a regular file but {what}") if what else None


def _refusal(kind: int, body: memoryview) -> Refusal:
    if kind != _Type.STATUS:
        raise ConnectionLost(
            f"the server answered with a packet of type {kind} that does not fit the request"
        )
    (code,) = struct.unpack_from(">I", body)
    message = _string(body, _MAX_PACKET, 4)[:200] if len(body) >= 8 else b""
    return Refusal(code, to_text(message) or f"status {code}")
