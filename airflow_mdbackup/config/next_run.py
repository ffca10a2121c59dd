"""When a schedule starts the next run, as far as it says so itself."""

from __future__ import annotations

from datetime import UTC, datetime, tzinfo

from croniter import croniter

from airflow_mdbackup.config.schedule import Assets, Timetable

# As Airflow reads them.
_PRESETS = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@quarterly": "0 0 1 */3 *",
    "@yearly": "0 0 1 1 *",
}


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
    cron = croniter(_PRESETS.get(schedule, schedule), local)
    due = cron.get_next(datetime)
    if cron.expanded[1] == ["*"]:  # each hour, also one that the clock shows twice
        return now.astimezone(UTC) + (due - local)
    # What the clock shows twice is meant the second time; what it leaves out, as much later.
    return max(due.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1))


def in_words(schedule: object) -> str:
    """Return what starts the runs, in a few words."""
    match schedule:
        case str():
            return f"schedule {schedule}"
        case Assets():
            return f"after {' and '.join(schedule.assets)}"
        case Timetable():
            return f"by the timetable {schedule.path}"
    return "by hand"
