"""Reads files, and decides how far to trust the md5."""

import contextlib
import errno
import functools
import hashlib
import os
import stat
import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

from airflow_mdbackup.provider_side.indexer.cache import (
    ROTTEN,
    SOUND,
    STATUS,
    TICK_NS,
    WRITEBACK_NS,
    status_of,
    trust,
)
from airflow_mdbackup.provider_side.indexer.common import (
    BLOCK_BYTES,
    GONE,
    OPEN_FILE,
    POLL_SECONDS,
    SLASH,
    open_below,
    reason_of,
    time_ns,
)
from airflow_mdbackup.provider_side.indexer.lines import MUST_ESCAPE, index_line

HASH_TRIES = 3
SMALL_BYTES = 1 << 15
BIG_BYTES = 32 << 20

# Filesystems whose times are set by this machine's clock.
LOCAL_FILESYSTEMS = frozenset(
    b"bcachefs btrfs erofs exfat ext2 ext3 ext4 f2fs hfsplus iso9660 jfs msdos nilfs2 ntfs ntfs3 overlay"
    b" ramfs reiserfs squashfs tmpfs udf ufs vfat xfs zfs".split()
)

# FIPS rules forbid md5 unless it is declared not to be for security, which elsewhere only costs time.
new_md5: Any = hashlib.md5
try:
    hashlib.md5()  # noqa: S324
except ValueError:
    new_md5 = functools.partial(hashlib.md5, usedforsecurity=False)


class Job(NamedTuple):
    """What to hash: names, each after its directory (which ends in a slash) if the previous one's differs.

    `known` has for each name what the cache knows of the file as it is now: status, trust, md5, or nothing.
    """

    names: List[bytes]
    known: List[bytes]
    single: bool  # hash big files too
    joined: bool  # lines and records may be returned in one piece, which is cheaper
    cache_age: int  # nanoseconds since the end of the build from which `known` is


class Answer(NamedTuple):
    """The result of a job: for each name its index line and record, empty if it has none."""

    lines: List[bytes]
    records: List[bytes]
    refused: List[Tuple[bytes, str]]  # path, reason
    rotten: List[bytes]  # records
    big: List[Tuple[int, bytes, bytes]]  # left for a job of its own: number of the name, path, known
    size: int = 0
    hashed: int = 0


class Unsteady(Exception):
    """A file changed while it was read, at each try."""


