"""When commits were, where the clock of this machine was wrong for a while.

A commit has a stamp, later than every stamp before it, whatever the clock says: so order is safe. And it has
what the clock said (``at``). Of both, the earlier is what it claims: a stamp lies ahead of the time after a
commit under a clock that was ahead, and behind it never.

::

    believed      the longest row of claims of which none is before the one it follows, none is yet to come,
                  and none is older than this program
    all others    evenly between those that are believed, for nobody knows better; a person may (see `clock`)

What this does not give: the truth where the clock was wrong by so little, or for so long, that its claims
fit. Then they are believed.
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
"""No clock that is right says less than this, for then there was no such program."""
_AHEAD = timedelta(hours=1)  # by which two clocks may differ
_ODD = timedelta(days=2)  # an index that is not older, and was not built by this run, is taken for today's
_LAST_SECOND = 253402300799  # that datetime knows
_TICK = timedelta(microseconds=1)


def claimed_time(header: dict[str, Any], stamp: str, file: Path) -> str:
    """Return when a commit was, by what its history says.

    :param file: of that history. When it was written last counts if the header has no ``at``.
    """
    if is_stamp(by_hand := str(header.get("set", ""))):
        return by_hand
    at = str(header.get("at", ""))
    return min(stamp, at if is_stamp(at) else stamp_of_file(file))


def last_claimed(mirror: Mirror) -> str:
    """Return when the last commit was, by what its history says; empty if there is none that can be read."""
    finished = commits(mirror)
    try:
        header = read_header(finished[-1]) if finished else {}
    except (OSError, DestinationRefused):  # a commit says what to do about that
        return ""
    stamp = str(header.get("stamp", ""))
    return claimed_time(header, stamp, finished[-1]) if is_stamp(stamp) else ""


def set_time(mirror: Mirror, moment: CommitTime, when: datetime | None) -> None:
    """Say when a commit was, in its history; None takes back what was said.

    :raises DestinationBusy: a run holds the lock for too long.
    :raises DestinationFull, DestinationRefused, DestinationBroken, WorkerExhausted: see
        :meth:`.Mirror.translate_os_errors`.
    """
    with mirror.translate_os_errors(), mirror.lock("clock", OPERATOR_WAIT):
        header = {
            key: value for key, value in read_header(moment.file).items() if key not in ("format", "set")
        }
        header.setdefault("at", stamp_of_file(moment.file))  # which is written anew just now
        if when is not None:
            header["set"] = stamp_of(when)
        copy_records(moment.file, moment.file, **header)


def contradiction(claims: Sequence[str], now: str) -> str | None:
    """Return, for people, that the last commit is yet to come by the clock; None if it is not.

    One of both is wrong, and nobody can tell which, so that nothing may be taken away by its age.
    """
    if not claims or claims[-1] <= stamp_of(time_of_stamp(now) + _AHEAD):
        return None
    return (
        f"the clock of this machine says {format_time(now)}, but the last commit was at "
        f"{format_time(claims[-1])} "
        "by it. Set the clock, or say when that commit was: `mdbackup clock --set`"
    )


def true_times(claims: Sequence[str], now: str) -> list[str]:
    """Return when commits were, each later than the one before, given in their order what they claim.

    :param now: what the clock says; it counts for nothing if it is wrong for sure.
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
    """Return when the believed commits next to one were, before and after it; empty where there is none."""
    believed = _believed(claims, now)
    before = [claims[other] for other in believed if other < number]
    after = [claims[other] for other in believed if other > number]
    return (before[-1] if before else "", after[0] if after else "")


def _believed(claims: Sequence[str], now: str) -> list[int]:
    """Return the numbers of the commits whose claims are believed."""
    latest = stamp_of(time_of_stamp(now) + _AHEAD) if now >= _OLDEST else "9"
    return _longest_row(claims, [n for n, claim in enumerate(claims) if _OLDEST <= claim <= latest])


def _longest_row(claims: Sequence[str], numbers: Sequence[int]) -> list[int]:
    """Return the longest selection of ``numbers`` whose claims never fall."""
    ends: list[str] = []  # the lowest claim with which a row of each length ends
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
    """Give those between two that are believed times evenly between theirs."""
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
    """Return, for people, why the clock of this machine may be wrong; None if nothing speaks for it.

    :param last: when the last commit was, as a stamp, by what the clock said then; empty if there was none.
    :param index: when the provider's index was written, in Unix seconds, by the provider's clock.
    :param built: whether it was this very run that had it written,
    :param since: so long ago, by the clock of this machine.
    """
    here = f"the clock of this machine says {format_time(stamp_of(now))}"
    behind = "Set it right (timedatectl), or see `mdbackup clock`"
    if stamp_of(now) < _OLDEST:
        return f"{here}, which is before this program was written. {behind}"
    there = datetime.fromtimestamp(min(max(index, 0), _LAST_SECOND), UTC)
    since = max(since, timedelta())  # less, if the clock was set back after the build
    oldest = _AHEAD + since if built else _ODD
    if -_AHEAD <= now - there <= oldest:  # whatever it was when the last commit was, it is right now
        return None
    if last and time_of_stamp(last) > now + _AHEAD:
        return f"{here}, but the last commit was at {format_time(last)} by it. {behind}"
    if there > now + _AHEAD or built:
        meanwhile = datetime.fromtimestamp(min(max(index, 0) + since.total_seconds(), _LAST_SECOND), UTC)
        told = format_time(stamp_of(meanwhile))
        return f"{here}, that of the provider {told}: one of them is wrong. {behind}"
    return None
