"""A large file on its way into staging, which a later try can resume.

::

    open     hash what an earlier try left; its length is where the transfer resumes
    write    append and hash the bytes as they arrive
    digest   the md5 of the whole file proves it, including what an earlier try left

Limitations: a power cut may corrupt what an earlier try left. Then the md5 is wrong, and
:meth:`PartialFile.restart` starts over.
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

    :param descriptor: of the locked file, which this object owns from now on.
    :param size: bytes of the complete file. A longer part cannot be its beginning and is truncated.
    :param room: the most bytes to accept if the file turns out larger than ``size``; None: any number.
    :ivar position: bytes written so far.
    :ivar resumed: whether some of them are from an earlier try.
    :raises OSError: the disk is broken; the descriptor is then closed.
    """

    def __init__(self, descriptor: int, size: int, room: int | None = None) -> None:
        self._descriptor = descriptor
        self.size = size
        self.room = room
        self._md5 = hashlib.md5(usedforsecurity=False)
        self.position = 0
        try:
            if os.fstat(descriptor).st_size <= size:
                self._hash_existing()
            else:
                os.ftruncate(descriptor, 0)
        except BaseException:
            self.close()
            raise
        self.resumed = self.position > 0

    def _hash_existing(self) -> None:
        timer = ReportTimer()
        forget_cached(self._descriptor)
        while block := os.read(self._descriptor, _BLOCK):
            self._md5.update(block)
            self.position += len(block)
            if timer.due():
                log.info("Hashing the part that an earlier try left: %.1f MB so far", self.position / 1e6)

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes.

        :raises OSError: the disk is full or broken.
        """
        self._md5.update(data)
        write_sparse(self._descriptor, data)
        self.position += len(data)

    def digest(self) -> bytes:
        """Return the md5 of the whole file, in hexadecimal digits."""
        end_sparse(self._descriptor)
        return self._md5.hexdigest().encode()

    def head(self, size: int) -> bytes:
        """Return up to ``size`` bytes from its beginning."""
        return os.pread(self._descriptor, size, 0)

    def restart(self) -> None:
        """Truncate the file and start over."""
        self._md5 = hashlib.md5(usedforsecurity=False)
        os.ftruncate(self._descriptor, 0)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        self.position = 0
        self.resumed = False

    def close(self) -> None:
        """Close the file, which releases its lock. The file remains."""
        os.close(self._descriptor)
