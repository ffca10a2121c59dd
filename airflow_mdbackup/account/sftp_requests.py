"""Single SFTP requests, answered with the very status code that a library would hide.

The code is the evidence: ``internal-sftp -R -p ...`` answers ``PERMISSION_DENIED`` to what it does not allow
*before* it looks at the path; anything looser looks, and finds that there is no such file. So names that do
not exist, and handles that were never given, prove what is allowed, and no data is ever touched.

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
_READ_FLAG, _WRITE_FLAG, _CREATE_FLAG, _NEW_FLAG = 0x01, 0x02, 0x08, 0x20
_MOST = 256 << 10  # bytes of an answer

OK, NO_SUCH_FILE, PERMISSION_DENIED, UNSUPPORTED = 0, 2, 3, 8
_WORDS = {
    OK: "done",
    1: "end of file",
    NO_SUCH_FILE: "no such file",
    PERMISSION_DENIED: "permission denied",
    4: "failure",
    5: "bad message",
    UNSUPPORTED: "unsupported",
}


class NoSftp(Unanswered):
    """What was started is no SFTP server.

    :ivar ended: it ended without a word.
    """

    def __init__(self, message: str, *, ended: bool = False) -> None:
        super().__init__(message)
        self.ended = ended


class Channel(Protocol):
    """What is needed of a channel on which a subsystem runs."""

    def sendall(self, data: bytes, /) -> object: ...

    def recv(self, size: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Answer:
    """A server's answer: a status code, or ``OK`` with the handle or name that it gave."""

    code: int
    value: bytes = b""

    @property
    def refused(self) -> bool:
        """Whether the server does not do such a thing at all, or not for this account."""
        return self.code in (PERMISSION_DENIED, UNSUPPORTED)

    def __str__(self) -> str:
        return f"{_WORDS.get(self.code, 'status')} ({self.code})"


