"""Single SFTP requests, with the status codes that libraries hide.

The code is the evidence: ``internal-sftp -R -p ...`` answers ``PERMISSION_DENIED`` to a forbidden request
*before* it looks at the path; a looser server looks, and finds no such file. So names that do not exist, and
handles that were never issued, prove what is allowed without touching any data.

Sources: draft-ietf-secsh-filexfer-02 (SFTP version 3), OpenSSH ``PROTOCOL`` section 4, sftp-server(8).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Protocol

from airflow_mdbackup.account.connection import Unanswered
from airflow_mdbackup.scheme.common.paths import to_text

_INIT, _VERSION, _STATUS, _HANDLE, _NAME, _EXTENDED = 1, 2, 101, 102, 104, 200
_OPEN, _CLOSE, _WRITE, _SETSTAT, _FSETSTAT, _OPENDIR, _READDIR = 3, 4, 6, 9, 10, 11, 12
_REMOVE, _MKDIR, _RMDIR, _STAT, _RENAME, _READLINK, _SYMLINK = 13, 14, 15, 17, 18, 19, 20
_READ_FLAG, _WRITE_FLAG, _CREATE_FLAG, _EXCLUSIVE_FLAG = 0x01, 0x02, 0x08, 0x20
_MAX_PACKET = 256 << 10  # bytes

OK, NO_SUCH_FILE, PERMISSION_DENIED, UNSUPPORTED = 0, 2, 3, 8
_STATUS_NAMES = {
    OK: "done",
    1: "end of file",
    NO_SUCH_FILE: "no such file",
    PERMISSION_DENIED: "permission denied",
    4: "failure",
    5: "bad message",
    UNSUPPORTED: "unsupported",
}


class NoSftp(Unanswered):
    """What was started is not an SFTP server.

    :ivar ended: it ended without any output.
    """

    def __init__(self, message: str, *, ended: bool = False) -> None:
        super().__init__(message)
        self.ended = ended


class Channel(Protocol):
    """The methods used of a channel that runs a subsystem."""

    def sendall(self, data: bytes, /) -> object: ...

    def recv(self, size: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Answer:
    """A server's answer: a status code, or ``OK`` with a handle or name as ``value``."""

    code: int
    value: bytes = b""

    @property
    def refused(self) -> bool:
        """Whether the server does not support such requests, or not for this account."""
        return self.code in (PERMISSION_DENIED, UNSUPPORTED)

    def __str__(self) -> str:
        return f"{_STATUS_NAMES.get(self.code, 'status')} ({self.code})"


