"""Who holds a lock: by what the kernel says of all locks of the machine."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def holders(files: Iterable[Path]) -> set[int]:
    """Return the processes that hold the flock(2) on any of some files; see /proc/locks in proc(5)."""
    wanted = set()
    for path in files:
        status = path.stat()
        device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
        wanted.add(f"{device}:{status.st_ino}")
    locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return {int(lock[4]) for lock in locks if lock[1] == "FLOCK" and lock[5] in wanted}


def pulling(staging: Path) -> set[int]:
    """Return the processes that hold the lock on an incomplete file."""
    return holders(staging.glob("*.part"))
