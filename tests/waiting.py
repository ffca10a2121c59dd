"""Waiting until something has happened, instead of for a time in which it surely has."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(condition: Callable[[], T], seconds: float = 60, every: float = 0.1) -> T:
    """Wait until ``condition`` returns something true, and return that.

    :raises AssertionError: it has not after so many seconds.
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"it did not happen within {seconds:g} s"
        time.sleep(every)
    return found
