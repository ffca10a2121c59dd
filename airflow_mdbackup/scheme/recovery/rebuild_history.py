"""History that is lost or damaged is reconstructed, as far as the names in ``.old`` and the index allow.

::

    gaps     where the chain of digests is broken, and where a history file cannot be read to its end
    find     versions that the history does not know, and whose stamp falls into a gap
    judge    path by path: what must have happened in a gap, given what was there before it, the versions
             found, and what follows
    write    one history file for each stamp found, and one before them for what was there by then

The time when a version was displaced is exact. A file that was added counts as present from the start of its
gap (in the first gap: since ``dest`` was set up), and one that the provider deleted as present until the end
of the gap, so a restore brings back too much rather than too little. A damaged history file is kept, under a
name that ends in ``.damaged``; its readable lines remain valid.

Limitations: what left no trace is not reconstructed, such as a file that appeared and disappeared within a
gap; nor versions whose names had to be shortened.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from heapq import merge
from itertools import chain, groupby, pairwise, zip_longest
from operator import attrgetter, itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.common.progress import ReportTimer
from airflow_mdbackup.scheme.files.content import md5_of
from airflow_mdbackup.scheme.files.jsonl import CorruptFile, read_header, read_records, write_records
from airflow_mdbackup.scheme.files.syscalls import concerns_one_file, fsync_directory, is_file, seconds
from airflow_mdbackup.scheme.files.tree import Tree
from airflow_mdbackup.scheme.history.changes import Change, ChangeKind
from airflow_mdbackup.scheme.history.consumer_index import index_to_look_at, is_canonical, present_index
from airflow_mdbackup.scheme.history.journal import recover
from airflow_mdbackup.scheme.history.timeline import CommitTime, HistoryGap, Timeline
from airflow_mdbackup.scheme.index.canonical import digest, read_entries
from airflow_mdbackup.scheme.recovery.verify import unknown_files
from airflow_mdbackup.scheme.store.locks import OPERATOR_WAIT
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.version_names import Displaced, displaced, stamp_beside, stamp_of_file

log = logging.getLogger(__name__)

_RUN_ID = "rebuilt"
_START, _END = "", "~"  # of a gap, in place of a stamp; they sort before and after all stamps


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What was rebuilt, or would be.

    :ivar gaps: how many there were.
    :ivar changes: how many changes of each kind were reconstructed, by stamp of the history file.
    :ivar unclear: places of versions that cannot be attributed to a path, or that fall into no gap.
    """

    gaps: int
    changes: dict[str, dict[str, int]]
    unclear: tuple[bytes, ...]


def rebuild(mirror: Mirror, *, dry_run: bool = False) -> Rebuilt:
    """Reconstruct the history where it is missing.

    :param dry_run: write nothing.
    :raises ConsumerIndexDamaged: the consumer index is damaged, and there is no copy of it.
    :raises DestinationBusy: a run holds the lock for too long.
    :raises DestinationFull, DestinationRefused, DestinationBroken, WorkerExhausted: see
        :meth:`.Mirror.translate_os_errors`.
    """
    with (
        mirror.translate_os_errors(),
        mirror.lock("rebuild", OPERATOR_WAIT),
        TemporaryDirectory(prefix="mdbackup-") as name,
    ):
        folder = Path(name)
        if not dry_run:
            recover(mirror, folder / "settled.md5")
        with (
            Timeline(mirror) as timeline,
            mirror.tree() as tree,
            _Reconstruction(mirror, timeline, tree) as work,
        ):
            # A damaged file of an import or a pruning leaves no gap.
            if not timeline.gaps and not timeline.damaged:
                return Rebuilt(0, {}, ())
            unclear = tuple(work.find(file.place for file in unknown_files(mirror, timeline)))
            # A damaged index does not show what it contained: nothing is concluded from it.
            index = present_index(mirror, folder / "index.md5")
            work.judge(index or index_to_look_at(mirror, folder / "index.md5"))
            work.assign_stamps()
            if not dry_run:
                work.write()
            return Rebuilt(len(timeline.gaps), work.counts(), unclear)


class _Attributes(NamedTuple):
    """Size in bytes, mtime in Unix seconds and mode of a file; None where not known."""

    size: int | None = None
    mtime: int | None = None
    mode: int | None = None


