"""An asyncssh connection whose server can fill neither a triggerer's memory nor its event loop.

All triggers share one loop. asyncssh processes whatever has arrived in one turn of it, and apart from a
session's output, a server may send forever: messages to ignore, requests, window adjustments, key exchanges.
Here::

    compression     none, so a packet is no larger than what was received
    each packet     at most 256 KiB, which is asyncssh's own limit
    all packets     a budget each for packets, bytes, and key exchanges, which are expensive
    turns           one per 4 KiB, during which nothing is read from the socket
"""

from __future__ import annotations

import time
from typing import Any

import asyncssh

from airflow_mdbackup.hooks.login import Client, PatientConnection

_CHUNK = 4096  # bytes; a packet has at least 28, and takes about 40 microseconds
# Budgets of a connection: at once, and more per second. A conversation has at most 10,000 lines and 16 MiB,
# and one line per second; a server may send two packets per line, and its own keepalives.
_PACKETS = (50_000, 5.0)
_BYTES = (64 << 20, 64 << 10)
_KEY_EXCHANGES = (20, 1 / 60)


class Overrun(asyncssh.ProtocolError):
    """The server exceeded a budget, so the connection was ended."""


class _Budget:
    def __init__(self, unit: str, limit: tuple[int, float]) -> None:
        self._unit = unit
        self._initial, self._per_second = limit
        self._began = time.monotonic()
        self._spent = 0

    def spend(self, amount: int) -> None:
        self._spent += amount
        if self._spent > self._initial + self._per_second * (time.monotonic() - self._began):
            raise Overrun(
                f"the server sent {self._spent:,} {self._unit}, far more than the build of an index needs"
            )


class _Connection(PatientConnection):
    def start_budgets(self) -> None:
        """Start the budgets. Called once, before anything is received."""
        self._buffer = b""
        self._packets = _Budget("packets", _PACKETS)
        self._bytes = _Budget("bytes", _BYTES)
        self._key_exchanges = _Budget("key exchanges", _KEY_EXCHANGES)
        self.overrun: Overrun | None = None

    def data_received(self, data: bytes, datatype: Any = None) -> None:
        self._buffer += data
        if len(self._buffer) == len(data):  # otherwise the next turn is already scheduled
            self._process_chunk()

    def _process_chunk(self) -> None:
        chunk, self._buffer = self._buffer[:_CHUNK], self._buffer[_CHUNK:]
        if self._transport is not None:
            super().data_received(chunk)
        if self._transport is None:  # it has ended
            self._buffer = b""
        elif self._buffer:
            self._transport.pause_reading()
            self._loop.call_soon(self._process_chunk)
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
    """The client for bounded connections."""

    def connection_made(self, conn: asyncssh.SSHClientConnection) -> None:
        conn.__class__ = _Connection  # asyncssh has no option for it
        assert isinstance(conn, _Connection)
        conn.start_budgets()


def overrun_of(connection: asyncssh.SSHClientConnection | None) -> Overrun | None:
    """Return the exceeded budget that ended a connection, if any."""
    return connection.overrun if isinstance(connection, _Connection) else None
