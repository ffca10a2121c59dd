"""Results and progress, on standard output and in a file that other runs can follow."""

import os
import select
import time
from typing import Callable, Dict, Optional, Set

from airflow_mdbackup.provider_side.indexer.common import MAX_LOGGED, printable, write_all

PROGRESS_SECONDS = 5.0
MIN_PIPE_BYTES = 512  # PIPE_BUF of POSIX


class Report:
    """What was done so far. It never waits for a reader, and need not have one."""

    def __init__(self) -> None:
        self.files = 0
        self.hashed = 0
        self.bytes = 0
        self.bytes_in_progress: Callable[[], int] = int  # of files that are not finished
        self.unreadable: Dict[bytes, str] = {}
        self.rotten: Set[bytes] = set()
        self.writing = False
        self._notes: Set[str] = set()
        self._pending = b""  # not yet accepted by standard output
        self._copy: Optional[int] = None
        self._started = time.monotonic()
        self._next_progress = self._started + PROGRESS_SECONDS

    def copy_to(self, descriptor: Optional[int]) -> None:
        """Write all further lines also to a file, and count the time from now."""
        self._copy = descriptor
        self._started = time.monotonic()
        self._next_progress = self._started + PROGRESS_SECONDS

    def write_line(self, line: str, optional: bool = False) -> None:
        """Write a line, without any buffer that could complain of a lost reader at exit.

        What standard output does not accept at once is written together with a later line. An optional line
        is dropped then.
        """
        data = line.encode("ascii") + b"\n"
        self.writing = True
        if not (optional and self._pending):
            self._pending += data
        if self._copy is not None:
            try:
                write_all(self._copy, data)
            except OSError:
                self._copy = None
        self.writing = False
        self.flush(0)

    def flush(self, seconds: float) -> None:
        """Write what is pending, for at most so many seconds: the reader may have stopped reading."""
        self.writing = True
        deadline = time.monotonic() + seconds
        try:
            while self._pending and select.select([], [1], [], max(0, deadline - time.monotonic()))[1]:
                # A pipe that is ready for writing accepts this many bytes without blocking.
                self._pending = self._pending[os.write(1, self._pending[:MIN_PIPE_BYTES]) :]
        except OSError:
            self._pending = b""  # the reader is gone
        self.writing = False

    def seconds(self) -> float:
        return time.monotonic() - self._started

    def progress(self) -> None:
        """Report the progress, unless that was done less than 5 seconds ago."""
        now = time.monotonic()
        if now < self._next_progress or self.writing:
            return
        self._next_progress = now + PROGRESS_SECONDS
        size = self.bytes + self.bytes_in_progress()
        self.write_line(
            f"mdbackup progress files={self.files} bytes={size} hashed={self.hashed}"
            f" seconds={int(self.seconds())}",
            optional=True,
        )

    def note(self, text: str) -> None:
        """Report something, once."""
        if text not in self._notes and len(self._notes) < 2 * MAX_LOGGED:
            self._notes.add(text)
            self.write_line(f"mdbackup note {text}")

    def add_unreadable(self, path: bytes, reason: str) -> None:
        if path not in self.unreadable:
            self.unreadable[path] = reason
            if len(self.unreadable) <= MAX_LOGGED:
                self.write_line(f"mdbackup unreadable {printable(path)}: {reason}")

    def add_rotten(self, path: bytes) -> None:
        self.rotten.add(path)
        if len(self.rotten) <= MAX_LOGGED:
            self.write_line(f"mdbackup rotten {printable(path)}")

    def done(self) -> int:
        """Report the result and return the exit status for it."""
        self.write_line(
            f"mdbackup done files={self.files} bytes={self.bytes} hashed={self.hashed}"
            f" unreadable={len(self.unreadable)} rotten={len(self.rotten)} seconds={self.seconds():.1f}"
        )
        return 3 if self.unreadable or self.rotten else 0
