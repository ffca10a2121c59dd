"""A pipelined, read-only SFTP client: many files in flight on one channel, hashed as their bytes arrive.

The index names the files, so no directory is listed and nothing is requested twice::

    for each submitted file, while there is room:  send OPEN
    HANDLE arrives:        send FSTAT and the first READ together
    ATTRS arrives:         a small file is kept in memory; a large one waits for its turn and then gets a
                           sink, which may already have its beginning
    as the window allows:  send READs for the rest, file by file
    DATA arrives:          write what continues the file, keep what is early, request what came short
    all bytes are there:   if the md5 is wrong, send FSTAT again, to tell a changed file from a corrupt one;
                           send CLOSE, return the result

Servers differ. Fallbacks::

    OPEN fails while others are open      keep fewer files in flight from now on, and retry it
    OPEN fails, or a READ fails twice     retry the file once when nothing else is in flight
    FSTAT fails or gives no size          send STAT by name, else read the file to its end
    the md5 is wrong, and FSTAT gives     read on past the stated end
    the same size again

Memory is bounded by ``window``, the bytes requested and not yet processed. It works with an account that is
restricted to ``internal-sftp -R -p open,close,read,fstat,stat,lstat,realpath,limits``.

Limitations: after :class:`ConnectionLost` the reader cannot be used again. A server that opens a named pipe
blocks until the other end is opened, and with it all other files; if there may be one, request attributes
first. How long sending may take is up to the channel.

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
from airflow_mdbackup.scheme.transfer.packet_stream import FIRST_READ, PATIENCE, Channel, PacketStream
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
from airflow_mdbackup.scheme.transfer.sftp_handshake import handshake
from airflow_mdbackup.scheme.transfer.sftp_packets import (
    MAX_HANDLE,
    PACK_READ,
    UNPACK_LENGTH,
    Attributes,
    Code,
    Refusal,
    Type,
    decode_attributes,
    decode_refusal,
    decode_string,
    encode_string,
    refuse_special,
)

WINDOW = 32 << 20  # bytes requested at a time, and so the most held in memory
_MAX_FILES = 128  # in flight, unless the server states its limit
_OPEN_TRIES = 3  # to open a file while others are open
_MAX_LAST_TRIES = 256  # files that wait for their last try
_DEPTH = 4  # READs in flight for a file of unknown size
_MAX_CLOSING = 100_000  # unanswered CLOSE requests, which nothing else bounds
_EMPTY_MD5 = b"d41d8cd98f00b204e9800998ecf8427e"  # the md5 of no bytes


class Reader:
    """Reads files over one channel. One thread at a time.

    :param channel: a channel on which the SFTP subsystem has just been started.
    :param window: bytes requested and not yet processed, at least 1 MiB. The channel's window should be
        larger.
    :param throttle: called with the number of bytes of each receive; sleeps to keep within a limit, and
        returns the current limit in bytes per second, or None for no limit.
    :param patience: seconds of waiting in which at least 1 KiB must arrive; should be several times the
        channel's timeout. Time spent in the throttle, on the disk and in the caller does not count.
    :param clock: returns seconds.
    :ivar received: bytes of file contents.
    :ivar round_trip: seconds from a request to its reply.
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
        # By request id: the handler of the reply, its transfer (or key), and offset and length of a READ.
        self._requests: dict[int, tuple[Callable[..., None], Any, int, int]] = {}
        self._unread: deque[Transfer] = deque()  # the first READ is not sent yet
        self._incomplete: deque[Transfer] = deque()  # the size is known, and READs remain to be sent
        self._files = 0
        self._to_reopen: deque[Transfer] = deque()  # to be opened again once fewer are open
        self._last_tries: deque[Transfer] = deque()  # failed; retried when nothing else is in flight
        self._handles = 0  # handles that the server has opened and not confirmed to be closed
        self._opened = 0  # files opened since _max_files changed
        self._closing = 0  # unanswered CLOSE requests
        self._claimed = 0  # bytes of the window in use: requested and not yet processed
        self._results: list[Fetched | Stated] = []
        self._outstanding = 0  # bytes requested and not yet answered
        self.received = 0
        session = handshake(self.stream)
        self.round_trip = session.round_trip
        self._read_size = session.read_size
        self._allowed = session.max_files or _MAX_FILES  # files in flight, until the server refuses one
        self._max_files = self._allowed

    # --- for the caller -----------------------------------------------------------------------------

    @property
    def room(self) -> bool:
        """Whether another request can be submitted now."""
        if len(self._last_tries) >= _MAX_LAST_TRIES:
            return False
        has_room = self._max_files == self._allowed or self._handles < self._max_files
        return has_room and self._files - len(self._last_tries) < self._max_files

    @property
    def busy(self) -> bool:
        """Whether results are outstanding."""
        return self._files > 0 or bool(self._results)

    def submit(self, wanted: Wanted) -> None:
        """Request a file. :meth:`wait` returns its result."""
        self._files += 1
        self._request_open(Transfer(wanted))

    def submit_stat(self, path: bytes, key: Any) -> None:
        """Request the attributes of a file, following symlinks. :meth:`wait` returns the result.

        Anything but a regular file is refused with :attr:`Code.SPECIAL`.
        """
        self._files += 1
        self._request(Type.STAT, encode_string(path), self._on_stat, key)

    def wait(self) -> list[Fetched | Stated]:
        """Return the next results, at least one if any are outstanding.

        :raises ConnectionLost: the connection broke or stalled, or the server broke the protocol.
        :raises OSError: from a file's sink, or the throttle.
        """
        while self._files and not self._results:
            self._turn()
        return self._take_results()

    def take_turn(self) -> list[Fetched | Stated]:
        """Send and receive once, and return the results so far, which may be none; see :meth:`wait`.

        With large files the next result may be hours away.
        """
        if self._files and not self._results:
            self._turn()
        return self._take_results()

    def _take_results(self) -> list[Fetched | Stated]:
        results, self._results = self._results, []
        return results

    def _turn(self) -> None:
        if self._closing > _MAX_CLOSING:
            raise ConnectionLost("the server does not confirm that it closes files")
        self._retry()
        self._send_reads()
        self.stream.flush()
        if not self._results:
            self.stream.receive(many=self._files > self._max_files // 2)
            self._handle_replies()

    # --- requests -----------------------------------------------------------------------------------

    def _request(
        self,
        kind: int,
        body: bytes,
        handler: Callable[..., None],
        subject: Any,
        offset: int = 0,
        length: int = 0,
    ) -> None:
        self._next_id = number = (self._next_id + 1) & 0xFFFFFFFF
        self._requests[number] = (handler, subject, offset, length)
        self.stream.send(kind, number, body)

    def _request_open(self, transfer: Transfer) -> None:
        body = encode_string(transfer.wanted.path) + b"\0\0\0\1\0\0\0\0"  # pflags READ, no attributes
        self._request(Type.OPEN, body, self._on_open, transfer)

    def _retry(self) -> None:
        """Retry refused OPENs, as far as fewer files are open now."""
        in_flight = self._files - len(self._to_reopen) - len(self._last_tries)
        while self._to_reopen and max(in_flight, self._handles) < self._max_files:
            self._request_open(self._to_reopen.popleft())
            in_flight += 1
        if self._last_tries and not in_flight and not self._handles:
            self._request_open(self._last_tries.popleft())

    def _request_fstat(self, transfer: Transfer) -> None:
        transfer.pending += 1
        self._request(Type.FSTAT, transfer.handle, self._on_fstat, transfer)

    def _request_read(self, transfer: Transfer, offset: int, length: int) -> None:
        transfer.pending += 1
        self._claimed += length
        self._outstanding += length
        body = transfer.handle + PACK_READ(offset, length)
        self._request(Type.READ, body, self._on_read, transfer, offset, length)

    def _send_reads(self) -> None:
        """Send READs for as much as the window allows.

        First READs get no more than half of it: what they return may have to wait in memory for the rest of
        its file, and must not keep that rest from being requested.
        """
        while (
            self._incomplete
            and self._outstanding < self.stream.ahead
            and self._claimed + self._read_size <= self._window
        ):
            transfer = self._incomplete[0]
            if transfer.is_large and transfer.sink is None and transfer.refusal is None:
                self._open_sink(transfer)
            if transfer.end is None and transfer.refusal is None:
                room = transfer.sink.room if transfer.sink is not None else None
                if room is not None and transfer.asked > room:
                    transfer.refusal = Refusal(Code.TOO_LONG, "it is longer than stated")
                    self._finish_if_done(transfer)
                if transfer.pending >= _DEPTH:
                    break  # it may end anywhere
            rest = self._read_size if transfer.end is None else transfer.end - transfer.asked
            length = min(self._read_size, self.stream.ahead, rest)
            if length <= 0 or transfer.refusal:
                self._incomplete.popleft()
                continue
            self._request_read(transfer, transfer.asked, length)
            transfer.asked += length
        while self._unread:
            transfer = self._unread[0]
            if transfer.before is None and transfer.refusal is None:
                if self._outstanding >= self.stream.ahead or self._claimed + FIRST_READ > self._window // 2:
                    break
                transfer.asked = FIRST_READ
                self._request_read(transfer, 0, FIRST_READ)
            # Else its size arrived first, and _on_size has seen to it.
            self._unread.popleft()

    def _open_sink(self, transfer: Transfer) -> None:
        """Give a large file its sink, and write what has arrived of it."""
        assert transfer.before is not None
        transfer.sink = transfer.wanted.open(transfer.before)
        if transfer.sink is None:
            transfer.refusal = Refusal(Code.UNWANTED, "not wanted")
        else:
            transfer.position = transfer.sink.position
            transfer.asked = max(transfer.asked, transfer.position)
            self._write_early(transfer)
        self._finish_if_done(transfer)  # if the sink has all of it already

    # --- replies ------------------------------------------------------------------------------------

    def _handle_replies(self) -> None:
        for kind, number, body in self.stream.packets():
            try:
                handler, subject, offset, length = self._requests.pop(number)
            except KeyError:
                raise ConnectionLost("the server answered a request that was never sent") from None
            try:
                handler(kind, body, subject, offset, length)
            except (struct.error, IndexError):
                raise ConnectionLost("the server sent a malformed packet") from None

    def _on_stat(self, kind: int, body: memoryview, key: Any, *_: int) -> None:
        self._files -= 1
        if kind != Type.ATTRS:
            refusal = decode_refusal(kind, body)
            unknown = Attributes(None, None, None) if refusal.code == Code.UNSUPPORTED else None
            self._results.append(Stated(key, unknown, None if unknown else refusal))
            return
        attributes = decode_attributes(body)
        special = refuse_special(attributes)
        self._results.append(Stated(key, None if special else attributes, special))

    def _on_open(self, kind: int, body: memoryview, transfer: Transfer, *_: int) -> None:
        if kind != Type.HANDLE:
            self._on_open_refused(transfer, decode_refusal(kind, body))
            return
        self._handles += 1
        self._opened += 1
        if self._max_files < self._allowed and self._opened >= self._max_files:
            self._opened, self._max_files = 0, self._max_files + 1
        transfer.handle = bytes(body[: 4 + len(decode_string(body, MAX_HANDLE))])
        self._request_fstat(transfer)
        free = self._outstanding < self.stream.ahead and self._claimed + FIRST_READ <= self._window // 2
        if free and not self._unread:
            transfer.asked = FIRST_READ
            self._request_read(transfer, 0, FIRST_READ)
        else:
            self._unread.append(transfer)

    def _on_open_refused(self, transfer: Transfer, refusal: Refusal) -> None:
        transfer.tries += 1
        if refusal.code == Code.FAILURE and self._handles and transfer.tries <= _OPEN_TRIES:
            # The server may not allow more than are open now. As that is a guess, one more is tried after
            # each round of that many files.
            self._opened, self._max_files = 0, min(self._max_files, self._handles)
            self._to_reopen.append(transfer)
        else:
            transfer.refusal = refusal
            self._end(transfer)

    def _on_fstat(self, kind: int, body: memoryview, transfer: Transfer, by_name: int, _: int) -> None:
        transfer.pending -= 1
        attributes = decode_attributes(body) if kind == Type.ATTRS else None
        if attributes is None:
            decode_refusal(kind, body)  # raises if it is no error status either
        if (attributes is None or attributes.size is None) and not by_name:
            transfer.pending += 1
            self._request(Type.STAT, encode_string(transfer.wanted.path), self._on_fstat, transfer, True)
            return
        attributes = attributes or Attributes(None, None, None)
        if transfer.digest is not None:
            transfer.after = attributes
        elif special := refuse_special(attributes):
            transfer.refusal = special  # more specific than the error of a READ
        else:
            self._on_size(transfer, attributes)
        self._finish_if_done(transfer)

    def _on_size(self, transfer: Transfer, attributes: Attributes) -> None:
        """Continue a transfer once its size is known, or known to be unavailable."""
        transfer.before = attributes
        if attributes.size is not None:
            transfer.end = attributes.size if transfer.end is None else min(attributes.size, transfer.end)
        if transfer.end is not None:
            self._on_end(transfer)
        elif not transfer.pending and transfer.refusal is None:
            self._request_more(transfer)

    def _on_end(self, transfer: Transfer) -> None:
        """Continue a transfer once its end is known."""
        assert transfer.end is not None
        transfer.is_large = transfer.end > SMALL
        if transfer.early and not transfer.is_large:
            self._write_early(transfer)
        if transfer.asked < transfer.end:
            self._incomplete.append(transfer)

    def _request_more(self, transfer: Transfer) -> None:
        """Request more of a file whose end is unknown."""
        if transfer.asked < SMALL and not transfer.is_large:  # it may be small
            self._request_read(transfer, transfer.asked, self._read_size)
            transfer.asked += self._read_size
        elif not transfer.is_large:
            transfer.is_large = True
            self._incomplete.append(transfer)

    def _on_read(self, kind: int, body: memoryview, transfer: Transfer, offset: int, length: int) -> None:
        transfer.pending -= 1
        self._outstanding -= length
        if kind == Type.DATA:
            (size,) = UNPACK_LENGTH(body)
            if size > length or size + 4 > len(body):
                raise ConnectionLost("the server sent more than was requested, or a malformed packet")
            if not size:
                self._on_eof(transfer, offset, length)
                return
            self.received += size
            if size == transfer.end and not transfer.pending and not offset and transfer.sink is None:
                self._on_whole(transfer, bytes(body[4 : 4 + size]), length)
                return
            self._write(transfer, offset, body[4 : 4 + size])
            rest, offset = length - size, offset + size
            self._claimed -= rest
            # Request the missing rest of a short reply, unless the file is known to end here.
            if rest and (transfer.end is None or offset < transfer.end):
                self._request_read(transfer, offset, rest)
            elif transfer.end is None and transfer.before is not None and not transfer.pending:
                self._request_more(transfer)
        else:
            refusal = decode_refusal(kind, body)
            if refusal.code == Code.EOF:
                self._on_eof(transfer, offset, length)
                return
            self._claimed -= length
            if refusal.code == Code.FAILURE and offset not in transfer.failed and transfer.refusal is None:
                transfer.failed.add(offset)
                self._request_read(transfer, offset, length)
                return
            transfer.refusal = transfer.refusal or refusal
        self._finish_if_done(transfer)

    def _on_eof(self, transfer: Transfer, offset: int, claimed: int) -> None:
        """Note that the file ends at or before this offset."""
        self._claimed -= claimed
        transfer.is_at_end = True
        was_known = transfer.end is not None
        transfer.end = offset if transfer.end is None else min(offset, transfer.end)
        if not was_known and transfer.before is not None and not transfer.is_large:
            self._on_end(transfer)
        self._finish_if_done(transfer)

    def _on_whole(self, transfer: Transfer, content: bytes, claimed: int) -> None:
        """Finish a transfer that arrived in one piece, as most do: a shortcut for speed."""
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest().encode()
        self._claimed -= claimed
        if md5 != transfer.wanted.md5:
            self._claimed += len(content)
            self._write(transfer, 0, content)
            self._finish_if_done(transfer)
            return
        self._files -= 1
        self._close(transfer)
        self._results.append(
            Fetched(transfer.wanted, md5, len(content), transfer.before, None, transfer.refusal, content)
        )

    def _write(self, transfer: Transfer, offset: int, data: bytes | memoryview) -> None:
        """Write what continues the file, and keep what is beyond."""
        sink, position, early = transfer.sink, transfer.position, transfer.early
        if sink is None and transfer.is_large is False:
            sink = transfer.sink = Memory()
        if sink is None or offset > position:
            if early is None:
                early = transfer.early = Early()
            early.add(offset, data)
            return
        while data:
            if type(sink) is not Memory:  # bytes in memory keep their claim on the window
                self._claimed -= len(data)
            if offset < position:  # the sink has its beginning already
                data = data[position - offset :]
            if data:
                sink.write(data)
            transfer.position = offset = position = position + len(data)
            data = early.pop(position) if early else EMPTY

    def _write_early(self, transfer: Transfer) -> None:
        """Write what arrived before there was a sink."""
        for offset, data in transfer.early.pop_all() if transfer.early else ():
            self._write(transfer, offset, data)

    def _finish_if_done(self, transfer: Transfer) -> None:
        """Finish the transfer if nothing is outstanding."""
        if transfer.pending:
            return
        if transfer.refusal is None and transfer.digest is None:
            if transfer.end is None or transfer.asked < transfer.end:
                return
            if transfer.sink is None:  # empty; or shorter than it was said to be, and here before its turn
                transfer.sink = Memory()
                self._write_early(transfer)
            transfer.digest = transfer.sink.digest()
            expected = transfer.wanted.md5
            if expected is not None and expected != transfer.digest:
                self._request_fstat(transfer)
                return
        if self._read_past_end(transfer):
            return
        self._close(transfer)
        self._end(transfer)

    def _read_past_end(self, transfer: Transfer) -> bool:
        """Continue past the stated end of a file, if that may be why its md5 is wrong."""
        if transfer.refusal is not None or transfer.is_at_end or transfer.digest == transfer.wanted.md5:
            return False
        assert transfer.before is not None
        if transfer.after is not None and transfer.after.size not in (None, transfer.before.size):
            return False  # the file has changed meanwhile
        transfer.digest = transfer.after = transfer.end = None
        transfer.asked = transfer.position
        if isinstance(transfer.sink, Memory):  # it may turn out too large for memory
            transfer.early = Early()
            transfer.early.add(0, transfer.sink.content)
            transfer.sink, transfer.position, transfer.is_large = None, 0, None
        if transfer.is_large:
            self._incomplete.append(transfer)
        else:
            self._request_more(transfer)
        return True

    def _close(self, transfer: Transfer) -> None:
        self._closing += 1
        self._request(Type.CLOSE, transfer.handle, self._on_closed, None)

    def _on_closed(self, *_: Any) -> None:
        self._closing -= 1
        self._handles -= 1

    def _end(self, transfer: Transfer) -> None:
        """Report the result of a transfer, or have it retried a last time."""
        failed = transfer.refusal is not None and transfer.refusal.code == Code.FAILURE
        if failed and not transfer.is_last:
            self._release(transfer)
            self._last_tries.append(Transfer(transfer.wanted, is_last=True))
        else:
            self._finish(transfer)

    def _finish(self, transfer: Transfer) -> None:
        self._files -= 1
        content = self._release(transfer)
        md5, size = transfer.digest or _EMPTY_MD5, transfer.position
        answers = transfer.before, transfer.after, transfer.refusal
        self._results.append(Fetched(transfer.wanted, md5, size, *answers, content))

    def _release(self, transfer: Transfer) -> bytes | None:
        """Release the memory of a transfer, and return the content if it is a small file."""
        if transfer.early:
            self._claimed -= transfer.early.size  # data beyond a gap, or that never had a sink
        if not isinstance(transfer.sink, Memory):
            return None
        self._claimed -= len(transfer.sink.content)
        return transfer.sink.content
