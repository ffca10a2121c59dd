"""What tests of the policy table share: an old file on A, and what a commit did."""

from __future__ import annotations

import os

from tests.pair import Pair

# Long before any index, so that a file with this time has not changed since.
LONG_AGO = 1_000_000_000


def put_old(pair: Pair, name: str, content: bytes) -> bytes:
    """Write a file on A that has not been changed for years."""
    path = pair.put(name, content)
    os.utime(path, (LONG_AGO, LONG_AGO))
    return path


def whats(pair: Pair) -> list[str]:
    """Return what the last commit did, in the order of its history."""
    return [change.what for change in pair.history()[-1]]
