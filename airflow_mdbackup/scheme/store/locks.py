"""TODO"""

from __future__ import annotations

import errno
import fcntl
import logging
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
LOCK_WAIT = 3600.0  # seconds that a task waits for another run before it gives up
OPERATOR_WAIT = 60.0  # seconds that a command of a person does


@contextmanager
def locked(path: Path, what: str, who: str, wait: float, kind: int = fcntl.LOCK_EX) -> Iterator[int]:
    """Hold a flock on ``path``, telling whoever waits for it ``who`` does. Yields its descriptor."""
    with _lock_file(path, what) as file:
        deadline = time.monotonic() + wait
        told = -60.0
        while True:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                holder = file.read(500).strip("\0") or "another task"
            if time.monotonic() > deadline:
                raise DestinationBusy(f"{what} has been locked for {wait:.0f} s by {holder}")
            if time.monotonic() - told >= 60:
                log.info("Waiting for the lock on %s, held by %s", what, holder)
                told = time.monotonic()
            time.sleep(0.2)
        file.truncate(0)
        file.write(f"{who} (process {os.getpid()} on {socket.gethostname()}, since {now_stamp()})")
        file.flush()
        try:
            yield file.fileno()
        finally:
            if kind == fcntl.LOCK_EX:
                # Others may hold it without saying who they are, as flock(1) does.
                file.truncate(0)


def _lock_file(path: Path, what: str) -> TextIO:
    try:
        # After a crash anything may be in it.
        return open(path, "a+", encoding="utf-8", errors="replace", opener=not_followed)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise DestinationRefused(f"{what}: {path} is a symlink: remove it, and try again") from None
