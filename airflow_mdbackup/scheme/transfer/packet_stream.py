"""Packets over a channel: what is to be sent is collected, what has arrived is cut into packets.

A server may be slow, but not without end: the channel ends a silence, and this ends a trickle, which is less
than 1 KiB in all the time that we are patient.

Source: draft-ietf-secsh-filexfer-02, section 3.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from airflow_mdbackup.scheme.errors import ConnectionLost
from airflow_mdbackup.scheme.transfer.sftp_packets import HEAD, KIND, LENGTH, MAX_PACKET, NoSftp

PATIENCE = 300.0  # seconds
FIRST = 32 << 10  # bytes of a file that are asked for before its size is known
_RECEIVE = 1 << 20
_LITTLE = 64 << 10  # bytes that are little to receive at once
_LEAST = 1 << 10  # bytes that are too few for all the time that we are patient
_MOMENT = 0.001  # seconds


class Channel(Protocol):
    """What is needed of a connected channel. Both calls raise :class:`TimeoutError` when they stall."""

    def sendall(self, data: bytes, /) -> Any: ...

    def recv(self, size: int, /) -> bytes: ...


class PacketStream:
    """Sends and receives packets. See :class:`.Reader` for its parameters.

    :param window: bytes that may be coming when no limit holds.
    :ivar ahead: bytes that may be coming; fewer under a limit.
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
        self._waited = 0.0  # seconds for the server, since it was last judged
        self._brought = 0  # bytes that came in them
        self._out = bytearray()
        self._in: list[bytes] = []  # what has arrived and is not parsed
        self._arrived = 0  # bytes of it
        self._needed = 4  # bytes of it with which the next packet is whole, as far as is known
        self._portion = _RECEIVE  # bytes to receive at once; fewer under a limit
        self._little = False  # whether there was little to receive the last time

    def send(self, kind: int, number: int, body: bytes) -> None:
        """Send a packet with the next :meth:`flush`.

        :param number: its id; of INIT, the version.
        """
        self._out += HEAD(5 + len(body), kind, number)
        self._out += body

    def flush(self) -> None:
        """Send what is waiting.

        :raises ConnectionLost: the connection broke, or the server takes no more.
        """
        if self._out:
            data, self._out = bytes(self._out), bytearray()
            try:
                self.channel.sendall(data)
            except TimeoutError:
                raise ConnectionLost("the connection stalled: the server takes no more requests") from None
            except (OSError, EOFError) as error:
                raise ConnectionLost(f"the connection broke: {str(error) or type(error).__name__}") from error

    def receive(self, *, many: bool = False) -> None:
        """Take in what has arrived, until it is at least one whole packet.

        :param many: whether many answers are on their way.
        :raises ConnectionLost: the connection broke, stalled, or brings too little.
        """
        if many and self._little:
            # A moment's wait costs nothing and brings more of them at once.
            time.sleep(_MOMENT)
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
            self.ahead, self._portion = self._window, _RECEIVE
        else:
            self.ahead, self._portion = max(rate // 2, FIRST), min(max(rate // 32, 4096), _RECEIVE)

    def packets(self) -> Iterator[tuple[int, int, memoryview]]:
        """Yield type, id and body of each whole packet that has arrived."""
        data = self._in[0] if len(self._in) == 1 else b"".join(self._in)
        view = memoryview(data)
        position, size = 0, len(data)
        self._needed = 4
        try:
            while size - position >= 4:
                (length,) = LENGTH(data, position)
                if not 5 <= length <= MAX_PACKET:
                    raise NoSftp(data[position : position + 40])
                start, position = position, position + 4 + length
                if position > size:
                    self._needed, position = 4 + length, start
                    break
                kind, number = KIND(data, start + 4)
                yield kind, number, view[start + 9 : position]
        finally:
            self._in = [data[position:]]
            self._arrived = size - position
