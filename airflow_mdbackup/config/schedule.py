"""When runs start: by cron expressions and presets, assets, or timetables.

Importing a timetable may be slow and may fail; only its provider's DAG, and what shows mistakes, does it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, tzinfo
from functools import cache
from typing import Any

from croniter import croniter

from airflow_mdbackup.config.classes import find_class


@dataclass(frozen=True, slots=True)
class Assets:
    """Run when all of these have been updated.

    :ivar assets: URIs (with ``://``) and names.
    """

    assets: tuple[str, ...]

    def for_airflow(self) -> list[Any]:
        """Return what a DAG takes for it.

        :raises UnusableSchedule: one is no URI that Airflow accepts.
        """
        from airflow.sdk import Asset

        try:
            # By the spelling that Airflow gives to URIs of assets, and does not give to references.
            return [
                Asset.ref(uri=Asset(name=asset, uri=asset).uri) if "://" in asset else Asset.ref(name=asset)
                for asset in self.assets
            ]
        except ValueError as error:
            raise UnusableSchedule(f"an asset cannot be used ({error}): correct its URI") from error


@dataclass(frozen=True, slots=True)
class Timetable:
    """Run when a timetable says so.

    :ivar path: dotted path of its class.
    :ivar arguments: what that is made with.
    """

    path: str
    arguments: dict[str, Any] = field(default_factory=dict, hash=False)

    def for_airflow(self) -> Any:
        """Return what a DAG takes for it.

        :raises UnusableSchedule: it cannot be imported or made, or Airflow cannot store it.
        """
        from airflow.serialization.encoders import encode_timetable

        try:
            timetable = find_class(self.path)(**copy.deepcopy(self.arguments))
            # What Airflow cannot store would make all DAGs of the file stale.
            encode_timetable(timetable)
        except Exception as error:  # whatever other people's code raises
            raise UnusableSchedule(f"`{self.path}` {why_not(error)}") from error
        return timetable


class UnusableSchedule(ValueError):
    """A provider's schedule cannot be used; the message says why and what to do."""


def why_not(error: Exception) -> str:
    """Say why a class of other people cannot be used, and what to do."""
    said = f"({type(error).__name__}: {error})"
    if isinstance(error, ImportError):
        return f"cannot be imported {said}: install the package that has it, or correct the path"
    if type(error).__name__ == "TimetableNotRegistered":
        return f"is not registered with Airflow {said}: list it in the `timetables` of an Airflow plugin"
    return f"cannot be used {said}: correct the path, or its `arguments`"


# As Airflow reads them.
PRESETS = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@quarterly": "0 0 1 */3 *",
    "@yearly": "0 0 1 1 *",
}
_DAY = timedelta(days=1)
_MARGIN = timedelta(hours=2)  # for the run itself, its retries and a late start
_BEGIN = datetime(2024, 1, 15)
_STEPS = 62  # enough to meet the longest gap of each week, of each month, and of a year


def default_max_age(schedule: object) -> timedelta | None:
    """Return two hours more than the longest time between two days with runs, and 26 hours at least.

    :param schedule: one that :func:`.values.check_schedule` accepts.
    :return: None if only a person starts the runs, or assets or a timetable do, whose times are not known.
    """
    if not isinstance(schedule, str):
        return None
    return _longest_gap(*PRESETS.get(schedule, schedule).split()[2:]) + _MARGIN


# By the days only, so that those of a hundred providers, at as many times of day, are few.
@cache
def _longest_gap(day: str, month: str, weekday: str) -> timedelta:
    if day == month == weekday == "*":
        return _DAY
    days = croniter(f"0 0 {day} {month} {weekday}", _BEGIN)
    longest, last = _DAY, days.get_next(datetime)
    for _ in range(_STEPS):
        last, before = days.get_next(datetime), last
        longest = max(longest, last - before)
    return longest


def next_run(schedule: object, now: datetime, zone: tzinfo) -> datetime | None:
    """Return when the next run begins, in UTC.

    :param schedule: one that :func:`.values.check_schedule` accepts.
    :param zone: Airflow's default time zone, in which a cron expression is meant.
    :return: None if only a person starts runs, or assets or a timetable do, whose times are not known.
    """
    if not isinstance(schedule, str):
        return None
    # By the clock on the wall, as Airflow does it (see CronMixin._get_next).
    local = now.astimezone(zone).replace(tzinfo=None, fold=0)
    cron = croniter(PRESETS.get(schedule, schedule), local)
    due = cron.get_next(datetime)
    if cron.expanded[1] == ["*"]:  # each hour, also one that the clock shows twice
        return now.astimezone(UTC) + (due - local)
    # What the clock shows twice is meant the second time; what it leaves out, as much later.
    return max(due.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1))


def describe_schedule(schedule: object) -> str:
    """Return what starts the runs, in a few words."""
    match schedule:
        case str():
            return f"schedule {schedule}"
        case Assets():
            return f"after {' and '.join(schedule.assets)}"
        case Timetable():
            return f"by the timetable {schedule.path}"
    return "by hand"
