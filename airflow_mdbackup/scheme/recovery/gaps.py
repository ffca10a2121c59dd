"""What must have happened to a path where the history has gaps, given what is known about it.

::

    known     events of the path before and after the gaps, versions found on the disk, and the index now
    in a gap  what the index listed before it, the versions of that time in order, and what it must have
              listed after it: each step between two of these is a change

Only infers: :mod:`.rebuild_history` finds the versions before, and writes the changes afterwards.
"""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import zip_longest
from operator import itemgetter
from typing import NamedTuple

from airflow_mdbackup.scheme.files.syscalls import concerns_one_file, is_file, seconds
from airflow_mdbackup.scheme.files.tree import Tree
from airflow_mdbackup.scheme.history.changes import Change, ChangeKind
from airflow_mdbackup.scheme.history.timeline import HistoryGap

START, END = "", "~"
"""Of a gap, in place of a stamp. They sort before and after all stamps."""


class Attributes(NamedTuple):
    """Size in bytes, mtime in Unix seconds and mode of a file; None where not known."""

    size: int | None = None
    mtime: int | None = None
    mode: int | None = None


class FoundFile(NamedTuple):
    """A file that was present in a gap, and was displaced in it or was still there at its end.

    :ivar gap: index of the gap.
    :ivar stamp: when it was displaced; :data:`END` if it was not.
    :ivar version: where it went; None if it went with a directory above it.
    """

    path: bytes
    gap: int
    stamp: str
    md5: bytes
    size: int
    mtime: int
    mode: int
    version: bytes | None

    @property
    def attributes(self) -> Attributes:
        return Attributes(self.size, self.mtime, self.mode)


class Rank(IntEnum):
    """The order of events within one commit."""

    GAP = 0
    EDIT = 1
    MOVE = 2
    CHANGE = 3


class Event(NamedTuple):
    """Something that happened to a path, or a gap, in which it is not known what happened.

    :ivar commit: its number. A gap comes before the commit with its number.
    :ivar md5: what the index had from then on; ``old_md5`` is what it, or the file, had before.
    :ivar gap: index of the gap, if it is one.
    """

    commit: int
    rank: Rank
    old_md5: bytes | None = None
    md5: bytes | None = None
    gap: int | None = None


@dataclass(frozen=True, slots=True)
class PathInGap:
    """What is known about a path in a gap.

    :ivar gap: index of the gap.
    :ivar listed: the md5 that the index had before the gap; None if it did not list the path.
    :ivar expected: the md5 that it must have had after the gap; likewise.
    :ivar versions: the files that were at the path in the gap, oldest first.
    :ivar live: the file that is there now, if nothing else happened to the path since the gap.
    """

    path: bytes
    gap: int
    listed: bytes | None
    expected: bytes | None
    versions: list[FoundFile]
    live: os.stat_result | None

    @property
    def live_attributes(self) -> Attributes:
        live = self.live
        return Attributes(live.st_size, seconds(live), stat.S_IMODE(live.st_mode)) if live else Attributes()


