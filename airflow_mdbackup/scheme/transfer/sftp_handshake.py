"""The start of an SFTP session: agrees on the version, learns the server's limits, measures the round trip.

Sources: draft-ietf-secsh-filexfer-02, section 4; OpenSSH ``PROTOCOL`` section 4.8 (limits@openssh.com).
"""

from __future__ import annotations

import struct
import time
from typing import NamedTuple

from airflow_mdbackup.scheme.errors import ConnectionLost
from airflow_mdbackup.scheme.transfer.packet_stream import PacketStream
from airflow_mdbackup.scheme.transfer.sftp_packets import Type, decode_extensions, encode_string

DEFAULT_READ = 32 << 10  # bytes of a READ that every server must be able to answer
_MAX_READ = 255 << 10
_MAX_FILES = 1000  # whatever the server allows: enough to fill a line of 20 ms with small files


class Session(NamedTuple):
    """What the handshake found.

    :ivar read_size: bytes to request with one READ.
    :ivar max_files: how many files may be open at a time; None if the server does not say.
    :ivar round_trip: seconds from a request to its reply.
    """

    read_size: int
    max_files: int | None
    round_trip: float


def handshake(stream: PacketStream) -> Session:
    """Begin a session on a channel on which the SFTP subsystem has just been started.

    :raises ConnectionLost: no SFTP server answers, or it breaks the protocol.
    """
    stream.send(Type.INIT, 3, b"")
    kind, body, _ = _exchange(stream)
    if kind != Type.VERSION:
        raise ConnectionLost("the server does not speak SFTP: it did not answer with its version")
    try:
        extensions = decode_extensions(body)
    except struct.error:
        raise ConnectionLost("the server sent a malformed version packet") from None
    name, request = b"limits@openssh.com", Type.EXTENDED
    if extensions.get(name) != b"1":
        # Any request measures the round trip. VERSION does not: it may have had to wait for a login.
        name, request = b".", Type.REALPATH
    stream.send(request, 0, encode_string(name))
    kind, body, round_trip = _exchange(stream)
    if kind != Type.EXTENDED_REPLY or len(body) < 32:
        return Session(DEFAULT_READ, None, round_trip)
    _, read_size, _, handles = struct.unpack_from(">QQQQ", body)
    return Session(
        # Smaller READs than every server must support would only mean more requests in flight.
        max(DEFAULT_READ, min(read_size, _MAX_READ)),
        max(1, min(_MAX_FILES, handles - 1)) if handles else None,
        round_trip,
    )


def _exchange(stream: PacketStream) -> tuple[int, memoryview, float]:
    """Send what is queued, and return type and body of the next packet, and the seconds that it took."""
    sent = time.monotonic()
    stream.flush()
    while True:
        stream.receive()
        for kind, _, body in stream.packets():
            return kind, body, time.monotonic() - sent
