"""How people write durations, sizes, shares and parts: in YAML, and on the command line.

YAML 1.1 reads some plain text as something else (``1:30`` is the number 90, ``no`` is false, ``0755`` is
493), so every message about a wrong type names the type that YAML saw.
"""

from __future__ import annotations

import math
import re
import reprlib
from datetime import timedelta
from fractions import Fraction


def format_size(size: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def describe_duration(duration: timedelta) -> str:
    """Return a duration to the two largest of its units: ``3 d 4 h``, ``26 h``, ``5 min``, ``12 s``."""
    seconds = max(0, round(duration.total_seconds()))
    if seconds < 60:
        return f"{seconds} s"
    minutes = seconds // 60
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def describe_two_durations(longer: timedelta, shorter: timedelta) -> tuple[str, str]:
    """Return two durations in words that differ: to the second, where they are the same when rounded."""
    told = describe_duration(longer), describe_duration(shorter)
    if told[0] != told[1]:
        return told
    return _exact(math.ceil(longer.total_seconds())), _exact(math.floor(shorter.total_seconds()))


def _exact(seconds: int) -> str:
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24) if hours >= 48 else (0, hours)
    counts = {"d": days, "h": hours, "min": minutes, "s": seconds}
    return " ".join(f"{count} {unit}" for unit, count in counts.items() if count) or "0 s"


_DURATION = re.compile(
    r"(?=.)" + "".join(rf"(?:(?P<{unit}>[0-9]+(?:\.[0-9]+)?){unit})?" for unit in "ywdhms"), re.ASCII
)
_UNITS = {"d": "days", "h": "hours", "m": "minutes", "s": "seconds"}
_LENGTHS = {unit: timedelta(**{name: 1}) for unit, name in _UNITS.items()}
_LENGTHS |= {"y": timedelta(days=365), "w": timedelta(weeks=1)}
SIZES = {"GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20, "KB": 10**3, "KiB": 2**10}
_SIZE = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?)(?P<unit>[kKMG]B|[KMG]iB)", re.ASCII)
_FRACTION = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,12})?)(?:/([0-9]{1,12})|(%))?", re.ASCII)
_LONGEST = timedelta(days=3650)
_shorten = reprlib.Repr()
_shorten.maxstring = 300
_HOW_TO_WRITE_A_DURATION = "write numbers with units, such as `90s`, `15m`, `1h30m`, `26h`, `2d` or `1y`"
_HOW_TO_WRITE_A_PART = "write a fraction such as `1/30`, a size such as `50GB`, or `all`"


def shortened(value: object) -> str:
    """Return a value as Python writes it, cut in the middle if it is long."""
    return _shorten.repr(value)


def shown_value(value: object) -> str:
    """Say in a few words what YAML made of a value: ``the number 90``, ``the text 'yes'``."""
    match value:
        case None:
            return "nothing (null)"
        case bool():
            return f"the boolean {str(value).lower()}"
        case int() if value.bit_length() > 1000:  # printing it could be refused by Python itself
            return "a huge number"
        case int() | float():
            return f"the number {value}"
        case str():
            return f"the text {shortened(value)}"
        case list() | tuple():
            return "a list"
        case dict():
            return "a mapping"
    return f"the {type(value).__name__} {shortened(value)}"


def parse_duration(value: object) -> timedelta:
    """Return the duration that ``90s``, ``15m``, ``1.5h``, ``2d``, ``8w``, ``1y`` or ``1h30m`` stands for.

    :raises ValueError: anything else, nothing or less, or more than ten years.
    """
    if isinstance(value, timedelta):
        duration = value
    elif not isinstance(value, str):
        trap = " (as it does for an unquoted `1:30`)" if value == 90 else ""
        raise ValueError(
            f"must be a duration, but YAML reads {shown_value(value)}{trap}: {_HOW_TO_WRITE_A_DURATION}"
        )
    elif not (match := _DURATION.fullmatch(value)):
        raise ValueError(f"{shown_value(value)} is not a duration: {_HOW_TO_WRITE_A_DURATION}")
    else:
        parts = {_LENGTHS[unit]: float(number) for unit, number in match.groupdict().items() if number}
        # Judged before a timedelta is made of it, which overflows.
        too_long = any(number > _LONGEST / length for length, number in parts.items())
        duration = timedelta.max if too_long else sum((n * unit for unit, n in parts.items()), timedelta())
    if not timedelta() < duration <= _LONGEST:
        raise ValueError(f"{shown_value(value)} must be more than nothing and at most ten years (`3650d`)")
    return duration


