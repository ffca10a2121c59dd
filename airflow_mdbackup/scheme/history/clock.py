"""When commits happened, if the clock of this machine was wrong for a while.

The stamp of a commit is later than all earlier stamps, whatever the clock says, so the order is safe. The
commit also records what the clock said (``at``). The earlier of the two is the time it claims: after a commit
under a clock that was ahead, stamps are ahead of the time; they are never behind it.

::

    believed      the longest sequence of claims that never goes back, of which none is in the future or
                  older than this program
    all others    spread evenly between the believed ones; an operator can set them (`mdbackup clock`)

Limitations: if the clock was wrong by so little, or for so long, that its claims fit, they are believed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_mdbackup.scheme.common.times import format_time, stamp_of, time_of_stamp
from airflow_mdbackup.scheme.errors import DestinationRefused
from airflow_mdbackup.scheme.files.jsonl import copy_records, read_header
from airflow_mdbackup.scheme.history.changes import commits
from airflow_mdbackup.scheme.store.locks import OPERATOR_WAIT
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.version_names import is_stamp, stamp_of_file

if TYPE_CHECKING:
    from airflow_mdbackup.scheme.history.replay import CommitTime


_OLDEST = "20260101T000000.000000Z"
"""A clock that shows an earlier time is wrong: this program did not exist then."""
_AHEAD = timedelta(hours=1)  # two clocks may differ by this
_ODD = timedelta(days=2)  # how old an index may be that this run did not build
_LAST_SECOND = 253402300799  # of datetime
_TICK = timedelta(microseconds=1)


def claimed_time(header: dict[str, Any], stamp: str, file: Path) -> str:
    """Return the time of a commit that the header of its history claims.

    :param file: the history file; its modification time counts if the header has no ``at``.
    """
    if is_stamp(by_hand := str(header.get("set", ""))):
        return by_hand
    at = str(header.get("at", ""))
    return min(stamp, at if is_stamp(at) else stamp_of_file(file))


def last_claimed(mirror: Mirror) -> str:
    """Return the time that the last commit claims; empty if there is none, or it cannot be read."""
    finished = commits(mirror)
    try:
        header = read_header(finished[-1]) if finished else {}
    except (OSError, DestinationRefused):  # the commit reports that
        return ""
    stamp = str(header.get("stamp", ""))
    return claimed_time(header, stamp, finished[-1]) if is_stamp(stamp) else ""


def set_time(mirror: Mirror, moment: CommitTime, when: datetime | None) -> None:
    """Set the time of a commit, in its history; None removes a time that was set.

    :raises DestinationBusy: a run holds the lock for too long.
    :raises DestinationFull, DestinationRefused, DestinationBroken, WorkerExhausted: see
        :meth:`.Mirror.translate_os_errors`.
    """
    with mirror.translate_os_errors(), mirror.lock("clock", OPERATOR_WAIT):
        header = {
            key: value for key, value in read_header(moment.file).items() if key not in ("format", "set")
        }
        header.setdefault("at", stamp_of_file(moment.file))  # the file is about to be rewritten
        if when is not None:
            header["set"] = stamp_of(when)
        copy_records(moment.file, moment.file, **header)


def contradiction(claims: Sequence[str], now: str) -> str | None:
    """Return a message if the last commit is in the future by the clock; None if it is not.

    One of the two is wrong, and it is unknown which, so nothing may be deleted because of its age.
    """
    if not claims or claims[-1] <= stamp_of(time_of_stamp(now) + _AHEAD):
        return None
    return (
        f"the clock of this machine says {format_time(now)}, but the last commit was at "
        f"{format_time(claims[-1])} by it. Set the clock, or set the time of that commit: "
        "`mdbackup clock --set`"
    )


def true_times(claims: Sequence[str], now: str) -> list[str]:
    """Return the times of commits, strictly increasing, given their claims in order.

    :param now: what the clock says; ignored if it is certainly wrong.
    """
    believed = _believed(claims, now)
    if len(believed) == len(claims) and all(first < second for first, second in pairwise(claims)):
        return list(claims)
    times: dict[int, datetime] = {number: time_of_stamp(claims[number]) for number in believed}
    for before, behind in pairwise([-1, *believed, len(claims)]):
        _fill(times, before, behind, time_of_stamp(now))
    found: list[datetime] = []
    for number in range(len(claims)):
        found.append(max(times[number], found[-1] + _TICK) if found else times[number])
    return list(map(stamp_of, found))


def bounds(claims: Sequence[str], number: int, now: str) -> tuple[str, str]:
    """Return the times of the believed commits before and after one; empty if there is none."""
    believed = _believed(claims, now)
    before = [claims[other] for other in believed if other < number]
    after = [claims[other] for other in believed if other > number]
    return (before[-1] if before else "", after[0] if after else "")


def _believed(claims: Sequence[str], now: str) -> list[int]:
    """Return the numbers of the commits whose claims are believed."""
    latest = stamp_of(time_of_stamp(now) + _AHEAD) if now >= _OLDEST else "9"
    return _longest_sequence(claims, [n for n, claim in enumerate(claims) if _OLDEST <= claim <= latest])


def _longest_sequence(claims: Sequence[str], numbers: Sequence[int]) -> list[int]:
    """Return the longest selection of ``numbers`` whose claims never go back."""
    ends: list[str] = []  # the lowest claim at the end of a sequence of each length
    last: list[int] = []
    before: dict[int, int] = {}
    for number in numbers:
        length = bisect_right(ends, claims[number])
        before[number] = last[length - 1] if length else -1
        ends[length : length + 1] = [claims[number]]
        last[length : length + 1] = [number]
    row: list[int] = []
    number = last[-1] if last else -1
    while number >= 0:
        row.append(number)
        number = before[number]
    return row[::-1]


def _fill(times: dict[int, datetime], before: int, behind: int, now: datetime) -> None:
    """Give the commits between two believed ones evenly spaced times."""
    number = behind - before - 1
    if not number:
        return
    end = times.get(behind)
    if end is None:
        end = max(now, times[before] + number * _TICK) if before in times else now
    begin = times[before] if before in times else end - (number + 1) * timedelta(seconds=1)
    for place in range(1, number + 1):
        times[before + place] = begin + (end - begin) * place / (number + 1)


def doubt(now: datetime, last: str, index: int, built: bool, since: timedelta = timedelta()) -> str | None:
    """Return a message why the clock of this machine may be wrong; None if nothing suggests that.

    :param last: the claimed time of the last commit, as a stamp; empty if there was none.
    :param index: when the provider's index was written, in Unix seconds, by the provider's clock.
    :param built: whether this run had it written.
    :param since: how long ago that was, by the clock of this machine.
    """
    here = f"the clock of this machine says {format_time(stamp_of(now))}"
    behind = "Set it right (timedatectl), or see `mdbackup clock`"
    if stamp_of(now) < _OLDEST:
        return f"{here}, which is before this program was written. {behind}"
    there = datetime.fromtimestamp(min(max(index, 0), _LAST_SECOND), UTC)
    since = max(since, timedelta())  # negative if the clock was set back after the build
    oldest = _AHEAD + since if built else _ODD
    if -_AHEAD <= now - there <= oldest:  # it is right now, even if it was wrong at the last commit
        return None
    if last and time_of_stamp(last) > now + _AHEAD:
        return f"{here}, but the last commit was at {format_time(last)} by it. {behind}"
    if there > now + _AHEAD or built:
        meanwhile = datetime.fromtimestamp(min(max(index, 0) + since.total_seconds(), _LAST_SECOND), UTC)
        theirs = format_time(stamp_of(meanwhile))
        return f"{here}, that of the provider {theirs}: one of them is wrong. {behind}"
    return None