class ReconstructedChanges:
    """The changes in gaps, in a table that need not fit in memory."""

    def __init__(self, table: sqlite3.Connection) -> None:
        self._table = table
        self._moves: dict[bytes, set[tuple[int, str]]] = {}  # by path: gaps and stamps
        table.execute(
            "CREATE TABLE change (gap INTEGER, stamp TEXT, path BLOB, what TEXT, old_md5 BLOB, md5 BLOB,"
            " size INTEGER, mtime INTEGER, mode INTEGER, version BLOB, UNIQUE (stamp, path, what, version))"
        )

    def add(
        self,
        gap: int,
        stamp: str,
        path: bytes,
        what: ChangeKind,
        *,
        old_md5: bytes | None = None,
        md5: bytes | None = None,
        attributes: Attributes = Attributes(),  # noqa: B008 - immutable
        version: bytes | None = None,
    ) -> None:
        """Add a change.

        :param gap: index of the gap.
        :param stamp: when it happened; or :data:`START` or :data:`END` of the gap.
        """
        if what == ChangeKind.MOVED:
            self._moves.setdefault(path, set()).add((gap, stamp))
        row = (gap, stamp, path, what, old_md5, md5, *attributes, version)
        self._table.execute("INSERT OR IGNORE INTO change VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    def last_move(self, gap: int, path: bytes, before: str) -> str:
        """Return when a path or a directory above it was last moved in a gap; empty if it was not."""
        last = ""
        while path:
            stamps = (stamp for index, stamp in self._moves.get(path, ()) if index == gap and stamp < before)
            last = max(last, *stamps, "")
            path = path.rpartition(b"/")[0]
        return last

    def first_and_last(self, gap: int) -> tuple[str | None, str | None]:
        """Return the first and the last stamp in a gap; None if there is none."""
        query = "SELECT min(stamp), max(stamp) FROM change WHERE gap = ? AND stamp NOT IN (?, ?)"
        first, last = self._table.execute(query, (gap, START, END)).fetchone()
        return first, last

    def assign_stamp(self, gap: int, mark: str, stamp: str) -> None:
        """Give the changes at :data:`START` or :data:`END` of a gap a stamp."""
        query = "UPDATE change SET stamp = ? WHERE gap = ? AND stamp = ?"
        self._table.execute(query, (stamp, gap, mark))

    def stamps_in(self, gap: int) -> list[str]:
        query = "SELECT DISTINCT stamp FROM change WHERE gap = ? ORDER BY stamp"
        return [stamp for (stamp,) in self._table.execute(query, (gap,))]

    def changes_at(self, gap: int, stamp: str) -> Iterator[Change]:
        """Yield the changes of a stamp, in path order."""
        query = (
            "SELECT path, what, NULL, old_md5, md5, size, mtime, mode, version FROM change"
            " WHERE gap = ? AND stamp = ? ORDER BY path, rowid"
        )
        return (Change(*row) for row in self._table.execute(query, (gap, stamp)))

    def counts(self) -> dict[str, dict[str, int]]:
        """Return how many changes of each kind there are, by stamp."""
        numbers: dict[str, dict[str, int]] = {}
        query = "SELECT stamp, what, count(*) FROM change GROUP BY stamp, what ORDER BY stamp, what"
        for stamp, what, number in self._table.execute(query):
            numbers.setdefault(stamp, {})[what] = number
        return numbers


class GapFiller:
    """Works out what happened in the gaps, path by path.

    :param changes: where it is recorded.
    :param tree: the live files.
    :param hash_file: returns the md5 of the live file at a path; None if it cannot be read.
    """

    def __init__(
        self,
        gaps: Sequence[HistoryGap],
        changes: ReconstructedChanges,
        tree: Tree,
        hash_file: Callable[[bytes], bytes | None],
    ) -> None:
        self._gaps = gaps
        self._changes = changes
        self._tree = tree
        self._hash_file = hash_file

    def fill_gaps(self, path: bytes, known: list[Event], found: list[FoundFile], now: bytes | None) -> None:
        """Go through the events of a path in order, and fill each gap among them.

        :param now: the md5 that the index has now.
        """
        if now is not None or any(event.rank != Rank.MOVE for event in known):
            # Then events and index show what was there at the end of a gap.
            found = [each for each in found if each.stamp != END]
        gaps = (Event(gap.number, Rank.GAP, gap=index) for index, gap in enumerate(self._gaps))
        events = sorted([*known, *gaps], key=itemgetter(0, 1))
        listed: bytes | None = None
        for position, event in enumerate(events):
            if event.gap is None:
                listed = event.md5
                continue
            later = events[position + 1 :]
            versions = [each for each in found if each.gap == event.gap]
            expected = self._md5_after_gap(path, later, found, now)
            if expected is None and not versions and self._may_have_left_later(later):
                continue
            is_last = all(each.gap is not None for each in later)
            live = self._live_file(path) if is_last and (expected or versions) else None
            self._fill_gap(PathInGap(path, event.gap, listed, expected, versions, live))
            listed = expected

    def _may_have_left_later(self, later: list[Event]) -> bool:
        """Whether an entry that is not there any more may have left the index only after a gap."""
        if not later:
            return False
        following = later[0]
        # Entries leave with a directory that moves; but the lines about it may be unreadable.
        is_cut_off = any(gap.within and gap.number == following.commit + 1 for gap in self._gaps)
        return following.gap is not None or (following.rank == Rank.MOVE and is_cut_off)

    def _md5_after_gap(
        self, path: bytes, later: list[Event], found: list[FoundFile], now: bytes | None
    ) -> bytes | None:
        """Return the md5 that the index must have had for a path after a gap, given what happened later.

        :param now: the md5 that it has now.
        """
        for position, event in enumerate(later):
            if event.gap is None:
                same = [each for each in later[position:] if each.commit == event.commit and each.gap is None]
                return next((each.old_md5 for each in same if each.old_md5 is not None), None)
            versions = [each for each in found if each.gap == event.gap]
            if versions:
                return versions[0].md5
            if self._changes.last_move(event.gap, path, END):
                return None  # it came after what had been in its way
        return now

    def _live_file(self, path: bytes) -> os.stat_result | None:
        try:
            status = self._tree.lstat(path)
        except OSError as error:
            if not concerns_one_file(error):
                raise
            return None
        return status if is_file(status) else None

    def _fill_gap(self, known: PathInGap) -> None:
        """Record what must have happened to a path in a gap."""
        listed, since = known.listed, START
        for version, following in zip_longest(known.versions, known.versions[1:]):
            if listed != version.md5 and not self._is_displaced_at_start(version):
                self._record_added(known, since, version.stamp, version.md5, version.attributes)
            since = version.stamp
            if version.stamp == END:
                listed = version.md5
                break
            if version.version is None:
                listed = None  # it went with a directory, whose move is recorded
                continue
            listed = self._record_displaced(known, version, following)
        if listed == known.expected:
            return
        if known.expected is None:
            self._changes.add(known.gap, END, known.path, ChangeKind.FORGOTTEN, old_md5=listed)
        else:
            self._record_added(known, since, END, known.expected, known.live_attributes)

    def _is_displaced_at_start(self, version: FoundFile) -> bool:
        """Whether the commit with which a gap starts, and part of which is lost, displaced a version.

        It was there before that commit.
        """
        gap = self._gaps[version.gap]
        return gap.within and version.stamp == gap.after

    def _record_added(
        self, known: PathInGap, since: str, until: str, md5: bytes, attributes: Attributes
    ) -> None:
        """Record that a file was added as early as possible between two stamps.

        That is after the last move of the path, or of a directory above it.
        """
        stamp = max(since, self._changes.last_move(known.gap, known.path, until))
        self._changes.add(known.gap, stamp, known.path, ChangeKind.ADDED, md5=md5, attributes=attributes)

    def _record_displaced(
        self, known: PathInGap, version: FoundFile, following: FoundFile | None
    ) -> bytes | None:
        """Record that a version was displaced, and return the md5 of what took its place, if anything did.

        :param following: the next version of the same path in the gap.
        """
        md5, attributes = known.expected, known.live_attributes
        if following is not None:
            md5, attributes = following.md5, following.attributes
        elif md5 is None and known.live is not None:
            md5 = self._hash_file(known.path)
        what = ChangeKind.REPLACED
        if md5 is None:
            what, attributes = ChangeKind.MOVED, Attributes()
        self._changes.add(
            *(known.gap, version.stamp, known.path, what),
            old_md5=version.md5,
            md5=md5,
            attributes=attributes,
            version=version.version,
        )
        return md5
