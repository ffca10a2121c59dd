"""A large file on its way into staging, which a later try goes on with.

::

    taken up   what an earlier try left is hashed; its length is where the transfer goes on
    written    as the bytes come, hashing
    ended      the md5 of all of it proves it, also what was there before

What this does not give: what was left may be spoilt by a power cut. Then the md5 is wrong, and
:meth:`Part.restart` begins anew.
"""

from __future__ import annotations

import hashlib
import logging
import os

from airflow_mdbackup.scheme.common.progress import ReportTimer
from airflow_mdbackup.scheme.files.content import end_sparse, forget_cached, write_sparse

log = logging.getLogger(__name__)

_BLOCK = 1 << 20


class PartialFile:
    """The sink of a large file.

    :param descriptor: of the locked file; it is the part's from now on.
    :param size: bytes that the whole has. What is longer is no beginning of it.
    :param room: bytes that it may have if the server was wrong about that; None: any number.
    :ivar position: bytes that are there, of ``size``.
    :ivar resumed: whether some of them are of an earlier try.
    :raises OSError: the disk is broken; the file is closed then.
    """

    def __init__(self, descriptor: int, size: int, room: int | None = None) -> None:
        self._descriptor = descriptor
        self.size = size
        self.room = room
        self._md5 = hashlib.md5(usedforsecurity=False)
        self.position = 0
        try:
            if os.fstat(descriptor).st_size <= size:
                self._hash_what_is_there()
            else:
                os.ftruncate(descriptor, 0)
        except BaseException:
            self.close()
            raise
        self.resumed = self.position > 0

    def _hash_what_is_there(self) -> None:
        pace = ReportTimer()
        forget_cached(self._descriptor)
        while block := os.read(self._descriptor, _BLOCK):
            self._md5.update(block)
            self.position += len(block)
            if pace.due():
                log.info("Hashing what an earlier try left: %.1f MB so far", self.position / 1e6)

    def write(self, data: bytes | memoryview) -> None:
        """Take the bytes that follow.

        :raises OSError: the disk is full or broken.
        """
        self._md5.update(data)
        write_sparse(self._descriptor, data)
        self.position += len(data)

    def digest(self) -> bytes:
        """Return the md5 of all bytes, in hexadecimal digits."""
        end_sparse(self._descriptor)
        return self._md5.hexdigest().encode()

    def head(self, size: int) -> bytes:
        """Return its first bytes, at most ``size`` of them."""
        return os.pread(self._descriptor, size, 0)

    def restart(self) -> None:
        """Forget all bytes."""
        self._md5 = hashlib.md5(usedforsecurity=False)
        os.ftruncate(self._descriptor, 0)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        self.position = 0
        self.resumed = False

    def close(self) -> None:
        """Let go of the file, and of the lock on it. It stays."""
        os.close(self._descriptor)
