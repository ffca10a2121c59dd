"""How far a shard has come: counts, and a line for the log now and then."""

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

_SHOWN = 50  # paths that the log names
_LONGEST = 1e9  # seconds that are told to be left


@dataclass(slots=True)
class PullSummary:
    """What became of the items of a shard.

    :ivar transferred: bytes, from the provider.
    :ivar telltale: what ransomware would look like, if it is anything.
    """

    outcomes: dict[str, int] = field(default_factory=dict)
    transferred: int = 0
    seconds: float = 0.0
    telltale: str | None = None

    def count(self, outcome: Outcome) -> None:
        """Note that an item had an outcome."""
        self.outcomes[outcome.value] = self.outcomes.get(outcome.value, 0) + 1


class PullProgress:
    """Counts the items of a shard.

    :param total: how many it has.
    :ivar spared: items that an earlier try, or the mirror, had already.
    """

    def __init__(self, total: int) -> None:
        self.summary = PullSummary()
        self.spared = 0
        self._total = total
        self._done = 0
        self._troubles = 0
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
            self._troubles += 1
            if self._troubles <= _SHOWN:
                log.warning("%s: %s (%s)", outcome, to_text(result.path), result.detail)
            elif self._troubles == _SHOWN + 1:
                log.warning("There are more; commit_backup sums up")
        return result

    def line(self, waiting: int, parts: list[PartialFile]) -> str:
        """Return one line about how far this shard has come.

        :param waiting: items that are done, and wait for one before them.
        :param parts: large files that are on their way.
        """
        done = self._done + waiting
        seconds = max(time.monotonic() - self._started, 0.001)
        megabytes = self.summary.transferred / 1e6
        return (
            f"{done:,} of {self._total:,} files, {megabytes:,.1f} MB in {seconds:,.0f} s "
            f"({(done - self.spared) / seconds:,.0f} files/s, {megabytes / seconds:,.1f} MB/s)"
            f"{self.time_left(done, seconds, parts)}"
        )

    def time_left(self, done: int, seconds: float, parts: list[PartialFile]) -> str:
        """Return how long the rest may take, for people: by files or by bytes, whichever takes longer.

        :param seconds: that the items which are done have taken.
        """
        known = sum(max(part.size - part.position, 0) for part in parts)
        came = self.summary.transferred
        waiting = self._total - done - len(parts)
        brought = done - self.spared
        unknown = waiting * (came - sum(part.position for part in parts)) / max(brought, 1)
        by_files = waiting / brought * seconds if brought else 0.0
        by_bytes = (known + max(unknown, 0)) / came * seconds if came else 0.0
        left = min(max(by_files, by_bytes), _LONGEST)  # a size is what the provider says it is
        return f", about {timedelta(seconds=round(left))} left" if left else ""
