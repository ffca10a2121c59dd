"""What a backup takes on the disk, kept as running totals so that nobody has to read all of history for it.

::

    each commit     adds up what its changes add to the disk, and stores that in the header of its history;
                    it stores nothing if only the whole history can say, after changes by hand
    status.json     has the totals as of some commit; whoever writes it adds the headers of later ones
    no totals       in an old, lost or damaged status.json: they are summed up from all headers; if one of
                    these has none, they are counted again from the whole history, once

A history file gets its final name once, so a commit that was cut off is counted once, too.

Limitations: what is added or deleted by hand is counted only when a later change involves it, or by
:func:`recount`.
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
from airflow_mdbackup.scheme.history.replay import FileVersion
from airflow_mdbackup.scheme.history.timeline import Timeline
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.version_names import OLD, stamp_in_name

log = logging.getLogger(__name__)

MONTH = timedelta(days=30)


class DiskUsage(NamedTuple):
    """Files on the disk of a backup, or what is added to them.

    :ivar live: files of the mirror, including those that have left the index; ``live_bytes`` is their size.
    :ivar versions: files in ``.old`` that history knows; ``version_bytes`` is their size.
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
        self._is_certain = True
        self._moved: tuple[bytes, ...] = ()  # everything below these was moved as well
        self._live = self._live_bytes = self._versions = self._version_bytes = self._came = 0

    def add(self, tree: Tree, change: Change) -> None:
        """Count a change that the disk shows by now. What cannot be seen there is not counted.

        :param change: as it was written ahead.
        """
        try:
            self._add(tree, change)
        except OSError as error:
            # No commit fails because of a count: it is repeated when more can be seen.
            self._is_certain = self._is_certain and concerns_one_file(error)

    def _add(self, tree: Tree, change: Change) -> None:
        match change.what:
            case ChangeKind.ADDED:
                self._add_new(tree, change)
            case ChangeKind.REPLACED:
                self._replace(tree, change)
            case ChangeKind.FORGOTTEN:
                self._forget(tree, change)
            case ChangeKind.MOVED:
                self._move(tree, change)
            case ChangeKind.IMPORTED:
                self._add_versions(1, change.size or 0)
            case ChangeKind.PRUNED if change.size is not None:
                self._add_versions(-1, -change.size)
            case ChangeKind.PRUNED | ChangeKind.EDITED:
                self._is_certain = False  # the file was deleted by hand, or may be: it may still be counted

    def _add_new(self, tree: Tree, change: Change) -> None:
        size = _new_size(tree, change)
        self._came += size
        if change.replaces is None:
            self._live += 1
            self._live_bytes += size
        else:
            self._is_certain = False  # the old file was deleted by hand, and is still counted

    def _replace(self, tree: Tree, change: Change) -> None:
        size, old_size = _new_size(tree, change), _size(tree, change.version or b"")
        self._came += size
        self._live_bytes += size - old_size
        self._add_versions(1, old_size)

    def _forget(self, tree: Tree, change: Change) -> None:
        if not change.path.startswith(self._moved) and tree.lstat(change.path) is None:
            self._is_certain = False  # deleted by hand: a file that is added here later may still be counted

    def _move(self, tree: Tree, change: Change) -> None:
        files, size = _moved(tree, change.version or b"")
        self._moved += (change.path + b"/",)
        self._live -= files
        self._live_bytes -= size
        self._add_versions(files, size)

    def _add_versions(self, number: int, size: int) -> None:
        self._versions += number
        self._version_bytes += size

    def total(self) -> DiskUsage | None:
        """Return the sum; None if only the whole history can say."""
        if not self._is_certain:
            return None
        return DiskUsage(self._live, self._live_bytes, self._versions, self._version_bytes, self._came)


def _new_size(tree: Tree, change: Change) -> int:
    return change.size if change.size is not None else _size(tree, change.path)


def _size(tree: Tree, path: bytes) -> int:
    found = tree.lstat(path)
    return found.st_size if found is not None and is_file(found) else 0


def _is_missing(tree: Tree, version: FileVersion) -> bool:
    """Whether a file that had left the index was deleted by hand, so that it counts if it is added again."""
    return not any(map(tree.has_file, version.places))


def _moved(tree: Tree, place: bytes) -> tuple[int, int]:
    """Return the number and size of the files at or below ``place`` that had been live."""
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

    :ivar stamp: of the last commit counted; empty before the first.
    :ivar days: bytes added per day (``20261123``, UTC), for at least a month.
    """

    stamp: str = ""
    disk: DiskUsage = field(default_factory=DiskUsage)
    days: dict[str, int] = field(default_factory=dict)

    def state(self, now: datetime) -> dict[str, Any]:
        """Return them as they are stored."""
        days = {day: size for day, size in self.days.items() if day >= _day(now - MONTH) and size}
        return {"stamp": self.stamp, "disk": self.disk._asdict(), "days": days}

    def came(self, now: datetime) -> int:
        """Return the bytes added in the 30 days before ``now``."""
        return sum(size for day, size in self.days.items() if _day(now - MONTH) < day <= _day(now))

    def plus(self, stamp: str, day: str, added: DiskUsage) -> UsageTotals:
        """Return them with what a commit added."""
        days = {**self.days, day: self.days.get(day, 0) + added.came}
        return UsageTotals(stamp, self.disk.plus(added), days)


def _day(moment: datetime) -> str:
    return moment.strftime("%Y%m%d")


def stored_totals(status: dict[str, Any]) -> UsageTotals | None:
    """Return the totals in a status; None if it has none, or damaged ones."""
    try:
        found = status["totals"]
        disk = DiskUsage(**{name: int(number) for name, number in found["disk"].items()})
        return UsageTotals(
            str(found["stamp"]), disk, {str(d): int(size) for d, size in found["days"].items()}
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def totals_now(mirror: Mirror, status: dict[str, Any], entries: int = 0) -> UsageTotals:
    """Return the totals as of the last commit, including commits that the status lacks. Needs the lock.

    :param status: as stored.
    :param entries: in the consumer index. If there are more than live files, files put there by hand were
        adopted.
    :raises DestinationRefused: a history file has a newer format.
    :raises sqlite3.Error: they have to be counted again, and there is no room for the table of all changes.
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
    """Return the totals as a status has them; empty, with a warning, if they are unknown. Needs the lock.

    See :func:`totals_now`.
    """
    try:
        return {"totals": totals_now(mirror, status, entries).state(datetime.now(UTC))}
    except Exception as error:
        log.warning("The disk usage of %s is not known: %s", mirror.dest, error)
        return {}


def recount(mirror: Mirror) -> UsageTotals:
    """Count the totals from all of history. Needs the lock.

    :raises DestinationRefused, sqlite3.Error: see :func:`totals_now`.
    """
    live = live_bytes = versions = version_bytes = 0
    with Timeline(mirror) as timeline, mirror.tree() as tree:
        for version in timeline.contents():
            if not version.places or (version.left and not version.until and _is_missing(tree, version)):
                continue
            size = version.size if version.size is not None else _size(tree, version.places[0])
            if version.until:
                versions += 1
                version_bytes += size
            else:
                live += 1
                live_bytes += size
        days: Counter[str] = Counter()
        for moment, size in timeline.bytes_added():
            days[moment.time[:8]] += size
    disk = DiskUsage(live, live_bytes, versions, version_bytes, days.total())
    return UsageTotals(mirror.last_commit(), disk, days)
