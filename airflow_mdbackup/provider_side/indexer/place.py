"""The index's directory, and the files beside the index: cache, lock, report, a request to stop."""

import contextlib
import fcntl
import os
import re
import stat
import time
from typing import Optional, Tuple

from airflow_mdbackup.provider_side.indexer.common import (
    GONE,
    OPEN_DIRECTORY,
    OPEN_PASSAGE,
    POLL_SECONDS,
    Failure,
    prefixes,
    printable,
    write_all,
)
from airflow_mdbackup.provider_side.indexer.report import Report
from airflow_mdbackup.provider_side.indexer.request import MAX_KEY_BYTES, Request, build_key, name_beside
from airflow_mdbackup.provider_side.indexer.watch import Watch

REMINDER_SECONDS = 60.0


class Place:
    """The directory of the index. It must be acquired before anything else than `open` is used."""

    def __init__(self, request: Request, root: int) -> None:
        self._request = request
        self.directory, self.name = request.index.rsplit(b"/", 1)
        self._key = build_key(request)
        self._names = {
            kind: self.name_of(b"." + kind.encode()) for kind in ("cache", "lock", "report", "stop")
        }
        # All of these, and the temporary files of this and any killed build, also of the shell indexer.
        name = re.escape(self.name)
        self._temporary = re.compile(rb"\.%s(\.cache)?\.[0-9]+\.[0-9]+\.tmp" % name)
        self.is_own = re.compile(
            rb"%s/?|\.%s\.(cache|lock|report|stop|lock\.d/)|\.%s(\.cache)?\.[0-9]+\.[0-9]+\.tmp/?"
            % (name, name, name)
        ).fullmatch
        self.folder = self._open_directory(root)
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISDIR(os.lstat(self.name, dir_fd=self.folder).st_mode):
                shown = printable(request.chroot + request.index)
                raise Failure(f"{shown} is a directory, and must be a file or missing")
        self._lock = self.open("lock", os.O_RDWR | os.O_CREAT)

    def name_of(self, suffix: bytes) -> bytes:
        """Return the name of a file beside the index."""
        return name_beside(self._request, suffix)

    def _open_directory(self, root: int) -> int:
        """Make the directory if it is missing; reject one that the backup account could not reach."""
        descriptor = os.open(b".", OPEN_PASSAGE if self.directory else OPEN_DIRECTORY, dir_fd=root)
        for prefix in prefixes(self.directory):
            name = prefix.rsplit(b"/", 1)[1]
            above = descriptor
            try:
                descriptor = os.open(
                    name, OPEN_DIRECTORY if prefix == self.directory else OPEN_PASSAGE, dir_fd=above
                )
            except FileNotFoundError:
                os.mkdir(name, dir_fd=above)
                descriptor = os.open(name, OPEN_DIRECTORY, dir_fd=above)
                # The backup account must be able to enter, whatever the umask is.
                os.fchmod(descriptor, 0o755)
            except OSError as error:
                if error.errno not in GONE:
                    raise
                path = printable(self._request.chroot + prefix)
                raise Failure(
                    f"{path} must be a directory, not a symlink or file, to hold the index"
                ) from error
            finally:
                os.close(above)
        return descriptor

    def open(self, kind: str, flags: int) -> int:
        """Open one of the files beside the index, which nobody else may read."""
        flags |= os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        return os.open(self._names[kind], flags, 0o600, dir_fd=self.folder)

    def rename(self, temporary: bytes, kind: str = "") -> None:
        """Rename a temporary file to the index, or to another of the files, and make that durable."""
        name = self._names[kind] if kind else self.name
        os.rename(temporary, name, src_dir_fd=self.folder, dst_dir_fd=self.folder)
        os.fsync(self.folder)

    def remove(self, name: bytes) -> None:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self.folder)

    # One build at a time.

    def acquire(self, report: Report, watch: Watch) -> Optional[int]:
        """Wait for the lock, or follow the build that holds it if it is of the same request.

        Returns None with the lock held, or the exit status of the build that was followed.
        """
        reminded: Tuple[Optional[bytes], float] = (None, 0.0)
        while not self._try_lock():
            holder = self._holder()
            if holder and holder == self._key:
                status = self._follow(report, watch)
                if status is not None:
                    return status
                continue
            if watch.stop_requested():
                raise Failure("stopped on request")
            if holder != reminded[0] or time.monotonic() - reminded[1] > REMINDER_SECONDS:
                reminded = (holder, time.monotonic())
                report.write_line("mdbackup waiting another build of this index is running, this one is next")
            time.sleep(POLL_SECONDS)
        self._announce(report)
        return None

    def _try_lock(self) -> bool:
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            # If somebody removed the file, others lock a new one.
            with contextlib.suppress(FileNotFoundError):
                there = os.lstat(self._names["lock"], dir_fd=self.folder)
                if os.path.samestat(there, os.fstat(self._lock)):
                    return True
            os.close(self._lock)
            self._lock = self.open("lock", os.O_RDWR | os.O_CREAT)

    def _holder(self) -> bytes:
        """Return the key of the running build, empty if it has none."""
        return os.pread(self._lock, MAX_KEY_BYTES + 1, 0).split(b"\n")[0]

    def _announce(self, report: Report) -> None:
        """Remove what killed builds left, start a report, and write our key into the lock, in this order."""
        for name in map(os.fsencode, os.listdir(self.folder)):
            if self._temporary.fullmatch(name):
                try:
                    os.unlink(name, dir_fd=self.folder)
                except (IsADirectoryError, PermissionError):  # of the shell indexer
                    self._remove_folder(name)
        self.remove(self._names["stop"])
        self.remove(self._names["report"])
        report.copy_to(self.open("report", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND))
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, self._key + b"\n", 0)

    def _remove_folder(self, name: bytes) -> None:
        with contextlib.suppress(OSError):
            os.lstat(self.name_of(b".lock.d"), dir_fd=self.folder)
            return  # a build of the shell indexer may be running
        import shutil  # rarely needed, and slow to import

        path = self._request.chroot + self.directory + b"/" + name
        shutil.rmtree(path, ignore_errors=True)

    def release(self) -> None:
        """End the build. Its result must have been reported."""
        self.remove(self._names["stop"])
        os.ftruncate(self._lock, 0)
        os.close(self._lock)

    def stop_requested(self) -> bool:
        """Whether a run that follows this build has requested to stop it."""
        if not self._key:
            return False
        try:
            descriptor = self.open("stop", os.O_RDONLY)
        except OSError:
            return False
        try:
            return os.read(descriptor, MAX_KEY_BYTES + 1) == self._key
        finally:
            os.close(descriptor)

    def _request_stop(self) -> None:
        descriptor = self.open("stop", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        write_all(descriptor, self._key)
        os.close(descriptor)

    def _follow(self, report: Report, watch: Watch) -> Optional[int]:
        """Repeat the running build's report; return its exit status, or None if it ended without a result."""
        try:
            descriptor = self.open("report", os.O_RDONLY)
        except FileNotFoundError:
            time.sleep(POLL_SECONDS)
            return None
        report.write_line("mdbackup joined the running build of this request")
        unread, is_first_read, stop_sent, ended = b"", True, False, False
        try:
            while True:
                data = os.read(descriptor, 1 << 16)
                *lines, unread = (unread + data).split(b"\n")
                for line in lines:
                    if is_first_read and line.startswith(b"mdbackup progress"):
                        continue  # out of date
                    if re.fullmatch(b"mdbackup [ -~]+", line):
                        report.write_line(line.decode("ascii"))
                    status = result_in(line)
                    if status is not None:
                        return status
                if data:
                    continue
                is_first_read = False
                if ended:
                    if stop_sent:
                        raise Failure("stopped on request")
                    return None
                if not stop_sent and watch.stop_requested():
                    self._request_stop()
                    stop_sent = True
                time.sleep(POLL_SECONDS)
                if self._try_lock():  # the other build has ended; it may have written more since our read
                    fcntl.flock(self._lock, fcntl.LOCK_UN)
                    ended = True
                elif self._holder() != self._key:
                    ended = True
        finally:
            os.close(descriptor)


def result_in(line: bytes) -> Optional[int]:
    """Return the exit status that the last line of a report implies, None for any other line."""
    if line.startswith(b"mdbackup error "):
        return 1
    counts = re.fullmatch(rb"mdbackup done .* unreadable=([0-9]+) rotten=([0-9]+) seconds=[0-9.]+", line)
    if counts:
        return 3 if int(counts[1]) or int(counts[2]) else 0
    return None