class _Found(NamedTuple):
    """A file that was present in a gap, and was displaced in it or was still there at its end.

    :ivar gap: index of the gap.
    :ivar stamp: when it was displaced; :data:`_END` if it was not.
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
    def attributes(self) -> _Attributes:
        return _Attributes(self.size, self.mtime, self.mode)


class _Rank(IntEnum):
    """The order of events within one commit."""

    GAP = 0
    EDIT = 1
    MOVE = 2
    CHANGE = 3


class _Event(NamedTuple):
    """Something that happened to a path, or a gap, in which it is not known what happened.

    :ivar commit: its number. A gap comes before the commit with its number.
    :ivar md5: what the index had from then on; ``old_md5`` is what it, or the file, had before.
    :ivar gap: index of the gap, if it is one.
    """

    commit: int
    rank: _Rank
    old_md5: bytes | None = None
    md5: bytes | None = None
    gap: int | None = None


@dataclass(frozen=True, slots=True)
class _PathInGap:
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
    versions: list[_Found]
    live: os.stat_result | None

    @property
    def live_attributes(self) -> _Attributes:
        live = self.live
        return _Attributes(live.st_size, seconds(live), stat.S_IMODE(live.st_mode)) if live else _Attributes()


_FOUND_COLUMNS = (
    "path BLOB, gap INTEGER, stamp TEXT, md5 BLOB, size INTEGER, mtime INTEGER, mode INTEGER, version BLOB"
)
_CHANGE_COLUMNS = (
    "gap INTEGER, stamp TEXT, path BLOB, what TEXT, old_md5 BLOB, md5 BLOB, size INTEGER, mtime INTEGER,"
    " mode INTEGER, version BLOB, UNIQUE (stamp, path, what, version)"
)
_HISTORY, _FOUND, _INDEX = range(3)  # sources of what is known about a path


class _Reconstruction:
    """The work, in tables that need not fit in memory. A context manager.

    Table ``found`` has the files found in gaps, ``change`` the reconstructed changes.
    """

    def __init__(self, mirror: Mirror, timeline: Timeline, tree: Tree) -> None:
        self._mirror = mirror
        self._timeline = timeline
        self._gaps = timeline.gaps
        self._tree = tree
        self._table = sqlite3.connect("")
        self._table.execute(f"CREATE TABLE found ({_FOUND_COLUMNS})")
        self._table.execute(f"CREATE TABLE change ({_CHANGE_COLUMNS})")
        self._commit_numbers = {commit.stamp: commit.number for commit in timeline.moments}
        self._moves: dict[bytes, set[tuple[int, str]]] = {}  # by path: gaps and stamps

    def __enter__(self) -> _Reconstruction:
        return self

    def __exit__(self, *error: object) -> None:
        self._table.close()

    # --- find ---------------------------------------------------------------------------------------

    def find(self, places: Iterable[bytes]) -> Iterator[bytes]:
        """Record files that the history does not know, and yield the places that remain unclear."""
        timer = ReportTimer()
        for number, place in enumerate(places):
            parsed = displaced(place)
            if parsed is None or not self._record_file(place, *parsed):
                yield place
            if timer.due():
                log.info("%s: %d unknown files examined so far", self._mirror.provider, number)

    def _record_file(self, place: bytes, path: bytes, displacements: list[Displaced]) -> bool:
        """Record one file, and return whether its place shows in which gap it was present.

        :param displacements: of the file or directories above it, oldest first; parsed from the place.
        """
        first = displacements[0] if displacements else None
        gap = self._gap_of(first) if first is not None else None
        is_clear, stamp, version = True, _END, None
        if first is not None and gap is not None:
            stamp, version = first.stamp, first.version if first.path == path else None
        else:
            # It was still present when the gap ended: a known commit displaced it later, or none did.
            number = len(self._commit_numbers) if first is None else self._commit_numbers.get(first.stamp)
            is_clear = number is not None
            gap = self._last_gap_before(number or 0)
        if gap is not None and (hashed := self._hash(place)) is not None:
            row = (path, gap, stamp, *hashed, version)
            self._table.execute("INSERT INTO found VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        for moved in displacements[1:] if version is not None else displacements:
            moved_in = self._gap_of(moved)
            if moved_in is not None:
                self._record(moved_in, moved.stamp, moved.path, ChangeKind.MOVED, version=moved.version)
        return is_clear

    def _gap_of(self, moved: Displaced) -> int | None:
        """Return in which gap something was displaced; None if in none, or if the history knows the move."""
        known_moves = ((path, to) for _, path, to in self._timeline.moves_above(moved.path))
        if (moved.path, moved.version) in known_moves:
            return None
        return next((index for index, gap in enumerate(self._gaps) if gap.holds(moved.stamp)), None)

    def _last_gap_before(self, number: int) -> int | None:
        """Return the index of the last gap before the commit with this number."""
        indexes = [index for index, gap in enumerate(self._gaps) if gap.number <= number]
        return indexes[-1] if indexes else None

    def _hash(self, place: bytes) -> tuple[bytes, int, int, int] | None:
        """Return md5, size, mtime and mode of a file, or None if it cannot be read."""
        try:
            with self._tree.opened(place) as descriptor:
                md5, status = md5_of(descriptor), os.fstat(descriptor)
        except OSError as error:
            if not concerns_one_file(error):
                raise
            log.warning("%s: %s cannot be read: %s", self._mirror.provider, to_text(place), error.strerror)
            return None
        return md5, status.st_size, seconds(status), stat.S_IMODE(status.st_mode)

    # --- judge --------------------------------------------------------------------------------------

    def judge(self, index: Path | None) -> None:
        """Work out what must have happened in the gaps.

        :param index: the consumer index as it is now, in canonical form; None if there is none.
        """
        entries = read_entries(index) if index is not None else iter(())
        facts = merge(
            ((path, _HISTORY, changes) for path, changes in self._timeline.changes()),
            ((path, _FOUND, [*rows]) for path, rows in groupby(self._all_found(), key=attrgetter("path"))),
            ((entry.path, _INDEX, entry.md5) for entry in entries),
            key=itemgetter(0, 1),
        )
        for path, of_path in groupby(facts, key=itemgetter(0)):
            by_source: dict[int, Any] = {source: fact for _, source, fact in of_path}
            known = list(self._known_events(path, by_source.get(_HISTORY, ())))
            self._judge_path(path, known, by_source.get(_FOUND, []), by_source.get(_INDEX))

    def _all_found(self) -> Iterator[_Found]:
        rows = self._table.execute("SELECT * FROM found ORDER BY path, gap, stamp, version")
        return (_Found(*row) for row in rows)

    def _known_events(self, path: bytes, changes: Iterable[tuple[int, str, Any, Any]]) -> Iterator[_Event]:
        for number, what, old_md5, md5 in changes:
            # Pruned and imported versions concern neither the live file nor its entry.
            if what not in (ChangeKind.PRUNED, ChangeKind.IMPORTED):
                rank = _Rank.EDIT if what == ChangeKind.EDITED else _Rank.CHANGE
                yield _Event(number, rank, old_md5, md5)
        for number, _, _ in self._timeline.moves_above(path):
            yield _Event(number, _Rank.MOVE)

    def _judge_path(self, path: bytes, known: list[_Event], found: list[_Found], now: bytes | None) -> None:
        """Go through the events of a path in order, and fill each gap among them.

        :param now: the md5 that the index has now.
        """
        if now is not None or any(event.rank != _Rank.MOVE for event in known):
            # Then events and index show what was there at the end of a gap.
            found = [each for each in found if each.stamp != _END]
        gaps = (_Event(gap.number, _Rank.GAP, gap=index) for index, gap in enumerate(self._gaps))
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
            self._fill_gap(_PathInGap(path, event.gap, listed, expected, versions, live))
            listed = expected

    def _may_have_left_later(self, later: list[_Event]) -> bool:
        """Whether an entry that is not there any more may have left the index only after a gap."""
        if not later:
            return False
        following = later[0]
        # Entries leave with a directory that moves; but the lines about it may be unreadable.
        is_cut_off = any(gap.within and gap.number == following.commit + 1 for gap in self._gaps)
        return following.gap is not None or (following.rank == _Rank.MOVE and is_cut_off)

    def _md5_after_gap(
        self, path: bytes, later: list[_Event], found: list[_Found], now: bytes | None
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
            if self._last_move(event.gap, path, _END):
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

    def _fill_gap(self, known: _PathInGap) -> None:
        """Record what must have happened to a path in a gap."""
        listed, since = known.listed, _START
        for version, following in zip_longest(known.versions, known.versions[1:]):
            if listed != version.md5 and not self._is_displaced_at_start(version):
                self._record_added(known, since, version.stamp, version.md5, version.attributes)
            since = version.stamp
            if version.stamp == _END:
                listed = version.md5
                break
            if version.version is None:
                listed = None  # it went with a directory, whose move is recorded
                continue
            listed = self._record_displaced(known, version, following)
        if listed == known.expected:
            return
        if known.expected is None:
            self._record(known.gap, _END, known.path, ChangeKind.FORGOTTEN, old_md5=listed)
        else:
            self._record_added(known, since, _END, known.expected, known.live_attributes)

    def _is_displaced_at_start(self, version: _Found) -> bool:
        """Whether the commit with which a gap starts, and part of which is lost, displaced a version.

        It was there before that commit.
        """
        gap = self._gaps[version.gap]
        return gap.within and version.stamp == gap.after

    def _record_added(
        self, known: _PathInGap, since: str, until: str, md5: bytes, attributes: _Attributes
    ) -> None:
        """Record that a file was added as early as possible between two stamps.

        That is after the last move of the path, or of a directory above it.
        """
        stamp = max(since, self._last_move(known.gap, known.path, until))
        self._record(known.gap, stamp, known.path, ChangeKind.ADDED, md5=md5, attributes=attributes)

    def _record_displaced(self, known: _PathInGap, version: _Found, following: _Found | None) -> bytes | None:
        """Record that a version was displaced, and return the md5 of what took its place, if anything did.

        :param following: the next version of the same path in the gap.
        """
        md5 = known.expected or self._hash_live(known) if following is None else following.md5
        attributes = known.live_attributes if following is None else following.attributes
        what = ChangeKind.REPLACED
        if md5 is None:
            what, attributes = ChangeKind.MOVED, _Attributes()
        self._record(
            *(known.gap, version.stamp, known.path, what),
            old_md5=version.md5,
            md5=md5,
            attributes=attributes,
            version=version.version,
        )
        return md5

    def _hash_live(self, known: _PathInGap) -> bytes | None:
        hashed = self._hash(known.path) if known.live is not None else None
        return hashed[0] if hashed is not None else None

    def _last_move(self, gap: int, path: bytes, before: str) -> str:
        """Return when a path or a directory above it was last moved in a gap; empty if it was not."""
        last = ""
        while path:
            stamps = (stamp for index, stamp in self._moves.get(path, ()) if index == gap and stamp < before)
            last = max(last, *stamps, "")
            path = path.rpartition(b"/")[0]
        return last

    def _record(
        self,
        gap: int,
        stamp: str,
        path: bytes,
        what: ChangeKind,
        *,
        old_md5: bytes | None = None,
        md5: bytes | None = None,
        attributes: _Attributes = _Attributes(),  # noqa: B008 - immutable
        version: bytes | None = None,
    ) -> None:
        """Record a change.

        :param gap: index of the gap.
        :param stamp: when it happened; or :data:`_START` or :data:`_END` of the gap.
        """
        if what == ChangeKind.MOVED:
            self._moves.setdefault(path, set()).add((gap, stamp))
        row = (gap, stamp, path, what, old_md5, md5, *attributes, version)
        self._table.execute("INSERT OR IGNORE INTO change VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    # --- write --------------------------------------------------------------------------------------

    def assign_stamps(self) -> None:
        """Give changes at the start or the end of a gap a stamp within it."""
        for index, gap in enumerate(self._gaps):
            query = "SELECT min(stamp), max(stamp) FROM change WHERE gap = ? AND stamp NOT IN ('', '~')"
            first, last = self._table.execute(query, (index,)).fetchone()
            start = self._start_of(gap, first)
            end = stamp_beside(gap.before, -1) if gap.before else stamp_beside(last or start, 1)
            for mark, stamp in ((_START, start), (_END, max(end, last or start))):
                self._table.execute(
                    "UPDATE change SET stamp = ? WHERE gap = ? AND stamp = ?", (stamp, index, mark)
                )

    def _start_of(self, gap: HistoryGap, first: str | None) -> str:
        """Return a stamp for the start of a gap.

        :param first: the first stamp found in it, if any.
        """
        if gap.within:
            return gap.after
        if gap.after:
            return stamp_beside(gap.after, 1)
        known = first or gap.before
        latest = stamp_beside(known, -1) if known else stamp_of_file(self._mirror.index)
        # What the first commits brought was present at some time since then.
        return min(self._mirror.set_up_at(), latest)

    def counts(self) -> dict[str, dict[str, int]]:
        """Return how many changes of each kind there are, by stamp."""
        numbers: dict[str, dict[str, int]] = {}
        query = "SELECT stamp, what, count(*) FROM change GROUP BY stamp, what ORDER BY stamp, what"
        for stamp, what, number in self._table.execute(query):
            numbers.setdefault(stamp, {})[what] = number
        return numbers

    def write(self) -> None:
        """Write the history files, and rename damaged ones."""
        headers = [read_header(commit.file) for commit in self._timeline.moments]
        for index, gap in enumerate(self._gaps):
            previous = headers[gap.number - 1] if gap.number else {}
            if gap.number < len(headers):
                digest_after = str(headers[gap.number].get("before", ""))
            else:
                digest_after = self._present_digest()
            digest_before = str(previous.get("before" if gap.within else "after", ""))
            stamps = self._stamps_in(index, gap)
            digests = _chain_of_digests(digest_before, stamps, digest_after)
            for stamp, (before, after) in zip(stamps, pairwise(digests), strict=True):
                is_damaged = gap.within and stamp == gap.after
                damaged = self._timeline.moments[gap.number - 1] if is_damaged else None
                order = str(previous.get("order", ""))
                self._write_file(index, stamp, damaged, before=before, after=after, order=order)
        for path in self._timeline.damaged:
            if path.exists() and not _damaged_name(path).exists():
                path.rename(_damaged_name(path))
        fsync_directory(self._mirror.history)

    def _stamps_in(self, index: int, gap: HistoryGap) -> list[str]:
        """Return the stamps of the history files for a gap: at least one, because the chain must close."""
        query = "SELECT DISTINCT stamp FROM change WHERE gap = ? ORDER BY stamp"
        stamps = [stamp for (stamp,) in self._table.execute(query, (index,))]
        start = self._start_of(gap, None)
        if start not in stamps and (gap.within or not stamps):
            stamps.insert(0, start)
        return stamps

    def _write_file(self, gap: int, stamp: str, damaged: CommitTime | None, **header: str) -> None:
        """Write one history file: a new one, or in place of a damaged one, with that one's readable lines."""
        query = (
            "SELECT path, what, NULL, old_md5, md5, size, mtime, mode, version FROM change"
            " WHERE gap = ? AND stamp = ? ORDER BY path, rowid"
        )
        rows = self._table.execute(query, (gap, stamp))
        changes: Iterator[Change] = (Change(*row) for row in rows)
        if damaged is None:
            run_id, path = _RUN_ID, self._mirror.history_path(stamp, _RUN_ID)
        else:
            run_id, path = damaged.run_id, damaged.file
            if not _damaged_name(path).exists():
                os.link(path, _damaged_name(path))
            changes = chain(_readable_changes(_damaged_name(path)), changes)
        provider = self._mirror.provider
        write_records(path, changes, run_id=run_id, provider=provider, stamp=stamp, rebuilt=True, **header)

    def _present_digest(self) -> str:
        """Return the digest of the consumer index as it is now; empty if it is not canonical."""
        # An index with the digest of the last history file is trusted as canonical without being read.
        copies = (self._mirror.committed, self._mirror.index)
        with TemporaryDirectory(prefix="mdbackup-") as folder:
            target = Path(folder) / "index.md5"
            return next((digest(path) for path in copies if is_canonical(path, target)), "")


def _chain_of_digests(before: str, stamps: list[str], after: str) -> list[str]:
    """Return the digests before, between and after history files; those between are not known."""
    return [before, *(f"not known: {stamp}" for stamp in stamps[:-1]), after]


def _readable_changes(path: Path) -> Iterator[Change]:
    try:
        yield from read_records(path, Change)
    except CorruptFile:
        return


def _damaged_name(path: Path) -> Path:
    return path.with_name(path.name + ".damaged")
