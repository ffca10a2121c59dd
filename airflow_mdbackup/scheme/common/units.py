"""Sizes, rates, durations, percentages and fractions: as people write them, and printed for people.

What people write comes from YAML or the command line. YAML 1.1 reads some plain text as something else
(``1:30`` is the number 90, ``no`` is false, ``0755`` is 493), so every message about a wrong type names the
type that YAML saw.
"""

from __future__ import annotations

import math
import re
import reprlib
from datetime import timedelta
from fractions import Fraction


def format_count(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number of things: ``no versions``, ``1 file``, ``2,000 entries``.

    :param plural: of the noun, if it is not regular.
    """
    if number == 1:
        return f"1 {noun}"
    return f"{f'{number:,}' if number else 'no'} {plural or noun + 's'}"


def format_size(size: float) -> str:
    """Return a number of bytes, in powers of ten: ``24 B``, ``1.5 kB``, ``2,000.0 TB``."""
    if round(size) < 1000:
        return f"{round(size)} B"
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 1000:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:,.1f} TB"


def format_rate(rate: float) -> str:
    """Return a number of bytes per second: ``1.5 MB/s``."""
    return f"{format_size(rate)}/s"


def format_elapsed(seconds: float) -> str:
    """Return how long something took: ``2.2 s``; from a minute on, see :func:`format_duration`."""
    return f"{seconds:.1f} s" if seconds < 59.95 else format_duration(timedelta(seconds=seconds))


def format_duration(duration: timedelta) -> str:
    """Return a duration in its two largest units: ``3 d 4 h``, ``26 h``, ``5 min``, ``12 s``."""
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


def format_two_durations(longer: timedelta, shorter: timedelta) -> tuple[str, str]:
    """Return two durations as texts that differ: to the second if they are equal when rounded."""
    rounded = format_duration(longer), format_duration(shorter)
    if rounded[0] != rounded[1]:
        return rounded
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
_SIZES = {"GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20, "KB": 10**3, "KiB": 2**10}
_SIZE = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?)(?P<unit>[kKMG]B|[KMG]iB)", re.ASCII)
_FRACTION = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,12})?)(?:/([0-9]{1,12})|(%))?", re.ASCII)
_LONGEST = timedelta(days=3650)
_shorten = reprlib.Repr()
_shorten.maxstring = 300
_DURATION_HELP = "write numbers with units, such as `90s`, `15m`, `1h30m`, `26h`, `2d` or `1y`"
_SIZE_HELP = "write bytes with a unit, such as `500MB`, `1.5GB` or `4GiB`"
_RATE_HELP = "write bytes (not bits) per second, such as `500KB`, `20MB`, `1.5GB` or `10MiB`"
_FRACTION_HELP = "write a fraction such as `1/30`, a size such as `50GB`, or `all`"


def shortened(value: object) -> str:
    """Return a value as Python writes it, cut in the middle if it is long."""
    return _shorten.repr(value)


def shown_value(value: object) -> str:
    """Return what YAML made of a value: ``the number 90``, ``the text 'yes'``."""
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

    :raises ValueError: anything else, zero or less, or more than ten years.
    """
    if isinstance(value, timedelta):
        duration = value
    elif not isinstance(value, str):
        trap = " (as it does for an unquoted `1:30`)" if value == 90 else ""
        raise ValueError(f"must be a duration, but YAML reads {shown_value(value)}{trap}: {_DURATION_HELP}")
    elif not (match := _DURATION.fullmatch(value)):
        raise ValueError(f"{shown_value(value)} is not a duration: {_DURATION_HELP}")
    else:
        parts = {_LENGTHS[unit]: float(number) for unit, number in match.groupdict().items() if number}
        # Checked first, because a timedelta would overflow.
        too_long = any(number > _LONGEST / length for length, number in parts.items())
        duration = timedelta.max if too_long else sum((n * unit for unit, n in parts.items()), timedelta())
    if not timedelta() < duration <= _LONGEST:
        raise ValueError(f"{shown_value(value)} must be more than zero and at most ten years (`3650d`)")
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
    return _parse_bytes(value, value, "size", _SIZE_HELP)


def parse_rate(value: object) -> int:
    """Return the bytes per second that ``500KB``, ``20MB/s``, ``1.5GB`` or ``10MiB`` stands for.

    :raises ValueError: anything else, less than 1 KB or more than 1,000 GB.
    """
    size = value.removesuffix("/s") if isinstance(value, str) else value
    return _parse_bytes(size, value, "rate", _RATE_HELP)


def _parse_bytes(size: object, value: object, noun: str, how: str) -> int:
    if not isinstance(size, str):
        raise ValueError(f"must be a {noun}, but YAML reads {shown_value(value)}: {how}")
    match = _SIZE.fullmatch(size)
    if match is None:
        raise ValueError(f"{shown_value(value)} is not a {noun}: {how}")
    number = float(match["number"]) * _SIZES[match["unit"].replace("k", "K")]
    if not 10**3 <= number <= 10**12:
        raise ValueError(f"{shown_value(value)} must be at least `1KB` and at most `1000GB`")
    return round(number)


def write_size(size: int) -> str:
    """Return the text that :func:`parse_size` and :func:`parse_rate` read as ``size``."""
    for unit, number in _SIZES.items():
        if size % number == 0:
            return f"{size // number}{unit}"
    return f"{size / 1000:.3f}".rstrip("0") + "KB"


def parse_percentage(value: object) -> float:
    """Return the fraction, 0 to 1, that ``50%`` or ``0.5`` stands for.

    :raises ValueError: anything else.
    """
    if isinstance(value, str) and re.fullmatch(r"[0-9]+(\.[0-9]+)?%", value, re.ASCII):
        share = float(value[:-1]) / 100
    elif isinstance(value, int | float) and not isinstance(value, bool):
        share = float(value)
    else:
        raise ValueError(f"must be a percentage, but YAML reads {shown_value(value)}: write it like `50%`")
    if not 0 <= share <= 1:
        raise ValueError(
            f"{shown_value(value)} is not a valid percentage: write `0%` to `100%`, or a number from 0 to 1"
        )
    return share


def write_percentage(share: float) -> str:
    """Return the text that :func:`parse_percentage` reads as ``share``."""
    return f"{share * 100:g}%"


def parse_fraction(value: object) -> int | Fraction | None:
    """Return the part of a whole that ``50GB`` (in bytes), ``1/30``, ``0.1``, ``5%`` or ``all`` stands for.

    :returns: bytes; or a fraction above 0; or None for all.
    :raises ValueError: anything else.
    """
    text = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
    if not isinstance(text, str):
        raise ValueError(f"must be a fraction, but YAML reads {shown_value(value)}: {_FRACTION_HELP}")
    if text == "all":
        return None
    if _SIZE.fullmatch(text):
        return parse_size(text)
    if not (match := _FRACTION.fullmatch(text)):
        raise ValueError(f"{shown_value(value)} is not a fraction: {_FRACTION_HELP}")
    divisor = Fraction(match[2] or 1) * (100 if match[3] else 1)
    part = Fraction(match[1]) / divisor if divisor else Fraction(0)
    if not 0 < part <= 1:
        raise ValueError(f"{shown_value(value)} must be more than 0 and at most all: {_FRACTION_HELP}")
    return part
