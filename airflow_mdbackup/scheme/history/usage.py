"""What a backup takes on the disk, kept as running totals, so that telling it reads no history.

::

    each commit     adds up, while it is carried out, what its changes add to the disk; its history keeps that
                    in its header; not where only the whole history tells, since hands were at work
    status.json     has the totals as of some commit; whoever writes it adds the headers of later ones
    no totals       in an old, lost or damaged status.json: they are added up from all headers; where one of
                    these has none, they are counted anew from the whole history, once

A history has its final name once, so that what a crash cuts off is counted once, too.

What this does not give: what hands add or take away on the disk. It is counted once a change tells of it, or
by :func:`recount`.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from operator import add
from typing import Any, NamedTuple

from airflow_mdbackup.scheme.files.jsonl import CorruptFile, read_header
from airflow_mdbackup.scheme.files.syscalls import concerns_one_file, is_file
from airflow_mdbackup.scheme.files.tree import Tree
from airflow_mdbackup.scheme.history.changes import Change, ChangeKind, commits
from airflow_mdbackup.scheme.history.timeline import FileVersion, Timeline
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.version_names import OLD, stamp_in_name

log = logging.getLogger(__name__)

MONTH = timedelta(days=30)


class DiskUsage(NamedTuple):
    """Files on the disk of a backup, or what is added to them.

    :ivar live: files of the mirror, also such as have left the index; ``live_bytes`` are their sizes.
    :ivar versions: files in ``.old``, as far as history tells of them.
    :ivar came: bytes that were ever put in place.
    """

    live: int = 0
    live_bytes: int = 0
    versions: int = 0
    version_bytes: int = 0
    came: int = 0

    def plus(self, other: DiskUsage) -> DiskUsage:
        """Return the sum of both."""
        return DiskUsage(*map(add, self, other))


class UsageChange:
    """Adds up what the changes of one commit add to the disk."""

    def __init__(self) -> None:
        self._is_sure = True
        self._moved: tuple[bytes, ...] = ()  # what is below these went as well
        self._live = self._live_bytes = self._versions = self._version_bytes = self._came = 0

    def add(self, tree: Tree, change: Change) -> None:
        """Take in a change that the disk shows by now. What cannot be seen there is not counted.

        :param change: as it was written ahead.
        """
        try:
            self._add(tree, change)
        except OSError as error:
            # No commit fails because of a count: it is made anew when more can be seen.
            self._is_sure = self._is_sure and concerns_one_file(error)

    def _add(self, tree: Tree, change: Change) -> None:
        if change.what in (ChangeKind.ADDED, ChangeKind.REPLACED):
            size = change.size if change.size is not None else _size(tree, change.path)
            self._came += size
            if change.what == ChangeKind.ADDED and change.replaces is not None:
                self._is_sure = False  # hands took away what was there, which is counted still
            elif change.what == ChangeKind.REPLACED:
                self._live_bytes += size
                self._displace(0, _size(tree, change.version or b""), 1)
            else:
                self._live += 1
                self._live_bytes += size
        elif change.what == ChangeKind.EDITED or (
            change.what == ChangeKind.FORGOTTEN
            and not change.path.startswith(self._moved)
            and tree.lstat(change.path) is None
        ):
            self._is_sure = False  # what comes there again may be counted still, or not
        elif change.what == ChangeKind.PRUNED and change.size is None:
            self._is_sure = False  # hands had taken it away, and it may be counted still, or not
        elif change.what == ChangeKind.MOVED:
            files, size = _moved(tree, change.version or b"")
            self._moved += (change.path + b"/",)
            self._displace(files, size, files)
        elif change.what == ChangeKind.IMPORTED:
            self._versions += 1
            self._version_bytes += change.size or 0
        elif change.what == ChangeKind.PRUNED:
            self._versions -= 1
            self._version_bytes -= change.size or 0

    def _displace(self, gone: int, size: int, versions: int) -> None:
        self._live -= gone
        self._live_bytes -= size
        self._versions += versions
        self._version_bytes += size

    def total(self) -> DiskUsage | None:
        """Return the sum; None if only the whole history tells it."""
        if not self._is_sure:
            return None
        return DiskUsage(self._live, self._live_bytes, self._versions, self._version_bytes, self._came)


def _size(tree: Tree, path: bytes) -> int:
    found = tree.lstat(path)
    return found.st_size if found is not None and is_file(found) else 0


def _is_missing(tree: Tree, content: FileVersion) -> bool:
    """Whether hands took away what had left the index, so that it counts when it comes again."""
    return not any(map(tree.has_file, content.places))


def _moved(tree: Tree, place: bytes) -> tuple[int, int]:
    """Return how many files went to ``place`` that had been live, and their bytes."""
    if is_file(tree.lstat(place)):
        return 1, _size(tree, place)
    inside = b"/" + OLD + b"/"
    files = size = 0
    for path in tree.files_below(place):
        if inside not in path[len(place) :] and is_file(found := tree.lstat(path)):
            assert found is not None
            files += 1
            size += found.st_size
    return files, size


@dataclass(frozen=True, slots=True)
class UsageTotals:
    """What a backup has on the disk.

    :ivar stamp: of the last commit that is counted; empty before the first.
    :ivar days: bytes that came, by the day (``20261123``, UTC), for a month at least.
    """

    stamp: str = ""
    disk: DiskUsage = field(default_factory=DiskUsage)
    days: dict[str, int] = field(default_factory=dict)

    def state(self, now: datetime) -> dict[str, Any]:
        """Return what is stored of them."""
        days = {day: size for day, size in self.days.items() if day >= _day(now - MONTH) and size}
        return {"stamp": self.stamp, "disk": self.disk._asdict(), "days": days}

    def came(self, now: datetime) -> int:
        """Return the bytes that came in the 30 days before ``now``."""
        return sum(size for day, size in self.days.items() if _day(now - MONTH) < day <= _day(now))

    def plus(self, stamp: str, day: str, added: DiskUsage) -> UsageTotals:
        """Return them with what a commit has added."""
        days = {**self.days, day: self.days.get(day, 0) + added.came}
        return UsageTotals(stamp, self.disk.plus(added), days)


def _day(moment: datetime) -> str:
    return moment.strftime("%Y%m%d")


def stored_totals(status: dict[str, Any]) -> UsageTotals | None:
    """Return the totals that a status has; None if it has none, or no sound ones."""
    try:
        found = status["totals"]
        disk = DiskUsage(**{name: int(number) for name, number in found["disk"].items()})
        return UsageTotals(
            str(found["stamp"]), disk, {str(d): int(size) for d, size in found["days"].items()}
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def totals_now(mirror: Mirror, status: dict[str, Any], entries: int = 0) -> UsageTotals:
    """Return the totals as of the last commit, counting what the status does not. Needs the lock.

    :param status: as it is stored.
    :param entries: of the consumer index. If they are more than the live files, files of hands were adopted.
    :raises DestinationRefused: a file of history has a newer format.
    :raises sqlite3.Error: there is no room for the table of all changes, where they have to be counted anew.
    """
    stored = stored_totals(status)
    if stored is None or stored.stamp > mirror.last_commit():
        stored = UsageTotals()
    totals = stored
    for path in commits(mirror):
        if stamp_in_name(path.name) > totals.stamp:
            try:
                header = read_header(path)
                day = str(header.get("at", path.name))[:8]
                totals = totals.plus(stamp_in_name(path.name), day, DiskUsage(*map(int, header["disk"])))
            except (CorruptFile, KeyError, TypeError, ValueError):
                return recount(mirror)
    return recount(mirror) if totals is not stored and totals.disk.live < entries else totals


def totals_state(mirror: Mirror, status: dict[str, Any], entries: int = 0) -> dict[str, Any]:
    """Return what a status says of the totals now; nothing if they cannot be told. Needs the lock.

    See :func:`totals_now`. They are no reason for anything to fail.
    """
    try:
        return {"totals": totals_now(mirror, status, entries).state(datetime.now(UTC))}
    except Exception as error:
        log.warning("What %s takes on the disk is not known: %s", mirror.dest, error)
        return {}


def recount(mirror: Mirror) -> UsageTotals:
    """Count the totals from the whole history. Needs the lock.

    :raises DestinationRefused, sqlite3.Error: see :func:`totals_now`.
    """
    live = live_bytes = versions = version_bytes = 0
    with Timeline(mirror) as past, mirror.tree() as tree:
        for content in past.contents():
            if not content.places or (content.left and not content.until and _is_missing(tree, content)):
                continue
            size = content.size if content.size is not None else _size(tree, content.places[0])
            if content.until:
                versions += 1
                version_bytes += size
            else:
                live += 1
                live_bytes += size
        days: Counter[str] = Counter()
        for moment, size in past.arrived():
            days[moment.time[:8]] += size
    disk = DiskUsage(live, live_bytes, versions, version_bytes, days.total())
    return UsageTotals(mirror.last_commit(), disk, days)
