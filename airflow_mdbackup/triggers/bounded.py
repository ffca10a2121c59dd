"""An asyncssh connection whose server can fill neither a triggerer's memory nor its event loop.

All triggers share one loop. asyncssh works off in one turn whatever has arrived, and below the output of a
session a server may send for ever: messages to be ignored, requests, window adjustments, key exchanges.
Here::

    compression     none, so that a packet is no larger than it was on the line
    each packet     at most 256 KiB, as asyncssh has it
    all packets     a budget for their number, their bytes, and for key exchanges, each of which costs more
    turns           one for every 4 KiB; meanwhile, nothing is read from the socket
"""

from __future__ import annotations

import time
from typing import Any

import asyncssh

from airflow_mdbackup.hooks.login import Client, PatientConnection

_PIECE = 4096  # bytes; at least 28 make a packet, which takes some 40 microseconds
# What one connection may send: so much at once, and so much more for each second. A conversation takes 10,000
# lines and 16 MiB, a line a second; a server may send two packets for a line, and its own signs of life.
_PACKETS = (50_000, 5.0)
_BYTES = (64 << 20, 64 << 10)
_KEY_EXCHANGES = (20, 1 / 60)


class Overrun(asyncssh.ProtocolError):
    """The server sent more than it may, which has ended the connection."""


class _Budget:
    def __init__(self, what: str, limit: tuple[int, float]) -> None:
        self._what = what
        self._at_once, self._a_second = limit
        self._began = time.monotonic()
        self._spent = 0

    def spend(self, amount: int) -> None:
        self._spent += amount
        if self._spent > self._at_once + self._a_second * (time.monotonic() - self._began):
            raise Overrun(
                f"the server sent {self._spent:,} {self._what}, far more than the build of an index takes"
            )


class _Connection(PatientConnection):
    def bound(self) -> None:
        """Begin to count. Called once, before anything is received."""
        self._arrived = b""
        self._packets = _Budget("packets", _PACKETS)
        self._bytes = _Budget("bytes", _BYTES)
        self._key_exchanges = _Budget("key exchanges", _KEY_EXCHANGES)
        self.overrun: Overrun | None = None

    def data_received(self, data: bytes, datatype: Any = None) -> None:
        self._arrived += data
        if len(self._arrived) == len(data):  # else the next turn is planned already
            self._work_off()

    def _work_off(self) -> None:
        piece, self._arrived = self._arrived[:_PIECE], self._arrived[_PIECE:]
        if self._transport is not None:
            super().data_received(piece)
        if self._transport is None:  # it has ended
            self._arrived = b""
        elif self._arrived:
            self._transport.pause_reading()
            self._loop.call_soon(self._work_off)
        else:
            self._transport.resume_reading()

    def _recv_pkthdr(self) -> bool:
        begun = super()._recv_pkthdr()
        if begun:
            self._packets.spend(1)
            self._bytes.spend(self._pktlen)
        return begun

    def send_newkeys(self, k: bytes, h: bytes) -> None:
        self._key_exchanges.spend(1)
        super().send_newkeys(k, h)

    def _force_close(self, exc: Exception | None) -> None:
        if isinstance(exc, Overrun):
            self.overrun = exc
        super()._force_close(exc)


class BoundedClient(Client):
    """What to connect as, so that the connection is bounded."""

    def connection_made(self, conn: asyncssh.SSHClientConnection) -> None:
        conn.__class__ = _Connection  # asyncssh lets nobody choose it
        assert isinstance(conn, _Connection)
        conn.bound()


def overrun_of(connection: asyncssh.SSHClientConnection | None) -> Overrun | None:
    """Return why a connection has ended, if its server has overrun us."""
    return connection.overrun if isinstance(connection, _Connection) else None
