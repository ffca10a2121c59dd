"""How long ago the last good run may be, where the configuration does not say."""

from __future__ import annotations

from datetime import datetime, timedelta
from functools import cache

from croniter import croniter

_DAY = timedelta(days=1)
_MARGIN = timedelta(hours=2)  # for the run itself, its retries and a late start
_PRESETS = {
    "@weekly": timedelta(days=7),
    "@monthly": timedelta(days=31),
    "@quarterly": timedelta(days=92),
    "@yearly": timedelta(days=366),
}
_BEGIN = datetime(2024, 1, 15)
_STEPS = 62  # enough to meet the longest gap of each week, of each month, and of a year


def default_max_age(schedule: object) -> timedelta | None:
    """Return two hours more than the longest time between two days with runs, and 26 hours at least.

    :param schedule: one that :func:`.values.check_schedule` accepts.
    :return: None if only a person starts the runs, or assets or a timetable do, whose times are not known.
    """
    if not isinstance(schedule, str):
        return None
    if schedule.startswith("@"):
        return _PRESETS.get(schedule, _DAY) + _MARGIN
    return _longest_gap(*schedule.split()[2:]) + _MARGIN


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
