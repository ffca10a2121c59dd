"""When to report the progress of long work."""

from __future__ import annotations

import time


class ReportTimer:
    """Says when a line of progress is due: every so many seconds, and not at the start."""

    def __init__(self, seconds: float = 10.0) -> None:
        self._seconds = seconds
        self._last = time.monotonic()

    def due(self) -> bool:
        """Return whether it is time; if so, restart the interval."""
        now = time.monotonic()
        if now - self._last < self._seconds:
            return False
        self._last = now
        return True
