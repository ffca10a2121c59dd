"""Files that a reader is asked for, on their way, and what became of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from airflow_mdbackup.scheme.transfer.sftp_packets import Attributes, Refusal

SMALL = 256 << 10  # up to this size a file is collected in memory
EMPTY = memoryview(b"")


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
            return EMPTY
        del self._ends[offset + len(data)]
        return memoryview(data)

    def pop_all(self) -> list[tuple[int, memoryview]]:
        """Take out everything, in order."""
        pieces, self._pieces, self._ends = sorted(self._pieces.items()), {}, {}
        return [(offset, memoryview(data)) for offset, data in pieces]

    @property
    def size(self) -> int:
        return sum(map(len, self._pieces.values()))


class Transfer:
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
        self.early: Early | None = None  # data beyond the position
        self.asked = 0  # READs are sent for all bytes before it
        self.pending = 0  # FSTAT and READ requests that are not answered yet
        self.end: int | None = None  # where the file ends, once known
        self.is_at_end = False  # whether the server itself has said so
        self.before: Attributes | None = None
        self.after: Attributes | None = None
        self.digest: bytes | None = None  # once all bytes are there; then FSTAT is sent a second time
        self.failed: set[int] = set()  # offsets at which a READ has failed once
        self.refusal: Refusal | None = None
