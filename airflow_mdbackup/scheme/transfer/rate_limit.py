"""One bandwidth limit for all tasks of a provider, in one run or several, on one host or several.

The tasks share a small file with the time at which the line is free again, in Unix seconds::

    after receiving n bytes, lock the file:    free at = max(now, free at) + n / rate
    unlock it, and sleep until the previous value of "free at"

so each task continues when all those before it have had their turn. Received bytes are charged in small
portions, so that no task reserves the line for long, and the rate may change between portions.

A time in the past, or further ahead than the tasks of a provider can have moved it, is ignored: if the file
is damaged or a clock jumps, nobody sleeps for long.

Limitations: with two hosts, the one whose clock is behind gets less; if their clocks differ by seconds, each
host uses the full rate.

Source: the virtual scheduling algorithm (GCRA) of ITU-T I.371, with the wall clock, which hosts share.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

from airflow_mdbackup.scheme.files.syscalls import open_for_owner

_PORTIONS = 32  # per second
_MAX_RESERVED = 3.0  # seconds that the line may be reserved; the at most 64 tasks of a provider reserve 2


class RateLimiter:
    """Sleeps to keep within the limit. Call it with the number of bytes received.

    :param path: the shared file; created if missing.
    :param rate: returns the bytes per second allowed for all tasks now, or None for no limit.
    """

    def __init__(self, path: Path, rate: Callable[[], int | None]) -> None:
        self._path = path
        self._rate = rate

    def __call__(self, received: int) -> int | None:
        """Sleep as long as the limit requires, and return the current rate.

        :raises OSError: the disk is full or broken.
        """
        while (rate := self._rate()) is not None and received > 0:
            portion = min(received, rate // _PORTIONS + 1)
            time.sleep(self._reserve(portion / rate))
            received -= portion
        return rate

    def _reserve(self, seconds: float) -> float:
        """Reserve the line for some seconds, and return in how many seconds the reservation starts."""
        file = open_for_owner(self._path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            now = time.time()
            free_at = _parse_time(os.pread(file, 64, 0))
            if not now <= free_at <= now + _MAX_RESERVED:
                free_at = now
            os.ftruncate(file, os.pwrite(file, b"%.6f\n" % (free_at + seconds), 0))
        finally:
            os.close(file)
        return free_at - now


def _parse_time(text: bytes) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