class Requests:
    """Requests to an SFTP server, one at a time. Paths are absolute bytes, handles what an answer gave.

    :param channel: a channel on which the subsystem was started, with a timeout set.
    :raises NoSftp: what answers is no SFTP server of version 3 or newer.
    :raises Unanswered: nothing answers; so may every request.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._number = 0
        self._is_over = False
        self._send(_INIT, struct.pack(">I", 3))
        kind, body = self._receive()
        if kind != _VERSION or len(body) < 4:
            raise NoSftp(f"what answers is no SFTP server: {to_text(bytes([kind]) + body[:60])}")

    # --- reading ------------------------------------------------------------------------------------

    def stat(self, path: bytes) -> Answer:
        return self._ask(_STAT, _text(path))

    def look_by_opening(self, path: bytes) -> Answer:
        """Open a file or directory for reading, and close it."""
        answer = self._ask(_OPEN, _text(path) + struct.pack(">II", _READ_FLAG, 0))
        if answer.code == OK:
            self.close(answer.value)
        return answer

    def opendir(self, path: bytes) -> Answer:
        return self._ask(_OPENDIR, _text(path))

    def readdir(self, handle: bytes) -> Answer:
        return self._ask(_READDIR, _text(handle))

    def close(self, handle: bytes) -> Answer:
        return self._ask(_CLOSE, _text(handle))

    def readlink(self, path: bytes) -> Answer:
        return self._ask(_READLINK, _text(path))

    def statvfs(self, path: bytes) -> Answer:
        return self._extended(b"statvfs@openssh.com", _text(path))

    def fstatvfs(self, handle: bytes) -> Answer:
        return self._extended(b"fstatvfs@openssh.com", _text(handle))

    def names_of_ids(self) -> Answer:
        """Ask for the names of no users and no groups."""
        return self._extended(b"users-groups-by-id@openssh.com", _text(b"") + _text(b""))

    def home_directory(self, user: bytes) -> Answer:
        return self._extended(b"home-directory", _text(user))

    def expand_path(self, path: bytes) -> Answer:
        return self._extended(b"expand-path@openssh.com", _text(path))

    # --- changing -----------------------------------------------------------------------------------

    def open_to_write(self, path: bytes) -> Answer:
        """Open a file that exists for writing, without emptying it."""
        return self._ask(_OPEN, _text(path) + struct.pack(">II", _WRITE_FLAG, 0))

    def create(self, path: bytes) -> Answer:
        """Open a file for writing that must not exist."""
        flags = _WRITE_FLAG | _CREATE_FLAG | _NEW_FLAG
        return self._ask(_OPEN, _text(path) + struct.pack(">II", flags, 0))

    def write(self, handle: bytes) -> Answer:
        return self._ask(_WRITE, _text(handle) + struct.pack(">Q", 0) + _text(b""))

    def remove(self, path: bytes) -> Answer:
        return self._ask(_REMOVE, _text(path))

    def mkdir(self, path: bytes) -> Answer:
        return self._ask(_MKDIR, _text(path) + struct.pack(">I", 0))

    def rmdir(self, path: bytes) -> Answer:
        return self._ask(_RMDIR, _text(path))

    def rename(self, path: bytes, new: bytes) -> Answer:
        return self._ask(_RENAME, _text(path) + _text(new))

    def symlink(self, path: bytes, target: bytes) -> Answer:
        return self._ask(_SYMLINK, _text(target) + _text(path))

    def setstat(self, path: bytes) -> Answer:
        """Ask for a change of nothing."""
        return self._ask(_SETSTAT, _text(path) + struct.pack(">I", 0))

    def fsync(self, handle: bytes) -> Answer:
        return self._extended(b"fsync@openssh.com", _text(handle))

    def fsetstat(self, handle: bytes) -> Answer:
        return self._ask(_FSETSTAT, _text(handle) + struct.pack(">I", 0))

    def lsetstat(self, path: bytes) -> Answer:
        """Ask for a change of nothing, of a link itself."""
        return self._extended(b"lsetstat@openssh.com", _text(path) + struct.pack(">I", 0))

    def posix_rename(self, path: bytes, new: bytes) -> Answer:
        return self._extended(b"posix-rename@openssh.com", _text(path) + _text(new))

    def hardlink(self, path: bytes, new: bytes) -> Answer:
        return self._extended(b"hardlink@openssh.com", _text(path) + _text(new))

    def copy_data(self, source: bytes, target: bytes) -> Answer:
        """Copy a byte from one open file to another."""
        what = _text(source) + struct.pack(">QQ", 0, 1) + _text(target) + struct.pack(">Q", 0)
        return self._extended(b"copy-data", what)

    def _extended(self, name: bytes, body: bytes) -> Answer:
        return self._ask(_EXTENDED, _text(name) + body)

    # --- packets ------------------------------------------------------------------------------------

    def _ask(self, kind: int, body: bytes) -> Answer:
        if self._is_over:
            raise Unanswered("the SFTP server has failed to answer before")
        self._is_over, self._number = True, self._number + 1
        self._send(kind, struct.pack(">I", self._number) + body)
        kind, answer = self._receive()
        if len(answer) < 8 or struct.unpack_from(">I", answer)[0] != self._number:
            raise Unanswered("the SFTP server speaks nonsense")
        self._is_over = False
        if kind == _STATUS:
            return Answer(struct.unpack_from(">I", answer, 4)[0])
        if kind == _HANDLE:
            return Answer(OK, _first_text(answer[4:]))
        if kind == _NAME:
            return Answer(OK, _first_text(answer[8:]))
        return Answer(OK)

    def _send(self, kind: int, body: bytes) -> None:
        try:
            self._channel.sendall(struct.pack(">IB", len(body) + 1, kind) + body)
        except (OSError, EOFError) as error:
            raise NoSftp("the SFTP server ended", ended=True) from error

    def _receive(self) -> tuple[int, bytes]:
        head = self._exactly(4)
        (size,) = struct.unpack(">I", head)
        if not 1 <= size <= _MOST:
            raise NoSftp(f'what answers is no SFTP server, but begins with "{to_text(head)}"')
        packet = self._exactly(size)
        return packet[0], packet[1:]

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                more = self._channel.recv(size - len(data))
            except TimeoutError as error:
                raise Unanswered("no SFTP server answers") from error
            except (OSError, EOFError) as error:
                raise NoSftp("the SFTP server ended", ended=not data) from error
            if not more:
                raise NoSftp("the SFTP server ended", ended=not data)
            data += more
        return data


def _text(value: bytes) -> bytes:
    return struct.pack(">I", len(value)) + value


def _first_text(data: bytes) -> bytes:
    size = struct.unpack_from(">I", data)[0] if len(data) >= 4 else 0
    return data[4 : 4 + size]
