"""Whether a backup is recent enough: what the command `status` and the watchdog report.

The time of the last good run is kept in two places: ``status.json`` in ``dest``, which :func:`check_health`
reads, and Airflow's own state, which the caller reads. :func:`judge` applies the same rule to both.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from airflow_mdbackup.scheme.common.units import format_duration, format_two_durations
from airflow_mdbackup.scheme.errors import BackupError
from airflow_mdbackup.scheme.history.outcomes import Outcome
from airflow_mdbackup.scheme.history.usage import DiskUsage, stored_totals
from airflow_mdbackup.scheme.store.mirror import Mirror

_CLOCK_TOLERANCE = timedelta(hours=1)  # how far the clocks of two machines may differ
# A little less than a day, because hourly checks do not run to the second.
_REMINDER_INTERVAL = timedelta(hours=23, minutes=30)
_FAILURES = frozenset(outcome.value for outcome in Outcome if outcome.failure)


class Health(StrEnum):
    """The state of a provider's backup. Everything but ``good`` needs attention."""

    GOOD = "good"
    STALE = "stale"  # the last good run is too old
    NEVER = "never"  # there has been no good run yet
    UNREADABLE = "unreadable"  # dest does not show when the last good run was
    CLOCK = "clock"  # the clock of the machine with dest may be wrong, so recorded times may be wrong too
    INVALID = "invalid"  # the configuration is invalid, so nothing is backed up


@dataclass(frozen=True, slots=True)
class LastCommit:
    """A run that committed.

    :ivar outcomes: how many entries had each outcome.
    :ivar partial: whoever started the run limited it to some paths.
    """

    run_id: str
    at: datetime
    outcomes: dict[str, int] = field(default_factory=dict)
    partial: bool = False

    @property
    def failures(self) -> int:
        """How many entries failed; the run failed if any did."""
        return sum(number for outcome, number in self.outcomes.items() if outcome in _FAILURES)


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A run that started after the last commit and has not finished.

    :ivar since: when it began to fetch the index, in its latest attempt.
    :ivar at_work: whether one of its steps is running right now. If not, the run may have failed, or be
        waiting for a worker, a retry or an approval: Airflow knows.
    """

    run_id: str
    since: datetime
    at_work: bool


@dataclass(frozen=True, slots=True)
class ProviderHealth:
    """The state of one provider's backup, and the facts behind it.

    :ivar max_age: the greatest allowed age of the last good run; None for no limit.
    :ivar last_commit: the last run that committed anything, good or not.
    :ivar files: entries in the consumer index.
    :ivar message: why the state is not good; empty if it is.
    :ivar disk: disk usage as computed from the history; None, like ``received``, if not known.
    :ivar received: bytes that arrived in the last 30 days.
    :ivar starts: what starts the runs, as text; empty if not known.
    :ivar next_run: when the next run starts; None if that cannot be known in advance.
    :ivar unfinished: a run that started after the last commit and has not finished, if there is one.
    """

    provider: str
    state: Health
    max_age: timedelta | None = None
    last_good: LastCommit | None = None
    last_commit: LastCommit | None = None
    files: int | None = None
    message: str = ""
    disk: DiskUsage | None = None
    received: int | None = None
    starts: str = ""
    next_run: datetime | None = None
    unfinished: Unfinished | None = None


def check_health(mirror: Mirror, max_age: timedelta | None, now: datetime) -> ProviderHealth:
    """Return the state that ``dest`` shows. Only reads, and never raises for what is or is not there."""
    provider = mirror.provider
    try:
        if not mirror.dest.exists() or not os.listdir(mirror.dest):
            message = f"{mirror.dest} is empty or missing: nothing backed up yet, or its disk is not mounted"
            return ProviderHealth(provider, Health.NEVER, max_age, message=message)
        mirror.check()
        status = mirror.read_status()
    except BackupError as error:
        return ProviderHealth(provider, Health.UNREADABLE, max_age, message=str(error))
    except OSError as error:
        message = f"{mirror.dest} cannot be read ({error.strerror}): run this as the user of the workers"
        return ProviderHealth(provider, Health.UNREADABLE, max_age, message=message)
    try:
        last_good, last_commit = (_parse_commit(status.get(key)) for key in ("last_good", "last_commit"))
        files = int(status["files"]) if "files" in status else None
    except (KeyError, TypeError, ValueError):
        message = f"{mirror.status} is damaged: delete it; the next good run writes a new one"
        return ProviderHealth(provider, Health.UNREADABLE, max_age, message=message)
    state, message = judge(last_good.at if last_good else None, max_age, now)
    if state == Health.GOOD and status.get("clock"):
        state, message = Health.CLOCK, f"in the last run {status['clock']}"
    totals = stored_totals(status)
    disk, received = (totals.disk, totals.came(now)) if totals is not None else (None, None)
    health = ProviderHealth(provider, state, max_age, last_good, last_commit, files, message, disk, received)
    return replace(health, unfinished=_find_unfinished(mirror))


def _find_unfinished(mirror: Mirror) -> Unfinished | None:
    try:
        last = mirror.last_begun()
        if last is None:
            return None
        run, header = last
        return Unfinished(str(header["run_id"]), parse_stored_time(str(header["at"])), run.is_at_work())
    except (OSError, KeyError, ValueError, BackupError):
        return None


def _parse_commit(stored: Any) -> LastCommit | None:
    if stored is None:
        return None
    outcomes = {str(outcome): int(number) for outcome, number in stored["outcomes"].items()}
    at = parse_stored_time(stored["at"])
    return LastCommit(str(stored["run_id"]), at, outcomes, bool(stored.get("partial")))


def parse_stored_time(text: str) -> datetime:
    """Parse a time in ISO form, and return it in UTC.

    :raises ValueError: it is not a time, or has no time zone.
    """
    at = datetime.fromisoformat(text)
    if at.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone")
    return at.astimezone(UTC)


def judge(
    last_good: datetime | None, max_age: timedelta | None, now: datetime, since: datetime | None = None
) -> tuple[Health, str]:
    """Return whether a backup is recent enough, and a message if it is not.

    :param last_good: when the last good run was; None if there has been none.
    :param max_age: its greatest allowed age; None for no limit.
    :param since: when the watchdog first saw this provider. A provider without a good run has ``max_age``
        from then for its first one, and counts as good until then. None: no such grace period.
    """
    if last_good is None:
        message = "there has been no good run yet"
        if since is not None:
            if max_age is None or now - since <= max_age:
                return Health.GOOD, ""
            message += f", in the {format_duration(now - since)} since the watchdog first saw it"
        return Health.NEVER, message
    age = now - last_good
    if age < -_CLOCK_TOLERANCE:
        return (
            Health.STALE,
            f"the last good run is {format_duration(-age)} in the future: check the clocks",
        )
    if max_age is not None and age > max_age:
        age_text, limit_text = format_two_durations(age, max_age)
        return Health.STALE, f"the last good run was {age_text} ago, more than {limit_text}"
    return Health.GOOD, ""


def is_reminder_due(last_alert: datetime | None, now: datetime) -> bool:
    """Whether to alert about an ongoing problem: at once, and then once a day.

    :param last_alert: when the last alert about this problem was sent; None if there was none.
    """
    return last_alert is None or not timedelta() <= now - last_alert < _REMINDER_INTERVAL