class Requests:
    """Requests to an SFTP server, one at a time. Paths are absolute, in bytes; handles come from answers.

    :param channel: a channel on which the subsystem was started, with a timeout set.
    :raises NoSftp: this is not an SFTP server of version 3 or newer.
    :raises Unanswered: no answer. Every request may raise it as well.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._number = 0
        self._failed = False
        self._send(_INIT, struct.pack(">I", 3))
        kind, body = self._receive()
        if kind != _VERSION or len(body) < 4:
            raise NoSftp(f"this is not an SFTP server; it sent {to_text(bytes([kind]) + body[:60])}")

    # --- reading ------------------------------------------------------------------------------------

    def stat(self, path: bytes) -> Answer:
        return self._request(_STAT, _string(path))

    def open_to_read(self, path: bytes) -> Answer:
        """Open a file or directory for reading, and close it."""
        answer = self._request(_OPEN, _string(path) + struct.pack(">II", _READ_FLAG, 0))
        if answer.code == OK:
            self.close(answer.value)
        return answer

    def opendir(self, path: bytes) -> Answer:
        return self._request(_OPENDIR, _string(path))

    def readdir(self, handle: bytes) -> Answer:
        return self._request(_READDIR, _string(handle))

    def close(self, handle: bytes) -> Answer:
        return self._request(_CLOSE, _string(handle))

    def readlink(self, path: bytes) -> Answer:
        return self._request(_READLINK, _string(path))

    def statvfs(self, path: bytes) -> Answer:
        return self._extended(b"statvfs@openssh.com", _string(path))

    def fstatvfs(self, handle: bytes) -> Answer:
        return self._extended(b"fstatvfs@openssh.com", _string(handle))

    def names_of_ids(self) -> Answer:
        """Request the names of an empty list of users and groups."""
        return self._extended(b"users-groups-by-id@openssh.com", _string(b"") + _string(b""))

    def home_directory(self, user: bytes) -> Answer:
        return self._extended(b"home-directory", _string(user))

    def expand_path(self, path: bytes) -> Answer:
        return self._extended(b"expand-path@openssh.com", _string(path))

    # --- changing -----------------------------------------------------------------------------------

    def open_to_write(self, path: bytes) -> Answer:
        """Open an existing file for writing, without truncating it."""
        return self._request(_OPEN, _string(path) + struct.pack(">II", _WRITE_FLAG, 0))

    def create(self, path: bytes) -> Answer:
        """Create a file, which must not exist, and open it for writing."""
        flags = _WRITE_FLAG | _CREATE_FLAG | _EXCLUSIVE_FLAG
        return self._request(_OPEN, _string(path) + struct.pack(">II", flags, 0))

    def write(self, handle: bytes) -> Answer:
        return self._request(_WRITE, _string(handle) + struct.pack(">Q", 0) + _string(b""))

    def remove(self, path: bytes) -> Answer:
        return self._request(_REMOVE, _string(path))

    def mkdir(self, path: bytes) -> Answer:
        return self._request(_MKDIR, _string(path) + struct.pack(">I", 0))

    def rmdir(self, path: bytes) -> Answer:
        return self._request(_RMDIR, _string(path))

    def rename(self, path: bytes, new: bytes) -> Answer:
        return self._request(_RENAME, _string(path) + _string(new))

    def symlink(self, path: bytes, target: bytes) -> Answer:
        return self._request(_SYMLINK, _string(target) + _string(path))

    def setstat(self, path: bytes) -> Answer:
        """Request an empty change of attributes."""
        return self._request(_SETSTAT, _string(path) + struct.pack(">I", 0))

    def fsync(self, handle: bytes) -> Answer:
        return self._extended(b"fsync@openssh.com", _string(handle))

    def fsetstat(self, handle: bytes) -> Answer:
        return self._request(_FSETSTAT, _string(handle) + struct.pack(">I", 0))

    def lsetstat(self, path: bytes) -> Answer:
        """Request an empty change of attributes, of a symlink itself."""
        return self._extended(b"lsetstat@openssh.com", _string(path) + struct.pack(">I", 0))

    def posix_rename(self, path: bytes, new: bytes) -> Answer:
        return self._extended(b"posix-rename@openssh.com", _string(path) + _string(new))

    def hardlink(self, path: bytes, new: bytes) -> Answer:
        return self._extended(b"hardlink@openssh.com", _string(path) + _string(new))

    def copy_data(self, source: bytes, target: bytes) -> Answer:
        """Copy a byte from one open file to another."""
        body = _string(source) + struct.pack(">QQ", 0, 1) + _string(target) + struct.pack(">Q", 0)
        return self._extended(b"copy-data", body)

    def _extended(self, name: bytes, body: bytes) -> Answer:
        return self._request(_EXTENDED, _string(name) + body)

    # --- packets ------------------------------------------------------------------------------------

    def _request(self, kind: int, body: bytes) -> Answer:
        if self._failed:
            raise Unanswered("the SFTP server did not answer an earlier request")
        self._failed, self._number = True, self._number + 1
        self._send(kind, struct.pack(">I", self._number) + body)
        kind, answer = self._receive()
        if len(answer) < 8 or struct.unpack_from(">I", answer)[0] != self._number:
            raise Unanswered("the SFTP server sent a malformed answer")
        self._failed = False
        if kind == _STATUS:
            return Answer(struct.unpack_from(">I", answer, 4)[0])
        if kind == _HANDLE:
            return Answer(OK, _first_string(answer[4:]))
        if kind == _NAME:
            return Answer(OK, _first_string(answer[8:]))
        return Answer(OK)

    def _send(self, kind: int, body: bytes) -> None:
        try:
            self._channel.sendall(struct.pack(">IB", len(body) + 1, kind) + body)
        except (OSError, EOFError) as error:
            raise NoSftp("the SFTP server ended", ended=True) from error

    def _receive(self) -> tuple[int, bytes]:
        head = self._receive_exactly(4)
        (size,) = struct.unpack(">I", head)
        if not 1 <= size <= _MAX_PACKET:
            raise NoSftp(f'this is not an SFTP server: its output begins with "{to_text(head)}"')
        packet = self._receive_exactly(size)
        return packet[0], packet[1:]

    def _receive_exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                more = self._channel.recv(size - len(data))
            except TimeoutError as error:
                raise Unanswered("the SFTP server does not answer") from error
            except (OSError, EOFError) as error:
                raise NoSftp("the SFTP server ended", ended=not data) from error
            if not more:
                raise NoSftp("the SFTP server ended", ended=not data)
            data += more
        return data


def _string(value: bytes) -> bytes:
    return struct.pack(">I", len(value)) + value


def _first_string(data: bytes) -> bytes:
    size = struct.unpack_from(">I", data)[0] if len(data) >= 4 else 0
    return data[4 : 4 + size]
