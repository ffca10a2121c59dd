"""Moments as people write and read them, in the time zone of this machine."""

from __future__ import annotations

import re
import warnings
from datetime import UTC, datetime, timedelta

from dateutil import parser
from dateutil.relativedelta import relativedelta

_STAMP = "%Y%m%dT%H%M%S.%fZ"
_AGO = re.compile(r"(\d{1,6}) (second|minute|hour|day|week|month|year)s? ago", re.IGNORECASE)
_DAYS = {"today": 0, "yesterday": 1}
# What reads differently in different countries, or can only be guessed, is no moment.
_CLEAR = re.compile(r"\d{4}-?\d\d-?\d\d([T ].*)?|\d{1,2}:\d\d.*|(?=.*\d{4}).*[a-z]{3}.*", re.IGNORECASE)


class NoSuchMoment(ValueError):
    """A text is no moment, or there was nothing then; the message says what to write, or since when."""


def moment_of(text: str, now: datetime) -> datetime:
    """Return the moment that ``text`` means: ``2026-11-23 14:00``, ``yesterday 14:00``, ``3 days ago``, ...

    Without a time zone it is local time; without a time of day, the day's first second. Of a second, it is
    the end, for that is as exact as commands print when a commit was.

    :param now: what relative forms count from; with a time zone.
    :raises NoSuchMoment: it means none, or one that is yet to come.
    """
    words = text.strip()
    try:
        if words.lower() == "now":
            return now
        if ago := _AGO.fullmatch(words):
            return now - relativedelta(**{f"{ago[2].lower()}s": int(ago[1])})
        day = now.astimezone().replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=None)
        first, _, rest = words.partition(" ")
        if first.lower() in _DAYS:
            day -= timedelta(days=_DAYS[first.lower()])
            words = rest or "00:00"
        if not _CLEAR.fullmatch(words):
            raise ValueError
        with warnings.catch_warnings():
            warnings.simplefilter("error", parser.UnknownTimezoneWarning)
            moment = parser.parse(words, default=day).astimezone()
    except (ValueError, OverflowError, parser.UnknownTimezoneWarning) as error:
        raise NoSuchMoment(
            f"{text!r} is no moment: write 2026-11-23T14:00 (with +01:00 or Z behind it if that is not local "
            "time), 'yesterday 14:00', or '3 days ago'"
        ) from error
    if moment > now + timedelta(minutes=1):
        raise NoSuchMoment(f"{text!r} is {moment:%Y-%m-%d %H:%M:%S %z}, which is yet to come")
    return moment if moment.microsecond else moment.replace(microsecond=999_999)


def stamp_of(moment: datetime) -> str:
    """Return a moment as the stamps of a backup are written."""
    text = moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds")
    return text.replace("-", "").replace(":", "") + "Z"


def in_words(stamp: str) -> str:
    """Return a stamp as local time with its zone, to the second; an empty text for none."""
    if not stamp:
        return ""
    return datetime.strptime(stamp, _STAMP).replace(tzinfo=UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
