"""Packets of SFTP version 3: their types, and how their fields are encoded and decoded.

Input from the server is checked here: a malformed packet ends the connection.

Source: draft-ietf-secsh-filexfer-02.
"""

from __future__ import annotations

import stat
import struct
from enum import IntEnum
from typing import NamedTuple

from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.errors import ConnectionLost

# OpenSSH sends at most 256 KiB. A server may send less than was requested, never more.
MAX_PACKET = (256 << 10) + 1024
MAX_HANDLE = 256
PACK_HEAD = struct.Struct(">IBI").pack  # length, type, id
UNPACK_LENGTH = struct.Struct(">I").unpack_from
UNPACK_KIND = struct.Struct(">BI").unpack_from  # type, id
PACK_READ = struct.Struct(">QI").pack
_UNPACK_ATTRIBUTES = struct.Struct(">IQIIIII").unpack_from  # flags, size, owner, group, mode, atime, mtime
_SPECIAL = {
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symlink",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a device",
    stat.S_IFCHR: "a device",
}


class Type:
    """Packet types. Plain integers for speed: they are compared millions of times."""

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
    """Status codes that matter here. Negative ones are our own, never sent by a server."""

    UNWANTED = -1
    SPECIAL = -2  # a directory, named pipe, socket or device
    TOO_LONG = -3  # it is longer than its sink accepts
    EOF = 1
    NO_SUCH_FILE = 2
    PERMISSION_DENIED = 3
    FAILURE = 4
    UNSUPPORTED = 8


class NotAnSftpServer(ConnectionLost):
    """What answers does not speak SFTP.

    :ivar sent: what it sent instead.
    """

    def __init__(self, sent: bytes) -> None:
        self.sent = sent
        super().__init__(
            f"the server does not speak SFTP; it sent {to_text(sent)!r}. Does a login shell print text?"
        )


class Attributes(NamedTuple):
    """A file's attributes; None for those that the server omits. ``mtime`` is in Unix seconds."""

    size: int | None
    mode: int | None
    mtime: int | None


class Refusal(NamedTuple):
    """An error status that the server sent instead of the requested data."""

    code: int
    message: str


# --- fields of packets ------------------------------------------------------------------------------


def encode_string(text: bytes) -> bytes:
    return len(text).to_bytes(4, "big") + text


def decode_string(body: memoryview, limit: int, position: int = 0) -> bytes:
    (length,) = struct.unpack_from(">I", body, position)
    if length > limit or position + 4 + length > len(body):
        raise ConnectionLost("the server sent more than was requested, or a malformed packet")
    return bytes(body[position + 4 : position + 4 + length])


def decode_extensions(body: memoryview) -> dict[bytes, bytes]:
    found = {}
    position = 0
    while position < len(body):
        name = decode_string(body, MAX_PACKET, position)
        data = decode_string(body, MAX_PACKET, position + 4 + len(name))
        found[name] = data
        position += 8 + len(name) + len(data)
    return found


def decode_attributes(body: memoryview) -> Attributes:
    (flags,) = UNPACK_LENGTH(body)
    if flags & 15 == 15:  # all fields, as OpenSSH always sends
        _, size, _, _, mode, _, mtime = _UNPACK_ATTRIBUTES(body)
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


def refuse_special(attributes: Attributes) -> Refusal | None:
    """Return the refusal if the attributes say that it is not a regular file, else None."""
    what = _SPECIAL.get(stat.S_IFMT(attributes.mode or 0))
    return Refusal(Code.SPECIAL, f"not a regular file but {what}") if what else None


def decode_refusal(kind: int, body: memoryview) -> Refusal:
    if kind != Type.STATUS:
        raise ConnectionLost(
            f"the server answered with a packet of type {kind}, which does not fit the request"
        )
    (code,) = struct.unpack_from(">I", body)
    message = decode_string(body, MAX_PACKET, 4)[:200] if len(body) >= 8 else b""
    return Refusal(code, to_text(message) or f"status {code}")
