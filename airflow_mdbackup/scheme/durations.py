"""Durations in words, for people."""

from __future__ import annotations

import math
from datetime import timedelta


def in_words(duration: timedelta) -> str:
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


def apart(longer: timedelta, shorter: timedelta) -> tuple[str, str]:
    """Return two durations in words that differ: to the second, where they are the same when rounded."""
    told = in_words(longer), in_words(shorter)
    if told[0] != told[1]:
        return told
    return _exact(math.ceil(longer.total_seconds())), _exact(math.floor(shorter.total_seconds()))


def _exact(seconds: int) -> str:
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24) if hours >= 48 else (0, hours)
    counts = {"d": days, "h": hours, "min": minutes, "s": seconds}
    return " ".join(f"{count} {unit}" for unit, count in counts.items() if count) or "0 s"
