"""The records of a reader: requested files, transfers in progress, and results."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from airflow_mdbackup.scheme.transfer.sftp_packets import Attributes, Refusal

SMALL = 256 << 10  # files up to this size are kept in memory
EMPTY = memoryview(b"")


class Sink(Protocol):
    """Receives the bytes of a file that is, or may be, larger than :data:`SMALL`."""

    position: int
    """How many bytes it already has from an earlier try."""

    room: int | None
    """The most bytes it accepts if a file turns out longer than its stated size; None: no limit."""

    def write(self, data: bytes | memoryview, /) -> None:
        """Append bytes, which nobody modifies afterwards."""

    def digest(self) -> bytes:
        """Return the md5 of all bytes, in hexadecimal digits."""


class Stream:
    """A sink that hashes the bytes and passes them on."""

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

    :ivar md5: the expected md5, or None to accept any.
    :ivar open: called when the turn of a file larger than :data:`SMALL` comes; returns its sink, or None if
        the file is not wanted after all: then it is refused with :attr:`Code.UNWANTED`.
    :ivar key: anything; returned with the result.
    """

    path: bytes
    md5: bytes | None
    open: Callable[[Attributes], Sink | None]
    key: Any = None


class Fetched(NamedTuple):
    """The result of a :class:`Wanted` file. ``after`` is requested only if the md5 is not the expected one.

    :ivar md5: of the received bytes, in hexadecimal digits.
    :ivar size: received bytes.
    :ivar content: the received bytes of a small file; None if they went to the sink.
    """

    wanted: Wanted
    md5: bytes
    size: int
    before: Attributes | None
    after: Attributes | None
    refusal: Refusal | None
    content: bytes | None = None


class Stated(NamedTuple):
    """The reply to a request for attributes."""

    key: Any
    attributes: Attributes | None
    refusal: Refusal | None


class Memory:
    """The sink of a small file."""

    def __init__(self) -> None:
        self.position = 0
        self.room: int | None = None
        self.content = b""

    def write(self, data: bytes | memoryview) -> None:
        self.content += data

    def digest(self) -> bytes:
        return hashlib.md5(self.content, usedforsecurity=False).hexdigest().encode()


class Early:
    """Data that arrived out of order, by offset.

    Adjacent pieces are joined, so that there are never more of them than READs in flight, however little the
    server sends at a time.
    """

    def __init__(self) -> None:
        self._pieces: dict[int, bytearray] = {}
        self._ends: dict[int, int] = {}  # end of each piece -> its start

    def add(self, offset: int, data: bytes | memoryview) -> None:
        start = self._ends.pop(offset, None)
        if start is None:
            start = offset
            # A copy: a slice would keep everything that arrived with it in memory.
            self._pieces[start] = bytearray(data)
        else:
            self._pieces[start] += data
        self._ends[offset + len(data)] = start

    def pop(self, offset: int) -> memoryview:
        """Remove and return the piece that starts at ``offset``; empty if there is none."""
        data = self._pieces.pop(offset, None)
        if data is None:
            return EMPTY
        del self._ends[offset + len(data)]
        return memoryview(data)

    def pop_all(self) -> list[tuple[int, memoryview]]:
        """Remove and return all pieces, in order."""
        pieces, self._pieces, self._ends = sorted(self._pieces.items()), {}, {}
        return [(offset, memoryview(data)) for offset, data in pieces]

    @property
    def size(self) -> int:
        return sum(map(len, self._pieces.values()))


class Transfer:
    """A file in progress."""

    # fmt: off
    __slots__ = ("after", "asked", "before", "digest", "early", "end", "failed", "handle", "is_at_end",
                 "is_large", "is_last", "pending", "position", "refusal", "sink", "tries", "wanted")
    # fmt: on

    def __init__(self, wanted: Wanted, *, is_last: bool = False) -> None:
        self.wanted = wanted
        self.is_last = is_last  # whether this is the last try
        self.tries = 0  # refused attempts to open it
        self.handle = b""  # with its length in front, as in requests
        self.is_large: bool | None = None  # once the size is known
        self.sink: Sink | None = None  # of a large file, once its turn has come
        self.position = 0  # all bytes before it are in the sink
        self.early: Early | None = None  # data beyond the position that arrived early
        self.asked = 0  # all bytes before it have been requested
        self.pending = 0  # unanswered FSTAT and READ requests
        self.end: int | None = None  # where the file ends, once known
        self.is_at_end = False  # whether the server itself has reported EOF
        self.before: Attributes | None = None
        self.after: Attributes | None = None
        self.digest: bytes | None = None  # once all bytes are there; a second FSTAT may follow
        self.failed: set[int] = set()  # offsets at which a READ has failed before
        self.refusal: Refusal | None = None