def write_duration(duration: timedelta) -> str:
    """Return the text that :func:`parse_duration` reads as ``duration``."""
    text, rest = "", duration
    for unit, name in _UNITS.items():
        count, rest = divmod(rest, timedelta(**{name: 1}))
        if unit == "s" and rest:
            text += f"{count + rest / timedelta(seconds=1):f}".rstrip("0") + unit
        elif count:
            text += f"{count}{unit}"
    return text


def parse_size(value: object) -> int:
    """Return the bytes that ``500KB``, ``1.5GB`` or ``4GiB`` stands for.

    :raises ValueError: anything else, less than 1 KB or more than 1,000 GB.
    """
    how = "write bytes with a unit, such as `500MB`, `1.5GB` or `4GiB`"
    if isinstance(value, int) and not isinstance(value, bool):
        raise ValueError(f"must be a size with a unit, but YAML reads {shown_value(value)}: {how}")
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{shown_value(value)} is not a size: {how}")
    size = float(match["number"]) * SIZES[match["unit"].replace("k", "K")]
    if not 10**3 <= size <= 10**12:
        raise ValueError(f"{shown_value(value)} must be at least `1KB` and at most `1000GB`")
    return round(size)


def write_size(size: int) -> str:
    """Return the text that :func:`parse_size` reads as ``size``."""
    for unit, number in SIZES.items():
        if size % number == 0:
            return f"{size // number}{unit}"
    return f"{size / 1000:.3f}".rstrip("0") + "KB"


def parse_percentage(value: object) -> float:
    """Return the share, 0 to 1, that ``50%`` or ``0.5`` stands for.

    :raises ValueError: anything else.
    """
    if isinstance(value, str) and re.fullmatch(r"[0-9]+(\.[0-9]+)?%", value, re.ASCII):
        share = float(value[:-1]) / 100
    elif isinstance(value, int | float) and not isinstance(value, bool):
        share = float(value)
    else:
        raise ValueError(
            f"must be a share, but YAML reads {shown_value(value)}: write a percentage such as `50%`"
        )
    if not 0 <= share <= 1:
        raise ValueError(f"{shown_value(value)} is no share: write `0%` to `100%`, or a number from 0 to 1")
    return share


def write_percentage(share: float) -> str:
    """Return the text that :func:`parse_percentage` reads as ``share``."""
    return f"{share * 100:g}%"


def parse_fraction(value: object) -> int | Fraction | None:
    """Return the part of a whole that ``50GB`` (in bytes), ``1/30``, ``0.1``, ``5%`` or ``all`` stands for.

    :returns: bytes; or a fraction, more than nothing; or None for all.
    :raises ValueError: anything else.
    """
    text = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
    if not isinstance(text, str):
        raise ValueError(f"must be a part, but YAML reads {shown_value(value)}: {_HOW_TO_WRITE_A_PART}")
    if text == "all":
        return None
    if _SIZE.fullmatch(text):
        return parse_size(text)
    if not (match := _FRACTION.fullmatch(text)):
        raise ValueError(f"{shown_value(value)} is no part: {_HOW_TO_WRITE_A_PART}")
    divisor = Fraction(match[2] or 1) * (100 if match[3] else 1)
    part = Fraction(match[1]) / divisor if divisor else Fraction(0)
    if not 0 < part <= 1:
        raise ValueError(f"{shown_value(value)} is more than all, or nothing: {_HOW_TO_WRITE_A_PART}")
    return part
