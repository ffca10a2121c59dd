"""Times as people write and read them, in the time zone of this machine.

A closed grammar: anything else is refused, because a time that was guessed would restore another state. The
only names of time zones in it are UTC and GMT: others mean different things in different countries, and in
summer and winter. ``UTC-5`` means what people mean by it, five hours behind, unlike in tzset(3).

::

    time     now | N UNIT ago | DAY | [DAY] TIME [ZONE]
    DAY      2026-11-23 | 20261123 | 23 Nov 2026 | November 23, 2026 | today | yesterday
    TIME     14:00 | 14:00:05 | 14:00:05.123 | after 20261123 also T1400, T140005
    ZONE     Z | UTC | GMT | +01:00 | -0500 | +1 | UTC+1
"""

from __future__ import annotations

import re
from calendar import month_abbr, month_name
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from typing import NamedTuple

from dateutil.relativedelta import relativedelta

_STAMP = "%Y%m%dT%H%M%S.%fZ"
_AGO = re.compile(r"(\d{1,6}) (second|minute|hour|day|week|month|year)s? ago", re.IGNORECASE)
_DAYS = {"today": 0, "yesterday": 1}
_MONTHS = {
    name.lower(): number for names in (month_name, month_abbr) for number, name in enumerate(names) if name
}
_CLOCK = r"(?P<hour>\d{1,2}):(?P<minute>\d\d)(?::(?P<second>\d\d)(?:[.,](?P<fraction>\d{1,6}))?)?"
_ZONE = r"(?: ?(?P<zone>(?:UTC|GMT)?(?P<sign>[+-])(?P<hours>\d{1,2})(?::?(?P<minutes>\d\d))?|Z|UTC|GMT))?"
_FORMS = [
    re.compile(form, re.IGNORECASE | re.ASCII)
    for form in (
        rf"(?P<year>\d{{4}})-(?P<month>\d\d)-(?P<day>\d\d)(?:[T ]{_CLOCK}{_ZONE})?",
        r"(?P<year>\d{4})(?P<month>\d\d)(?P<day>\d\d)(?:T(?P<hour>\d\d)(?P<minute>\d\d)"
        rf"(?:(?P<second>\d\d)(?:\.(?P<fraction>\d{{1,6}}))?)?{_ZONE})?",
        rf"(?P<day>\d{{1,2}}) (?P<name>[a-z]+) (?P<year>\d{{4}})(?: {_CLOCK}{_ZONE})?",
        rf"(?P<name>[a-z]+) (?P<day>\d{{1,2}}),? (?P<year>\d{{4}})(?: {_CLOCK}{_ZONE})?",
        rf"(?P<word>today|yesterday)(?: {_CLOCK}{_ZONE})?",
        rf"{_CLOCK}{_ZONE}",
    )
]


class NoSuchTime(ValueError):
    """A text is not a time, or there was no backup then; the message says what to write, or since when."""


def parse_time(text: str, now: datetime) -> datetime:
    """Return the time that ``text`` means: ``2026-11-23 14:00``, ``yesterday 14:00``, ``3 days ago``, ...

    Without a time zone it is local time; without a time of day, the first second of the day. A second means
    its end, because commands print the times of commits to the second.

    :param now: what relative forms count from; with a time zone.
    :raises NoSuchTime: it is not a time, is in the future, or is ambiguous.
    """
    words = " ".join(text.split())
    if words.lower() == "now":
        return now
    try:
        if ago := _AGO.fullmatch(words):
            return now - relativedelta(**{f"{ago[2].lower()}s": int(ago[1])})
        moment = _parse_date_and_time(words, now.astimezone().date())
    except (_Skipped, _Ambiguous) as error:
        raise NoSuchTime(f"{text!r}: {error}") from None
    except _UnknownForm as error:
        raise NotUnderstood(
            f"{text!r} is not a time I understand: write 2026-11-23T14:00 (followed by +01:00 or Z if "
            "that is not local time), 'yesterday 14:00', or '3 days ago'"
        ) from error
    except (ValueError, OverflowError) as error:
        raise NoSuchTime(f"{text!r}: there is no such day, time or offset from UTC") from error
    if moment > now + timedelta(minutes=1):
        raise NoSuchTime(f"{text!r} is {moment:%Y-%m-%d %H:%M:%S %z}, which is in the future")
    return moment if moment.microsecond else moment.replace(microsecond=999_999)


class NotUnderstood(NoSuchTime):
    """It is not a time at all, and may be something else."""


