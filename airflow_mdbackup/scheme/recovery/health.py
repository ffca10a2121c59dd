"""Whether a backup is as recent as it should be: what the command `status` and the watchdog tell.

Two sources tell when the last good run was: ``status.json`` in ``dest``, which :func:`check_health` reads,
and what Airflow remembers of it, for which the caller asks Airflow. :func:`judge` judges both alike.
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

_AHEAD = timedelta(hours=1)  # by how much the clocks of two machines may differ
# A little less than a day, since an hourly look is not to the second.
_REMIND = timedelta(hours=23, minutes=30)
_FAILURES = frozenset(outcome.value for outcome in Outcome if outcome.failure)


class Health(StrEnum):
    """How a provider's backup is. All but ``good`` are to be told."""

    GOOD = "good"
    STALE = "stale"  # the last good run was too long ago
    NEVER = "never"  # there was no good run yet
    UNREADABLE = "unreadable"  # dest does not show when it was
    CLOCK = "clock"  # the clock of the machine that has it may be wrong, and with it what is told of times
    INVALID = "invalid"  # the configuration is wrong, so that nothing is backed up


@dataclass(frozen=True, slots=True)
class LastCommit:
    """A run that committed what it had.

    :ivar outcomes: how many entries had each outcome.
    :ivar partial: it was limited to some paths, by the person who started it.
    """

    run_id: str
    at: datetime
    outcomes: dict[str, int] = field(default_factory=dict)
    partial: bool = False

    @property
    def failures(self) -> int:
        """How many entries failed, so that the run did."""
        return sum(number for outcome, number in self.outcomes.items() if outcome in _FAILURES)


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A run that has begun since the last commit, and not come to its end.

    :ivar since: when it began to fetch the index, in its last try at that.
    :ivar at_work: whether a step of it is at work at this moment. If not, the run may have failed, or waits
        for a worker, a retry or a person: Airflow knows.
    """

    run_id: str
    since: datetime
    at_work: bool


@dataclass(frozen=True, slots=True)
class ProviderHealth:
    """What there is to say of one provider's backup.

    :ivar max_age: how long ago the last good run may be; None if any age will do.
    :ivar last_commit: the last run that committed anything, which need not have been good.
    :ivar files: entries in the consumer index.
    :ivar message: why it is not good; empty if it is.
    :ivar disk: what it takes on the disk, by its history; None, as ``came`` is then, if not known.
    :ivar came: bytes that came in the last 30 days.
    :ivar starts: what starts its runs, in words; empty if that is not known.
    :ivar next_run: when the next run begins; None if that is not known beforehand.
    :ivar unfinished: a run that has begun since the last commit, if it has not come to its end.
    """

    provider: str
    state: Health
    max_age: timedelta | None = None
    last_good: LastCommit | None = None
    last_commit: LastCommit | None = None
    files: int | None = None
    message: str = ""
    disk: DiskUsage | None = None
    came: int | None = None
    starts: str = ""
    next_run: datetime | None = None
    unfinished: Unfinished | None = None


def check_health(mirror: Mirror, max_age: timedelta | None, now: datetime) -> ProviderHealth:
    """Return the status that ``dest`` shows. Reads only, and never raises for what is, or is not, there."""
    provider = mirror.provider
    try:
        if not mirror.dest.exists() or not os.listdir(mirror.dest):
            message = f"{mirror.dest} is empty or missing: no run was here yet, or its disk is not mounted"
            return ProviderHealth(provider, Health.NEVER, max_age, message=message)
        mirror.check()
        found = mirror.read_status()
    except BackupError as error:
        return ProviderHealth(provider, Health.UNREADABLE, max_age, message=str(error))
    except OSError as error:
        message = f"{mirror.dest} cannot be read ({error.strerror}): run this as the user of the workers"
        return ProviderHealth(provider, Health.UNREADABLE, max_age, message=message)
    try:
        last_good, last_commit = (_commit(found.get(key)) for key in ("last_good", "last_commit"))
        files = int(found["files"]) if "files" in found else None
    except (KeyError, TypeError, ValueError):
        message = f"{mirror.status} is damaged: delete it, the next good run writes it anew"
        return ProviderHealth(provider, Health.UNREADABLE, max_age, message=message)
    state, message = judge(last_good.at if last_good else None, max_age, now)
    if state == Health.GOOD and found.get("clock"):
        state, message = Health.CLOCK, f"in the last run {found['clock']}"
    totals = stored_totals(found)
    disk, came = (totals.disk, totals.came(now)) if totals is not None else (None, None)
    told = ProviderHealth(provider, state, max_age, last_good, last_commit, files, message, disk, came)
    return replace(told, unfinished=_unfinished(mirror))


def _unfinished(mirror: Mirror) -> Unfinished | None:
    try:
        last = mirror.last_begun()
        if last is None:
            return None
        run, told = last
        return Unfinished(str(told["run_id"]), moment(str(told["at"])), run.is_at_work())
    except (OSError, KeyError, ValueError, BackupError):
        return None


def _commit(found: Any) -> LastCommit | None:
    if found is None:
        return None
    outcomes = {str(outcome): int(number) for outcome, number in found["outcomes"].items()}
    return LastCommit(str(found["run_id"]), moment(found["at"]), outcomes, bool(found.get("partial")))


def moment(text: str) -> datetime:
    """Return the moment that was stored as ``text``.

    :raises ValueError: it is none, or has no time zone.
    """
    at = datetime.fromisoformat(text)
    if at.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone")
    return at.astimezone(UTC)


def judge(
    last_good: datetime | None, max_age: timedelta | None, now: datetime, since: datetime | None = None
) -> tuple[Health, str]:
    """Return how recent a backup is, and what to say if it is not recent enough.

    :param last_good: when the last good run was; None if there was none.
    :param max_age: how long ago it may be; None for any time.
    :param since: when this began to be watched. Without a good run, a provider has ``max_age`` from then on
        for its first one, and is good until then. None: it has no time left.
    """
    if last_good is None:
        message = "there was no good run yet"
        if since is not None:
            if max_age is None or now - since <= max_age:
                return Health.GOOD, ""
            message += f", in the {format_duration(now - since)} since this is watched"
        return Health.NEVER, message
    age = now - last_good
    if age < -_AHEAD:
        return (
            Health.STALE,
            f"the last good run is {format_duration(-age)} in the future: look at the clocks",
        )
    if max_age is not None and age > max_age:
        ago, most = format_two_durations(age, max_age)
        return Health.STALE, f"the last good run was {ago} ago, more than {most}"
    return Health.GOOD, ""


def is_due(told: datetime | None, now: datetime) -> bool:
    """Whether people are to be told of what is wrong: at once, and then once a day.

    :param told: when they last were, of the same trouble.
    """
    return told is None or not timedelta() <= now - told < _REMIND
