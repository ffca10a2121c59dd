"""When to tell how far long work has come."""

from __future__ import annotations

import time


class ReportTimer:
    """Says when another line of progress is due: not at once, and then every so many seconds."""

    def __init__(self, seconds: float = 10.0) -> None:
        self._seconds = seconds
        self._last = time.monotonic()

    def due(self) -> bool:
        """Return whether it is time, and count from now if it is."""
        now = time.monotonic()
        if now - self._last < self._seconds:
            return False
        self._last = now
        return True
