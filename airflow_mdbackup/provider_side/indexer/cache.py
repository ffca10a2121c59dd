"""What the last build knew of each file, in path order.

A record is STATUS, the path, NUL, how far to trust the md5 (one byte), and the md5 in hex. The file ends with
the records of rotten files once more, and a line with its checksum. `Builder._add_files` decides whether a
record makes hashing unnecessary.
"""

import os
import re
import stat
import struct
import zlib
from typing import Iterator, Optional

from airflow_mdbackup.provider_side.indexer.common import BLOCK_BYTES, MAX_PATH_BYTES, reason_of
from airflow_mdbackup.provider_side.indexer.place import Place
from airflow_mdbackup.provider_side.indexer.report import Report

STATUS = struct.Struct(">QqqQQ")  # size, mtime_ns, ctime_ns, inode, device
DEVICE_BYTES = 8
VALUE_BYTES = 33  # trust and md5
SOUND = 0x73  # 's', beyond doubt
YOUNG = 0x79  # 'y', to be hashed once more when it is older: mmap may have changed it without a trace
RACY = 0x72  # 'r', hashed too soon after it was modified
ROTTEN = 0x58  # 'X'
TICK_NS = 2 * 10**9
WRITEBACK_NS = 60 * 10**9
CACHE_END = b"mdbackup cache end format=1 ended=%019d position=%010d rotten=%010d crc=%010d\n"
CACHE_END_PATTERN = (
    rb"mdbackup cache end format=1 ended=([0-9]{19}) position=([0-9]{10}) rotten=([0-9]{10})"
    rb" crc=([0-9]{10})\n"
)
CACHE_END_BYTES = len(CACHE_END % (0, 0, 0, 0))


def cache_end(ended: int, position: int, rotten: int, crc: int) -> bytes:
    """Return the last line of a cache.

    `ended` is Unix nanoseconds, `position` where the rolling re-hash continues, `rotten` how many bytes
    before this line have the records of rotten files once more.
    """
    return CACHE_END % (ended, position, rotten, crc)


def checksum(descriptor: int, length: int) -> int:
    """Return the CRC-32 of the first `length` bytes of a file, -1 if it is shorter."""
    crc = offset = 0
    while offset < length:
        data = os.pread(descriptor, min(BLOCK_BYTES, length - offset), offset)
        if not data:
            return -1
        crc = zlib.crc32(data, crc)
        offset += len(data)
    return crc


def status_of(found: os.stat_result) -> bytes:
    """Return what a record holds of a file's status."""
    size, modified, changed = found.st_size, found.st_mtime_ns, found.st_ctime_ns
    try:
        return STATUS.pack(size, modified, changed, found.st_ino, found.st_dev)
    except struct.error:  # before 1678, or after 2262
        return STATUS.pack(size, wrapped(modified), wrapped(changed), found.st_ino, found.st_dev)


def wrapped(time: int) -> int:
    """Return a time modulo 64 bits: all that matters is that another time gives another number."""
    return (time + (1 << 63)) % (1 << 64) - (1 << 63)


def trust(age: int, unchanged_for: int) -> int:
    """Return how far to trust an md5.

    `age` is how many nanoseconds before hashing the file was last modified; `unchanged_for` is how long ago a
    build ended that found it as it is now, 0 if none did.
    """
    if max(age, unchanged_for) > WRITEBACK_NS:
        return SOUND
    return YOUNG if age > TICK_NS else RACY


class Cache:
    """The records of the last build, read along with the walk, which has the same order."""

    def __init__(self, descriptor: int, length: int, ended: int, position: int, rotten: int) -> None:
        self.ended = ended
        self.position = position
        length -= rotten
        self.rotten = {path_of(record): record for record in records_in(os.pread(descriptor, rotten, length))}
        self._descriptor = descriptor
        self._length = length
        self._read = 0  # bytes of the file
        self._data = b""
        self._at = 0  # in `_data`
        self._refill()

    def _refill(self) -> None:
        data = os.pread(self._descriptor, min(BLOCK_BYTES, self._length - self._read), self._read)
        self._read += len(data)
        self._data = self._data[self._at :] + data
        self._at = 0
        # Past this position a record may be incomplete, unless the whole file has been read.
        self._low = len(self._data) - 2 * MAX_PATH_BYTES if self._read < self._length else len(self._data) + 1

    def take(self, key: bytes) -> Optional[bytes]:
        """Return trust and md5 of the record that begins with `key`: status, path and NUL. None if missing.

        The paths must ascend from call to call.
        """
        if not self._data.startswith(key, self._at) and not self._find(key):
            return None
        end = self._at + len(key)
        value = self._data[end : end + VALUE_BYTES]
        self._at = end + VALUE_BYTES
        if self._at >= self._low:
            self._refill()
        return value

    def value_on_other_device(self, key: bytes) -> bytes:
        """Return trust and md5 of the record that `take` has just missed, if only its device differs.

        Some filesystems get another number at each boot. Such a record does not save hashing the file, but
        shows whether the content has changed.
        """
        data, at, end = self._data, self._at, self._at + len(key)
        before_device = STATUS.size - DEVICE_BYTES
        if (
            data[at + STATUS.size : end] == key[STATUS.size :]
            and data[at : at + before_device] == key[:before_device]
        ):
            return data[end : end + VALUE_BYTES]
        return b""

    def _find(self, key: bytes) -> bool:
        """Move to the key's path, or where it would be; return whether a record there begins with it."""
        path = key[STATUS.size : -1]
        while self._at < len(self._data):
            end = self._data.find(b"\0", self._at + STATUS.size)
            if end < 0:
                self._at = len(self._data)  # not a cache, although the checksum was right
                return False
            found = self._data[self._at + STATUS.size : end]
            if found >= path:
                return self._data.startswith(key, self._at)
            self._at = end + 1 + VALUE_BYTES
            if self._at >= self._low:
                self._refill()
        return False


def records_in(data: bytes) -> Iterator[bytes]:
    """Split data into records."""
    at = 0
    while at < len(data):
        end = data.index(b"\0", at + STATUS.size) + 1 + VALUE_BYTES
        yield data[at:end]
        at = end


def path_of(record: bytes) -> bytes:
    return record[STATUS.size : -1 - VALUE_BYTES]


def open_cache(place: Place, report: Report) -> Optional[Cache]:
    """Open the cache of the last build if it exists and is intact."""
    try:
        descriptor = place.open("cache", os.O_RDONLY)
    except FileNotFoundError:
        return None
    except OSError as error:
        report.note(f"the cache is not used, every file is hashed: {reason_of(error)}")
        return None
    status = os.fstat(descriptor)
    length = status.st_size - CACHE_END_BYTES
    if not stat.S_ISREG(status.st_mode) or status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
        report.note("the cache is not used, every file is hashed: others can write it, or it is not a file")
    else:
        end = re.fullmatch(CACHE_END_PATTERN, os.pread(descriptor, CACHE_END_BYTES, max(0, length)))
        if length >= 0 and end and checksum(descriptor, length) == int(end[4]):
            return Cache(descriptor, length, int(end[1]), int(end[2]), int(end[3]))
        report.note("the cache is not used, every file is hashed: it is damaged or of another format")
    os.close(descriptor)
    return None
