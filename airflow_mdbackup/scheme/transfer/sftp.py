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

What this does not give: after :class:`ConnectionLost` the reader is of no more use. A server that opens a
named pipe waits for its other end, with all other files; who fears that there is one asks for attributes
first. How long requests may take to be sent is the channel's to limit.

Sources: draft-ietf-secsh-filexfer-02 (SFTP version 3), OpenSSH ``PROTOCOL`` section 4.8 (limits@openssh.com).
"""

from __future__ import annotations

import hashlib
import struct
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from airflow_mdbackup.scheme.errors import ConnectionLost
from airflow_mdbackup.scheme.transfer.packet_stream import FIRST, PATIENCE, Channel, PacketStream
from airflow_mdbackup.scheme.transfer.sftp_files import (
    EMPTY,
    SMALL,
    Early,
    Fetched,
    Memory,
    Stated,
    Transfer,
    Wanted,
)
from airflow_mdbackup.scheme.transfer.sftp_packets import (
    LENGTH,
    MAX_HANDLE,
    READ,
    Attributes,
    Code,
    Refusal,
    Type,
    attributes_in,
    extensions_in,
    packed,
    refusal_in,
    refusal_of_special,
    string_in,
)

WINDOW = 32 << 20  # bytes asked for at a time, and at most so many held in memory
_MAX_FILES = 128  # in flight, unless the server tells how many it can have open
_TRIES = 3  # to open a file while others are open
_MOST_LAST = 256  # files that wait for their last try
_DEPTH = 4  # READs in flight for a file whose size is not known
_MOST_FILES = 1000  # in flight, whatever it tells: what fills a line of 20 ms with small files
_MOST_CLOSING = 100_000  # CLOSE requests without an answer, which nothing else bounds
_DEFAULT_READ = 32 << 10  # what every server must be able to send
_MAX_READ = 255 << 10
_NOTHING = b"d41d8cd98f00b204e9800998ecf8427e"  # the md5 of no bytes


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
        self._window = max(window, 4 * SMALL)
        self.stream = PacketStream(channel, self._window, throttle, patience, clock)
        self._next_id = 0
        # By request id: who takes the answer, of which transfer (or key), from where, how much was asked.
        self._asked: dict[int, tuple[Callable[..., None], Any, int, int]] = {}
        self._fresh: deque[Transfer] = deque()  # transfers whose first READ is to be sent
        self._hungry: deque[Transfer] = deque()  # transfers whose size is known, with READs to send
        self._files = 0
        self._again: deque[Transfer] = deque()  # could not be opened while others were open
        self._last: deque[Transfer] = deque()  # failed, and have another try when nothing else is on its way
        self._held = 0  # handles that the server has given and not said to have taken back
        self._opened = 0  # files, since the number of those in flight changed
        self._closing = 0  # CLOSE requests that are not answered yet
        self._claimed = 0  # bytes asked for and not yet processed
        self._results: list[Fetched | Stated] = []
        self._coming = 0  # bytes asked for and not yet answered
        self._allowed = _MAX_FILES  # files in flight, until the server refuses one
        self._max_files = self._allowed
        self._read_size = _DEFAULT_READ
        self.received = 0  # bytes of file contents
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
        self._ask_open(Transfer(wanted))

    def submit_stat(self, path: bytes, key: Any) -> None:
        """Ask for the attributes of a file, following symlinks. The result comes from :meth:`wait`.

        What is no regular file is refused with :attr:`Code.SPECIAL`.
        """
        self._files += 1
        self._ask(Type.STAT, packed(path), self._on_stat, key)

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
        self.stream.flush()
        if not self._results:
            self.stream.receive(many=self._files > self._max_files // 2)
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
        self.stream.send(kind, number, body)

    def _ask_open(self, transfer: Transfer) -> None:
        # pflags READ, no attributes
        self._ask(Type.OPEN, packed(transfer.wanted.path) + b"\0\0\0\1\0\0\0\0", self._on_open, transfer)

    def _try_again(self) -> None:
        """Open files again that were refused, as far as fewer are open now."""
        on_their_way = self._files - len(self._again) - len(self._last)
        while self._again and max(on_their_way, self._held) < self._max_files:
            self._ask_open(self._again.popleft())
            on_their_way += 1
        if self._last and not on_their_way and not self._held:
            self._ask_open(self._last.popleft())

    def _ask_fstat(self, transfer: Transfer) -> None:
        transfer.pending += 1
        self._ask(Type.FSTAT, transfer.handle, self._on_fstat, transfer)

    def _ask_read(self, transfer: Transfer, offset: int, length: int) -> None:
        transfer.pending += 1
        self._claimed += length
        self._coming += length
        body = transfer.handle + READ(offset, length)
        self._ask(Type.READ, body, self._on_read, transfer, offset, length)

    def _send_reads(self) -> None:
        """Send READs for as much as the window takes.

        First READs take no more than half of it, so that what they bring, and wait with for the rest of its
        file, never keeps that rest from being asked for.
        """
        while (
            self._hungry
            and self._coming < self.stream.ahead
            and self._claimed + self._read_size <= self._window
        ):
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
            length = min(self._read_size, self.stream.ahead, rest)
            if length <= 0 or transfer.refusal:
                self._hungry.popleft()
                continue
            self._ask_read(transfer, transfer.asked, length)
            transfer.asked += length
        while self._fresh:
            transfer = self._fresh[0]
            if transfer.before is None and transfer.refusal is None:
                if self._coming >= self.stream.ahead or self._claimed + FIRST > self._window // 2:
                    break
                transfer.asked = FIRST
                self._ask_read(transfer, 0, FIRST)
            # Else its size came first, and it went on with that.
            self._fresh.popleft()

    def _open_sink(self, transfer: Transfer) -> None:
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

    # --- replies ------------------------------------------------------------------------------------

    def _parse(self) -> None:
        for kind, number, body in self.stream.packets():
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
        if kind != Type.ATTRS:
            refusal = refusal_in(kind, body)
            unknown = Attributes(None, None, None) if refusal.code == Code.UNSUPPORTED else None
            self._results.append(Stated(key, unknown, None if unknown else refusal))
            return
        attributes = attributes_in(body)
        special = refusal_of_special(attributes)
        self._results.append(Stated(key, None if special else attributes, special))

    def _on_open(self, kind: int, body: memoryview, transfer: Transfer, *_: int) -> None:
        if kind != Type.HANDLE:
            self._on_not_opened(transfer, refusal_in(kind, body))
            return
        self._held += 1
        self._opened += 1
        if self._max_files < self._allowed and self._opened >= self._max_files:
            self._opened, self._max_files = 0, self._max_files + 1
        transfer.handle = bytes(body[: 4 + len(string_in(body, MAX_HANDLE))])
        self._ask_fstat(transfer)
        free = self._coming < self.stream.ahead and self._claimed + FIRST <= self._window // 2
        if free and not self._fresh:
            transfer.asked = FIRST
            self._ask_read(transfer, 0, FIRST)
        else:
            self._fresh.append(transfer)

    def _on_not_opened(self, transfer: Transfer, refusal: Refusal) -> None:
        transfer.tries += 1
        if refusal.code == Code.FAILURE and self._held and transfer.tries <= _TRIES:
            # As many as are open may be all that it allows. One more is tried after each round of them, since
            # the reason may have been another one.
            self._opened, self._max_files = 0, min(self._max_files, self._held)
            self._again.append(transfer)
        else:
            transfer.refusal = refusal
            self._end(transfer)

    def _on_fstat(self, kind: int, body: memoryview, transfer: Transfer, by_name: int, _: int) -> None:
        transfer.pending -= 1
        attributes = attributes_in(body) if kind == Type.ATTRS else None
        if attributes is None:
            refusal_in(kind, body)  # if it is one
        if (attributes is None or attributes.size is None) and not by_name:
            transfer.pending += 1
            self._ask(Type.STAT, packed(transfer.wanted.path), self._on_fstat, transfer, True)
            return
        attributes = attributes or Attributes(None, None, None)
        if transfer.digest is not None:
            transfer.after = attributes
        elif special := refusal_of_special(attributes):
            transfer.refusal = special  # it says more than what a read of it was answered with
        else:
            self._on_size(transfer, attributes)
        self._advance(transfer)

    def _on_size(self, transfer: Transfer, attributes: Attributes) -> None:
        """Have a transfer go on, now that its size is known, or known not to be told."""
        transfer.before = attributes
        if attributes.size is not None:
            transfer.end = attributes.size if transfer.end is None else min(attributes.size, transfer.end)
        if transfer.end is not None:
            self._on_end(transfer)
        elif not transfer.pending and transfer.refusal is None:
            self._ask_on(transfer)

    def _on_end(self, transfer: Transfer) -> None:
        """Have a transfer go on, now that it is known where it ends."""
        assert transfer.end is not None
        transfer.is_large = transfer.end > SMALL
        if transfer.early and not transfer.is_large:
            self._take_early(transfer)
        if transfer.asked < transfer.end:
            self._hungry.append(transfer)

    def _ask_on(self, transfer: Transfer) -> None:
        """Ask for what follows of a file whose end is not known."""
        if transfer.asked < SMALL and not transfer.is_large:  # it may be a small one
            self._ask_read(transfer, transfer.asked, self._read_size)
            transfer.asked += self._read_size
        elif not transfer.is_large:
            transfer.is_large = True
            self._hungry.append(transfer)

    def _on_read(self, kind: int, body: memoryview, transfer: Transfer, offset: int, length: int) -> None:
        transfer.pending -= 1
        self._coming -= length
        if kind == Type.DATA:
            (size,) = LENGTH(body)
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
            refusal = refusal_in(kind, body)
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

    def _on_eof(self, transfer: Transfer, offset: int, claimed: int) -> None:
        """Note that a file has nothing from this offset on."""
        self._claimed -= claimed
        transfer.is_at_end = True
        was_known = transfer.end is not None
        transfer.end = offset if transfer.end is None else min(offset, transfer.end)
        if not was_known and transfer.before is not None and not transfer.is_large:
            self._on_end(transfer)
        self._advance(transfer)

    def _on_whole(self, transfer: Transfer, content: bytes, claimed: int) -> None:
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

    def _take(self, transfer: Transfer, offset: int, data: bytes | memoryview) -> None:
        """Hand on what continues the file, and keep what is beyond."""
        sink, position, early = transfer.sink, transfer.position, transfer.early
        if sink is None and transfer.is_large is False:
            sink = transfer.sink = Memory()
        if sink is None or offset > position:
            if early is None:
                early = transfer.early = Early()
            early.add(offset, data)
            return
        while data:
            if type(sink) is not Memory:  # what is in memory stays claimed
                self._claimed -= len(data)
            if offset < position:  # the sink has its beginning already
                data = data[position - offset :]
            if data:
                sink.write(data)
            transfer.position = offset = position = position + len(data)
            data = early.pop(position) if early else EMPTY

    def _take_early(self, transfer: Transfer) -> None:
        """Hand on what came before there was a sink."""
        for offset, data in transfer.early.pop_all() if transfer.early else ():
            self._take(transfer, offset, data)

    def _advance(self, transfer: Transfer) -> None:
        """End the transfer if nothing more is to come."""
        if transfer.pending:
            return
        if transfer.refusal is None and transfer.digest is None:
            if transfer.end is None or transfer.asked < transfer.end:
                return
            if transfer.sink is None:  # empty; or shorter than it was said to be, and here before its turn
                transfer.sink = Memory()
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

    def _reads_on(self, transfer: Transfer) -> bool:
        """Read on behind what was said to be the end of a file, if that may be why its md5 is wrong."""
        if transfer.refusal is not None or transfer.is_at_end or transfer.digest == transfer.wanted.md5:
            return False
        assert transfer.before is not None
        if transfer.after is not None and transfer.after.size not in (None, transfer.before.size):
            return False  # it has changed meanwhile
        transfer.digest = transfer.after = transfer.end = None
        transfer.asked = transfer.position
        if isinstance(transfer.sink, Memory):  # where it may not stay
            transfer.early = Early()
            transfer.early.add(0, transfer.sink.content)
            transfer.sink, transfer.position, transfer.is_large = None, 0, None
        if transfer.is_large:
            self._hungry.append(transfer)
        else:
            self._ask_on(transfer)
        return True

    def _close(self, transfer: Transfer) -> None:
        self._closing += 1
        self._ask(Type.CLOSE, transfer.handle, self._on_closed, None)

    def _on_closed(self, *_: Any) -> None:
        self._closing -= 1
        self._held -= 1

    def _end(self, transfer: Transfer) -> None:
        """Hand out what became of a transfer, or have it tried once more."""
        failed = transfer.refusal is not None and transfer.refusal.code == Code.FAILURE
        if failed and not transfer.is_last:
            self._give_back(transfer)
            self._last.append(Transfer(transfer.wanted, is_last=True))
        else:
            self._finish(transfer)

    def _finish(self, transfer: Transfer) -> None:
        self._files -= 1
        content = self._give_back(transfer)
        md5, size = transfer.digest or _NOTHING, transfer.position
        told = transfer.before, transfer.after, transfer.refusal
        self._results.append(Fetched(transfer.wanted, md5, size, *told, content))

    def _give_back(self, transfer: Transfer) -> bytes | None:
        """Let go of what a transfer has in memory, and return that if it is a small file."""
        if transfer.early:
            self._claimed -= transfer.early.size  # beyond a hole, or there was no sink
        if not isinstance(transfer.sink, Memory):
            return None
        self._claimed -= len(transfer.sink.content)
        return transfer.sink.content

    # --- the beginning ------------------------------------------------------------------------------

    def _handshake(self) -> None:
        self.stream.send(Type.INIT, 3, b"")
        kind, body = self._one_packet()
        if kind != Type.VERSION:
            raise ConnectionLost("the server does not speak SFTP: it did not answer with its version")
        try:
            extensions = extensions_in(body)
        except struct.error:
            raise ConnectionLost("the server sent a malformed version packet") from None
        name, request = b"limits@openssh.com", Type.EXTENDED
        if extensions.get(name) != b"1":
            # For the time that its answer takes, whatever that is: VERSION may have waited for a login.
            name, request = b".", Type.REALPATH
        self.stream.send(request, 0, packed(name))
        kind, body = self._one_packet()
        if kind == Type.EXTENDED_REPLY and len(body) >= 32:
            _, read_size, _, handles = struct.unpack_from(">QQQQ", body)
            # Less than what every server must be able to send would only mean more requests in flight.
            self._read_size = max(_DEFAULT_READ, min(read_size, _MAX_READ))
            if handles:
                self._allowed = self._max_files = max(1, min(_MOST_FILES, handles - 1))

    def _one_packet(self) -> tuple[int, memoryview]:
        """Send what is waiting, and return type and body (behind version or id) of the next packet."""
        asked = time.monotonic()
        self.stream.flush()
        while True:
            self.stream.receive()
            for kind, _, body in self.stream.packets():
                self.round_trip = time.monotonic() - asked
                return kind, body
