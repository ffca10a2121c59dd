"""The progress of a shard: counts, and a line for the log now and then."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from datetime import timedelta

from airflow_mdbackup.scheme.backup.results import Result
from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.common.progress import ReportTimer
from airflow_mdbackup.scheme.history.outcomes import Outcome
from airflow_mdbackup.scheme.transfer.partial_file import PartialFile

log = logging.getLogger(__name__)

_MAX_LOGGED = 50  # paths that the log names
_MAX_LEFT = 1e9  # seconds


@dataclass(slots=True)
class PullSummary:
    """The result of a shard.

    :ivar outcomes: how many items had each outcome.
    :ivar transferred: bytes from the provider.
    :ivar telltale: a warning of what looks like ransomware, or None.
    """

    outcomes: dict[str, int] = field(default_factory=dict)
    transferred: int = 0
    seconds: float = 0.0
    telltale: str | None = None

    def count(self, outcome: Outcome) -> None:
        """Count an item."""
        self.outcomes[outcome.value] = self.outcomes.get(outcome.value, 0) + 1


class PullProgress:
    """Counts the items of a shard.

    :param total: how many there are.
    :ivar reused: items that needed no transfer: an earlier try, another run or the mirror had them already.
    """

    def __init__(self, total: int) -> None:
        self.summary = PullSummary()
        self.reused = 0
        self._total = total
        self._done = 0
        self._bad = 0
        self._started = time.monotonic()
        self._timer = ReportTimer()

    def due(self) -> bool:
        """Whether it is time to report."""
        return self._timer.due()

    def count(self, result: Result) -> Result:
        """Count a result, log what is not good, and return it."""
        self._done += 1
        outcome = Outcome(result.outcome)
        self.summary.count(outcome)
        if not outcome.good:
            self._bad += 1
            if self._bad <= _MAX_LOGGED:
                log.warning("%s: %s (%s)", outcome, to_text(result.path), result.detail)
            elif self._bad == _MAX_LOGGED + 1:
                log.warning("There are more; commit_backup counts them")
        return result

    def describe(self, waiting: int, parts: list[PartialFile]) -> str:
        """Return the progress in one line.

        :param waiting: items that are done, and wait for an earlier one.
        :param parts: large files in progress.
        """
        done = self._done + waiting
        seconds = max(time.monotonic() - self._started, 0.001)
        megabytes = self.summary.transferred / 1e6
        return (
            f"{done:,} of {self._total:,} files, {megabytes:,.1f} MB in {seconds:,.0f} s "
            f"({(done - self.reused) / seconds:,.0f} files/s, {megabytes / seconds:,.1f} MB/s)"
            f"{self.time_left(done, seconds, parts)}"
        )

    def time_left(self, done: int, seconds: float, parts: list[PartialFile]) -> str:
        """Return how long the rest may take: estimated by files and by bytes, whichever is longer.

        :param seconds: since the beginning.
        """
        known = sum(max(part.size - part.position, 0) for part in parts)
        received = self.summary.transferred
        waiting = self._total - done - len(parts)
        fetched = done - self.reused
        unknown = waiting * (received - sum(part.position for part in parts)) / max(fetched, 1)
        by_files = waiting / fetched * seconds if fetched else 0.0
        by_bytes = (known + max(unknown, 0)) / received * seconds if received else 0.0
        left = min(max(by_files, by_bytes), _MAX_LEFT)  # sizes are claims of the provider
        return f", about {timedelta(seconds=round(left))} left" if left else ""
