"""How a bandwidth limit is written in YAML: a rate, a rate at some hours of the day, or a list of those."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import time
from typing import Annotated

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from airflow_mdbackup.config.problem import quoted, unknown_key
from airflow_mdbackup.scheme.common.units import parse_rate, shown_value, write_size

_TIME = re.compile(r"(?:[01][0-9]|2[0-3]):[0-5][0-9]", re.ASCII)
_KEYS = ("rate", "from", "to")
_EXAMPLE = '`{rate: 5MB, from: "08:00", to: "18:00"}`'


@dataclass(frozen=True, slots=True)
class TimedRate:
    """A rate in bytes per second, from ``start`` until before ``end``, or at all hours if both are None.

    An ``end`` before the ``start`` is on the next day.
    """

    rate: int
    start: time | None = None
    end: time | None = None

    def __str__(self) -> str:
        hours = f" from {self.start:%H:%M} to {self.end:%H:%M}" if self.start and self.end else ""
        return f"{write_size(self.rate)}/s{hours}"

    def applies_at(self, now: time) -> bool:
        """Whether ``now`` is within the hours."""
        if self.start is None or self.end is None:
            return True
        if self.start < self.end:
            return self.start <= now < self.end
        return now >= self.start or now < self.end


@dataclass(frozen=True, slots=True)
class BandwidthLimit:
    """The rates of a day: the first that applies is the limit; if none applies, there is no limit."""

    rates: tuple[TimedRate, ...]

    def __str__(self) -> str:
        return ", else ".join(map(str, self.rates))

    def at(self, now: time) -> int | None:
        """Return the limit at a time of the day, in bytes per second, or None if there is none then."""
        return next((timed.rate for timed in self.rates if timed.applies_at(now)), None)


def parse_bandwidth_limit(value: object) -> BandwidthLimit:
    """Parse a rate, a mapping of ``rate``, ``from`` and ``to``, or a list of those.

    :raises ValueError: it is anything else, or a list with entries that could never apply.
    """
    if isinstance(value, BandwidthLimit):
        return value
    if not isinstance(value, list | tuple):
        return BandwidthLimit((_timed_rate(value),))
    if not value:
        raise ValueError("must not be an empty list: write a rate such as `20MB`, or `null` for no limit")
    rates = []
    for number, entry in enumerate(value, 1):
        try:
            rates.append(_timed_rate(entry))
        except ValueError as error:
            raise ValueError(f"entry {number}: {error}") from error
        if rates[-1].start is None and number < len(value):
            raise ValueError(
                f"entry {number} has no hours, so those after it would never apply: put it last, or write its"
                f" hours, as in {_EXAMPLE}"
            )
    return BandwidthLimit(tuple(rates))


def _timed_rate(value: object) -> TimedRate:
    if not isinstance(value, Mapping):
        return TimedRate(parse_rate(value))
    for key in value:
        if not isinstance(key, str):
            raise ValueError(unknown_key(key, ()))
        if key not in _KEYS:
            raise ValueError(f"{quoted(key)} {unknown_key(key, _KEYS)}")
    if "rate" not in value:
        raise ValueError(f"`rate` is missing: write for example {_EXAMPLE}")
    try:
        rate = parse_rate(value["rate"])
    except ValueError as error:
        raise ValueError(f"`rate`: {error}") from error
    hours = [_time_of_day(key, value[key]) for key in ("from", "to") if key in value]
    if not hours:
        return TimedRate(rate)
    if len(hours) == 1:
        there, missing = ("from", "to") if "from" in value else ("to", "from")
        raise ValueError(
            f"`{there}` is given and `{missing}` is missing: write both, as in {_EXAMPLE}, or neither"
        )
    start, end = hours
    if start == end:
        raise ValueError(f"`from` and `to` are both `{start:%H:%M}`: for a whole day write neither")
    return TimedRate(rate, start, end)


def _time_of_day(key: str, value: object) -> time:
    if isinstance(value, str):
        if _TIME.fullmatch(value):
            return time.fromisoformat(value)
        raise ValueError(f'`{key}`: {shown_value(value)} is not a time of day: write `"00:00"` to `"23:59"`')
    trap, example = "", "08:00"
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 24 * 60:
        hours, minutes = divmod(value, 60)
        example = f"{hours:02}:{minutes:02}"
        trap = f" (as it does for an unquoted `{hours}:{minutes:02}`)"
    raise ValueError(
        f"`{key}`: must be a time of day, but YAML reads {shown_value(value)}{trap}: write it in quotes, as"
        f' `"{example}"`'
    )


Rate = Annotated[
    int,
    BeforeValidator(parse_rate),
    PlainSerializer(write_size, when_used="json"),
    WithJsonSchema({"type": "string", "title": "rate"}),
]
Bandwidth = Annotated[
    BandwidthLimit,
    BeforeValidator(parse_bandwidth_limit),
    WithJsonSchema({"type": "string", "title": "rate, mapping of `rate`, `from` and `to`, or list of those"}),
]
