"""When runs start: by cron expressions and presets, assets, or timetables.

Importing a timetable may be slow and may fail; only its provider's DAG and :mod:`.foreign` do it.
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
    """Run once all of these have been updated.

    :ivar assets: URIs (with ``://``) and names.
    """

    assets: tuple[str, ...]

    def for_airflow(self) -> list[Any]:
        """Return the ``schedule`` argument of a DAG.

        :raises UnusableSchedule: Airflow does not accept one of the URIs.
        """
        from airflow.sdk import Asset

        try:
            # An Asset normalizes its URI; a reference does not.
            return [
                Asset.ref(uri=Asset(name=asset, uri=asset).uri) if "://" in asset else Asset.ref(name=asset)
                for asset in self.assets
            ]
        except ValueError as error:
            raise UnusableSchedule(f"an asset cannot be used ({error}): correct its URI") from error


@dataclass(frozen=True, slots=True)
class Timetable:
    """Run by an Airflow timetable.

    :ivar path: dotted path of its class.
    :ivar arguments: its keyword arguments.
    """

    path: str
    arguments: dict[str, Any] = field(default_factory=dict, hash=False)

    def for_airflow(self) -> Any:
        """Return the ``schedule`` argument of a DAG.

        :raises UnusableSchedule: it cannot be imported or instantiated, or Airflow cannot store it.
        """
        from airflow.serialization.encoders import encode_timetable

        try:
            timetable = find_class(self.path)(**copy.deepcopy(self.arguments))
            # One that Airflow cannot store would make all DAGs of the file stale.
            encode_timetable(timetable)
        except Exception as error:  # its code may raise anything
            raise UnusableSchedule(f"`{self.path}` {explain_unusable(error)}") from error
        return timetable


class UnusableSchedule(ValueError):
    """A provider's schedule cannot be used; the message says why and what to do."""


def explain_unusable(error: Exception) -> str:
    """Return why a class of another package cannot be used, and what to do."""
    said = f"({type(error).__name__}: {error})"
    if isinstance(error, ImportError):
        return f"cannot be imported {said}: install the package that has it, or correct the path"
    if type(error).__name__ == "TimetableNotRegistered":
        return f"is not registered with Airflow {said}: list it in the `timetables` of an Airflow plugin"
    return f"cannot be used {said}: correct the path, or its `arguments`"


# As in Airflow.
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
    """Return two hours more than the longest time between two days with runs, at least 26 hours.

    :param schedule: one that :func:`.value_types.check_schedule` accepts.
    :return: None if runs start manually, or by assets or a timetable, whose times are not known.
    """
    if not isinstance(schedule, str):
        return None
    return _longest_gap(*PRESETS.get(schedule, schedule).split()[2:]) + _MARGIN


# Only the days matter, so that the cache also works for providers with different times of day.
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

    :param schedule: one that :func:`.value_types.check_schedule` accepts.
    :param zone: Airflow's default time zone, which applies to cron expressions.
    :return: None if runs start manually, or by assets or a timetable, whose times are not known.
    """
    if not isinstance(schedule, str):
        return None
    # In local time, like Airflow (see CronMixin._get_next).
    local = now.astimezone(zone).replace(tzinfo=None, fold=0)
    cron = croniter(PRESETS.get(schedule, schedule), local)
    due = cron.get_next(datetime)
    if cron.expanded[1] == ["*"]:  # hourly, also in an hour that occurs twice
        return now.astimezone(UTC) + (due - local)
    # A local time that occurs twice means the second one; one that does not exist moves later by the gap.
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
