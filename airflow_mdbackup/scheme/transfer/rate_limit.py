"""Tasks share a bandwidth: of one provider, in one run or several, on one host or several.

They share one small file, with the moment at which the line is free again, in Unix seconds::

    who has received n bytes locks the file:   free at = max(now, free at) + n / rate
    unlocks it, and sleeps until what was the moment before

so that each begins when all before him are through. What was received is charged in small portions, so that
the line is never taken for long, and the rate may change between them.

A moment that is in the past, or further ahead than the tasks of a provider can have brought it, is of no
account: after a damage of the file, or when a clock jumps, nobody sleeps for long.

What this does not give: of two hosts, the one whose clock is behind gets less; where clocks are seconds
apart, each host has the rate for itself.

Source: the virtual scheduling algorithm (GCRA) of ITU-T I.371, with the wall clock, which hosts share.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

from airflow_mdbackup.scheme.files.syscalls import open_for_owner

_PORTIONS = 32  # of a second
_LONGEST = 3.0  # seconds that the line may be taken; the 64 tasks that a provider may have take it for 2


class RateLimiter:
    """Waits until what was received is within the limit. To be called with the number of bytes received.

    :param path: the file; made if it is not there.
    :param rate: returns the bytes per second that all may receive now, or None for no limit.
    """

    def __init__(self, path: Path, rate: Callable[[], int | None]) -> None:
        self._path = path
        self._rate = rate

    def __call__(self, received: int) -> int | None:
        """Wait as long as the limit says, and return the rate that holds now.

        :raises OSError: the disk is full or broken.
        """
        while (rate := self._rate()) is not None and received > 0:
            portion = min(received, rate // _PORTIONS + 1)
            time.sleep(self._turn(portion / rate))
            received -= portion
        return rate

    def _turn(self, seconds: float) -> float:
        """Take the line for some seconds, and return in how many they begin."""
        file = open_for_owner(self._path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            now = time.time()
            free_at = _moment(os.pread(file, 64, 0))
            if not now <= free_at <= now + _LONGEST:
                free_at = now
            os.ftruncate(file, os.pwrite(file, b"%.6f\n" % (free_at + seconds), 0))
        finally:
            os.close(file)
        return free_at - now


def _moment(text: bytes) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