class RequestedTime(NamedTuple):
    """What somebody wrote for a time: it may also be the id of a run, or ``latest``.

    :ivar when: the time that it means; None if it does not mean one.
    :ivar why: a message why it does not mean a time.
    """

    word: str
    when: datetime | None
    why: str = ""

    @property
    def understood_as(self) -> str | None:
        """A message that says which time it was understood as; None if as none."""
        return None if self.when is None else f"{self.word!r} is {self.when:%Y-%m-%d %H:%M:%S %z}"


def requested_time(text: str, now: datetime) -> RequestedTime:
    """Return which time ``text`` means; :meth:`.Timeline.find_commit` looks up what else it may be."""
    try:
        return RequestedTime(text.strip(), parse_time(text, now))
    except NotUnderstood as error:
        why = f"{error}; or 'latest', or the id of a run as `mdbackup log` prints it"
    except NoSuchTime as error:
        why = str(error)
    return RequestedTime(text.strip(), None, why)


class _UnknownForm(Exception):
    """It has no known form."""


class _Skipped(Exception):
    """That time did not exist on that day."""


class _Ambiguous(Exception):
    """That time existed twice on that day."""


def _parse_date_and_time(words: str, today: date) -> datetime:
    """Return the time that a text gives as a day, a time of day, or both.

    :raises _UnknownForm: it gives neither.
    :raises ValueError: there is no such day or time.
    """
    found = next((match for form in _FORMS if (match := form.fullmatch(words))), None)
    if found is None:
        raise _UnknownForm(words)
    parts = found.groupdict()
    day = _day(parts, today)
    if parts.get("hour") is None:
        return _local(datetime.combine(day, time()), whole_day=True)
    hour, minute, second = (int(parts[unit] or 0) for unit in ("hour", "minute", "second"))
    clock = time(hour, minute, second, int((parts["fraction"] or "").ljust(6, "0")))
    zone = _zone(parts)
    if zone is not None:
        return datetime.combine(day, clock, zone).astimezone()
    return _local(datetime.combine(day, clock), whole_day=False)


def _day(parts: dict[str, str | None], today: date) -> date:
    if parts.get("year") is None:
        return today - timedelta(_DAYS[(parts.get("word") or "today").lower()])
    month = parts.get("month")
    number = int(month) if month else _MONTHS.get((parts.get("name") or "").lower())
    if number is None:
        raise _UnknownForm(parts["name"])
    return date(int(parts["year"] or 0), number, int(parts["day"] or 0))


def _zone(parts: dict[str, str | None]) -> tzinfo | None:
    if parts["zone"] is None:
        return None
    if parts["sign"] is None:
        return UTC
    hours, minutes = int(parts["hours"] or 0), int(parts["minutes"] or 0)
    if hours > 14 or minutes > 59:
        raise ValueError(parts["zone"])
    offset = timedelta(hours=hours, minutes=minutes)
    return timezone(-offset if parts["sign"] == "-" else offset)


def _local(naive: datetime, *, whole_day: bool) -> datetime:
    """Return a local time, or the first instant of a day, with its zone.

    :raises _Skipped: clocks went forward past it.
    :raises _Ambiguous: clocks went back, so it occurred twice.
    """
    first, second = sorted(naive.replace(fold=fold).astimezone() for fold in (0, 1))
    is_there = first.replace(tzinfo=None) == naive
    if whole_day or first == second:
        return first if is_there else second
    if not is_there:
        raise _Skipped(f"clocks went forward past {naive:%H:%M} on {naive:%Y-%m-%d}: that time did not exist")
    raise _Ambiguous(
        f"clocks went back on {naive:%Y-%m-%d}, so it occurred twice: write "
        f"{first.isoformat(timespec='minutes')} or {second.isoformat(timespec='minutes')}"
    )


def stamp_of(moment: datetime) -> str:
    """Return a time in the form of a backup's stamps."""
    text = moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds")
    return text.replace("-", "").replace(":", "") + "Z"


def time_of_stamp(stamp: str) -> datetime:
    """Return the time of a stamp, in UTC.

    :raises ValueError: it is not a stamp.
    """
    return datetime.strptime(stamp, _STAMP).replace(tzinfo=UTC)


def format_time(stamp: str) -> str:
    """Return a stamp as local time with its zone, to the second; empty for an empty stamp."""
    if not stamp:
        return ""
    return time_of_stamp(stamp).astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