class Hasher:
    """Hashes jobs. `before_use(bytes)` limits the rate, `on_block(bytes)` is called within large files."""

    def __init__(
        self, root: int, before_use: Optional[Callable[[int], None]], on_block: Callable[[int], None]
    ) -> None:
        self._root = root
        self._before_use = before_use
        self._on_block = on_block
        self._is_local: Dict[int, bool] = {}  # by device
        self._buffer = bytearray(BLOCK_BYTES)

    def run(self, job: Job) -> Answer:
        answer = Answer([], [], [], [], [])
        size_of_all = hashed_files = 0
        folder, folder_error = b"", None  # type: Tuple[bytes, Optional[OSError]]
        known = iter(job.known)
        escape = MUST_ESCAPE(b"".join(job.names)) is not None
        # A file that was last modified before this time is not being changed while we hash it.
        settled_before = time_ns() - TICK_NS - 10**6
        for name in job.names:
            if name[-1] == SLASH:
                folder, folder_error = name, self._enter(name)
                continue
            path = folder + name
            before = next(known)
            line = record = b""
            try:
                if folder_error is not None:
                    raise folder_error
                hashed = self._hash_small(name, settled_before) if not before else None
                if hashed is None:
                    hashed = self._hash_any(name, before, job)
                if hashed is None:
                    answer.big.append((len(answer.lines), path, before))
                else:
                    status, value, size = hashed
                    line = index_line(value[1:], path) if escape else value[1:] + b"  " + path + b"\n"
                    record = status + path + b"\0" + value
                    size_of_all += size
                    hashed_files += 1
                    if value[0] == ROTTEN:
                        answer.rotten.append(record)
            except Unsteady:
                answer.refused.append((path, "changed while being read"))
            except OSError as error:
                if error.errno not in GONE and (folder_error is not None or may_be_file(name)):
                    answer.refused.append((path, reason_of(error)))
            answer.lines.append(line)
            answer.records.append(record)
        answer = answer._replace(size=size_of_all, hashed=hashed_files)
        if job.joined and not answer.big:
            return answer._replace(lines=[b"".join(answer.lines)], records=[b"".join(answer.records)])
        return answer

    def _enter(self, folder: bytes) -> Optional[OSError]:
        """Change into a directory below the root, following no symlink; return the error if that fails."""
        try:
            descriptor = open_below(self._root, folder)
            try:
                os.fchdir(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            return error
        return None

    @staticmethod
    def _open(name: bytes) -> int:
        """Open a file; if another program holds a lease on it, the kernel makes it give that up soon."""
        for _ in range(HASH_TRIES):
            try:
                return os.open(name, OPEN_FILE)
            except BlockingIOError:
                time.sleep(POLL_SECONDS)
        return os.open(name, OPEN_FILE)

    def _hash_small(self, name: bytes, settled_before: int) -> Optional[Tuple[bytes, bytes, int]]:
        """Hash a small file that is not being changed, with one read; None if the file is not like that."""
        descriptor = self._open(name)
        try:
            data = os.read(descriptor, SMALL_BYTES)
            found = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        size, modified, changed = found.st_size, found.st_mtime_ns, found.st_ctime_ns
        latest = modified if modified > changed else changed
        if latest >= settled_before or len(data) != size or size >= SMALL_BYTES:
            return None
        if not stat.S_ISREG(found.st_mode) or not self._is_local.get(found.st_dev):
            return None
        if self._before_use is not None:
            self._before_use(size)
        trusted = b"s" if latest < settled_before + TICK_NS - WRITEBACK_NS else b"y"
        return status_of(found), trusted + new_md5(data).hexdigest().encode(), size

    def _hash_any(self, name: bytes, known: bytes, job: Job) -> Optional[Tuple[bytes, bytes, int]]:
        """Hash a file of any size and age; return status, trust with md5, and size in bytes.

        Returns None for a big file that should have a job of its own. Raises `Unsteady` if it changes while
        it is read, at each try.
        """
        for _ in range(HASH_TRIES):
            descriptor = self._open(name)
            try:
                started = time_ns()
                found = os.fstat(descriptor)
                if not stat.S_ISREG(found.st_mode):
                    raise FileNotFoundError(errno.ENOENT, "no longer a regular file")
                if found.st_size >= BIG_BYTES and not job.single:
                    return None
                status = status_of(found)
                md5, size = self._read_md5(descriptor, found)
                if status != status_of(os.fstat(descriptor)):
                    continue
                local = self._has_local_times(found, descriptor)
                age = started - max(found.st_mtime_ns, found.st_ctime_ns) if local else -1
                if known[: STATUS.size] != status:
                    return status, b"%c%s" % (trust(age, 0), md5), size
                trusted, known_md5 = known[STATUS.size], known[STATUS.size + 1 :]
                if md5 == known_md5 or trusted not in (SOUND, ROTTEN):
                    return status, b"%c%s" % (trust(age, job.cache_age), md5), size
                # Once the file's pages are written back, a later change through mmap updates its times.
                with contextlib.suppress(OSError):
                    os.fsync(descriptor)
                os.lseek(descriptor, 0, os.SEEK_SET)
                second_md5, _ = self._read_md5(descriptor, found)
                if second_md5 == md5 and status == status_of(os.fstat(descriptor)):
                    return status, b"%c%s" % (ROTTEN, known_md5), size
            finally:
                os.close(descriptor)
        raise Unsteady

    def _read_md5(self, descriptor: int, found: os.stat_result) -> Tuple[bytes, int]:
        """Return the md5 and the number of bytes of a file.

        It stops early if the file grows while it is read: the writer might be faster for ever.
        """
        md5 = new_md5()
        size = 0
        view = memoryview(self._buffer)
        while True:
            count = os.readv(descriptor, [view])
            if not count:
                return md5.hexdigest().encode(), size
            if self._before_use is not None:
                self._before_use(count)
            md5.update(view[:count])
            size += count
            if count == BLOCK_BYTES:
                self._on_block(size)
            if size > found.st_size and status_of(os.fstat(descriptor)) != status_of(found):
                return md5.hexdigest().encode(), size

    def _has_local_times(self, found: os.stat_result, descriptor: int) -> bool:
        """Whether this machine's clock sets the file's times, as far as that can be known."""
        if found.st_dev not in self._is_local:
            self._is_local[found.st_dev] = is_local(descriptor, found.st_dev)
        return self._is_local[found.st_dev]


def is_local(descriptor: int, device: int) -> bool:
    """Whether an open file is on a local filesystem.

    Source: proc_pid_mountinfo(5), and mnt_id of proc_pid_fdinfo(5), since on btrfs or overlay the device of a
    file need not be that of a mount. Before Linux 3.15 there is only the device.
    """
    mount = None
    with contextlib.suppress(OSError, ValueError, IndexError):
        with open("/proc/self/fdinfo/%d" % descriptor, "rb") as lines:
            for line in lines:
                if line.startswith(b"mnt_id:"):
                    mount = line.split()[1]
        with open("/proc/self/mountinfo", "rb") as lines:
            for line in lines:
                fields = line.split()
                major, minor = fields[2].split(b":")
                if fields[0] == mount if mount else os.makedev(int(major), int(minor)) == device:
                    return fields[fields.index(b"-") + 1] in LOCAL_FILESYSTEMS
    return False


def may_be_file(name: bytes) -> bool:
    """Whether a name is that of a regular file, or might be."""
    try:
        return stat.S_ISREG(os.lstat(name).st_mode)
    except OSError as error:
        return error.errno not in GONE
