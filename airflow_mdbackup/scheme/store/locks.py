"""Locks by flock(2), with a note in the file about who holds it."""

from __future__ import annotations

import errno
import fcntl
import logging
import math
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from airflow_mdbackup.scheme.errors import DestinationBusy, DestinationRefused
from airflow_mdbackup.scheme.files.syscalls import not_followed
from airflow_mdbackup.scheme.store.version_names import now_stamp

log = logging.getLogger(__name__)
LOCK_WAIT = 3600.0  # seconds that a task waits for another run
OPERATOR_WAIT = 60.0  # seconds that a command of an operator waits


@contextmanager
def locked(path: Path, what: str, who: str, wait: float, kind: int = fcntl.LOCK_EX) -> Iterator[int]:
    """Hold a flock on ``path``, with a note for others that ``who`` holds it. Yields its descriptor."""
    with _lock_file(path, what) as file:
        deadline = time.monotonic() + wait
        logged = -math.inf
        while True:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                holder = file.read(500).strip("\0") or "another task"
            if time.monotonic() > deadline:
                raise DestinationBusy(f"{what} has been locked for {wait:.0f} s by {holder}")
            if time.monotonic() - logged >= 60:
                log.info("Waiting for the lock on %s, held by %s", what, holder)
                logged = time.monotonic()
            time.sleep(0.2)
        file.truncate(0)
        file.write(f"{who} (process {os.getpid()} on {socket.gethostname()}, since {now_stamp()})")
        file.flush()
        try:
            yield file.fileno()
        finally:
            if kind == fcntl.LOCK_EX:
                # The next holder may leave no note, like flock(1).
                file.truncate(0)


def _lock_file(path: Path, what: str) -> TextIO:
    try:
        # After a crash it may contain anything.
        return open(path, "a+", encoding="utf-8", errors="replace", opener=not_followed)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise DestinationRefused(f"{what}: {path} is a symlink: remove it and retry") from None
