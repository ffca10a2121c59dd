"""Packets over a channel: buffers what is to be sent, and splits what has arrived into packets.

A server may be slow, but not forever: the channel times out on silence, and this module on a trickle, which
is less than 1 KiB within the patience interval.

Source: draft-ietf-secsh-filexfer-02, section 3.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from airflow_mdbackup.scheme.errors import ConnectionLost
from airflow_mdbackup.scheme.transfer.sftp_packets import (
    MAX_PACKET,
    PACK_HEAD,
    UNPACK_KIND,
    UNPACK_LENGTH,
    NotAnSftpServer,
)

PATIENCE = 300.0  # seconds of waiting in which a server must send at least _MIN_BYTES
FIRST_READ = 32 << 10  # bytes of a file that are requested before its size is known
_RECEIVE = 1 << 20
_SMALL_RECEIVE = 64 << 10  # receiving less than this suggests waiting a moment for more
_MIN_BYTES = 1 << 10
_PAUSE = 0.001  # seconds


class Channel(Protocol):
    """The methods used of a connected channel. Both raise :class:`TimeoutError` when they stall."""

    def sendall(self, data: bytes, /) -> Any: ...

    def recv(self, size: int, /) -> bytes: ...


class PacketStream:
    """Sends and receives packets. See :class:`.Reader` for its parameters.

    :param window: bytes that may be outstanding when there is no bandwidth limit.
    :ivar ahead: bytes that may be outstanding now; fewer under a limit.
    """

    def __init__(
        self,
        channel: Channel,
        window: int,
        throttle: Callable[[int], int | None] | None,
        patience: float,
        clock: Callable[[], float],
    ) -> None:
        self.channel = channel
        self.throttle = throttle
        self.ahead = self._window = window
        self._patience = patience
        self._clock = clock
        self._waited = 0.0  # seconds spent waiting for the server in this interval
        self._progress = 0  # bytes received in this interval
        self._queued = bytearray()
        self._received: list[bytes] = []  # received and not parsed yet
        self._received_size = 0  # bytes of them
        self._needed = 4  # bytes of them that complete the next packet, as far as known
        self._portion = _RECEIVE  # bytes to receive at a time; fewer under a limit
        self._was_small = False  # whether the last receive returned little

    def send(self, kind: int, number: int, body: bytes) -> None:
        """Queue a packet for the next :meth:`flush`.

        :param number: its id; for INIT, the version.
        """
        self._queued += PACK_HEAD(5 + len(body), kind, number)
        self._queued += body

    def flush(self) -> None:
        """Send what is queued.

        :raises ConnectionLost: the connection broke, or the server stopped reading.
        """
        if self._queued:
            data, self._queued = bytes(self._queued), bytearray()
            try:
                self.channel.sendall(data)
            except TimeoutError:
                raise ConnectionLost("the connection stalled: the server takes no more requests") from None
            except (OSError, EOFError) as error:
                raise ConnectionLost(f"the connection broke: {str(error) or type(error).__name__}") from error

    def receive(self, *, many: bool = False) -> None:
        """Receive until at least one whole packet is there.

        :param many: whether many replies are outstanding.
        :raises ConnectionLost: the connection broke or stalled, or the server sends too little.
        """
        if many and self._was_small:
            # A short pause costs nothing and lets more replies arrive together.
            time.sleep(_PAUSE)
        while True:
            began = self._clock()
            try:
                data = self.channel.recv(self._portion)
            except TimeoutError:
                raise ConnectionLost("the connection stalled: no reply from the server in time") from None
            except (OSError, EOFError) as error:
                raise ConnectionLost(f"the connection broke: {str(error) or type(error).__name__}") from error
            if not data:
                raise ConnectionLost("the server closed the connection")
            self._check_pace(self._clock() - began, len(data))
            self._received.append(data)
            self._received_size += len(data)
            self._was_small = len(data) < _SMALL_RECEIVE
            if self.throttle is not None:
                self._apply_rate(self.throttle(len(data)))
            if self._received_size >= self._needed:
                return

    def _check_pace(self, seconds: float, size: int) -> None:
        """Give up on a server that sends a byte now and then, so that the channel never times out."""
        self._waited += seconds
        self._progress += size
        if self._waited < self._patience:
            return
        if self._progress < _MIN_BYTES:
            raise ConnectionLost(
                f"the connection stalled: only {self._progress} bytes came while we waited for "
                f"{self._waited:.0f} s"
            )
        self._waited, self._progress = 0.0, 0

    def _apply_rate(self, rate: int | None) -> None:
        """Under a limit, request only half a second ahead, and receive in small portions."""
        if rate is None:
            self.ahead, self._portion = self._window, _RECEIVE
        else:
            self.ahead, self._portion = max(rate // 2, FIRST_READ), min(max(rate // 32, 4096), _RECEIVE)

    def packets(self) -> Iterator[tuple[int, int, memoryview]]:
        """Yield type, id and body of each complete packet that has arrived."""
        data = self._received[0] if len(self._received) == 1 else b"".join(self._received)
        view = memoryview(data)
        position, size = 0, len(data)
        self._needed = 4
        try:
            while size - position >= 4:
                (length,) = UNPACK_LENGTH(data, position)
                if not 5 <= length <= MAX_PACKET:
                    raise NotAnSftpServer(data[position : position + 40])
                start, position = position, position + 4 + length
                if position > size:
                    self._needed, position = 4 + length, start
                    break
                kind, number = UNPACK_KIND(data, start + 4)
                yield kind, number, view[start + 9 : position]
        finally:
            self._received = [data[position:]]
            self._received_size = size - position
