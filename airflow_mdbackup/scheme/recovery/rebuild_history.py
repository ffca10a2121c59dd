"""History that is lost or damaged is reconstructed, as far as the names in ``.old`` and the index allow.

::

    gaps     where the chain of digests is broken, and where a history file cannot be read to its end
    find     versions that the history does not know, and whose stamp falls into a gap
    judge    path by path: what must have happened in a gap, given what was there before it, the versions
             found, and what follows (see gaps)
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
from heapq import merge
from itertools import chain, groupby, pairwise
from operator import attrgetter, itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.common.progress import ReportTimer
from airflow_mdbackup.scheme.files.content import md5_of
from airflow_mdbackup.scheme.files.jsonl import CorruptFile, read_header, read_records, write_records
from airflow_mdbackup.scheme.files.syscalls import concerns_one_file, fsync_directory, seconds
from airflow_mdbackup.scheme.files.tree import Tree
from airflow_mdbackup.scheme.history.changes import Change, ChangeKind
from airflow_mdbackup.scheme.history.consumer_index import index_to_look_at, is_canonical, present_index
from airflow_mdbackup.scheme.history.journal import recover
from airflow_mdbackup.scheme.history.replay import CommitTime
from airflow_mdbackup.scheme.history.timeline import HistoryGap, Timeline
from airflow_mdbackup.scheme.index.canonical import digest, read_entries
from airflow_mdbackup.scheme.recovery.gaps import (
    END,
    START,
    Event,
    FoundFile,
    GapFiller,
    Rank,
    ReconstructedChanges,
)
from airflow_mdbackup.scheme.recovery.verify import unknown_files
from airflow_mdbackup.scheme.store.locks import OPERATOR_WAIT
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.version_names import (
    Displacement,
    parse_version_place,
    stamp_beside,
    stamp_of_file,
)

log = logging.getLogger(__name__)

_RUN_ID = "rebuilt"


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
            recover(mirror, folder / "recovered.md5")
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


_FOUND_COLUMNS = (
    "path BLOB, gap INTEGER, stamp TEXT, md5 BLOB, size INTEGER, mtime INTEGER, mode INTEGER, version BLOB"
)
_HISTORY, _FOUND, _INDEX = range(3)  # sources of what is known about a path


class _Reconstruction:
    """The work, in tables that need not fit in memory. A context manager."""

    def __init__(self, mirror: Mirror, timeline: Timeline, tree: Tree) -> None:
        self._mirror = mirror
        self._timeline = timeline
        self._gaps = timeline.gaps
        self._tree = tree
        self._table = sqlite3.connect("")
        self._table.execute(f"CREATE TABLE found ({_FOUND_COLUMNS})")
        self._changes = ReconstructedChanges(self._table)
        self._filler = GapFiller(self._gaps, self._changes, tree, self._md5_of)
        self._commit_numbers = {commit.stamp: commit.number for commit in timeline.moments}

    def __enter__(self) -> _Reconstruction:
        return self

    def __exit__(self, *error: object) -> None:
        self._table.close()

    # --- find ---------------------------------------------------------------------------------------

    def find(self, places: Iterable[bytes]) -> Iterator[bytes]:
        """Record files that the history does not know, and yield the places that remain unclear."""
        timer = ReportTimer()
        for number, place in enumerate(places):
            parsed = parse_version_place(place)
            if parsed is None or not self._record_file(place, *parsed):
                yield place
            if timer.due():
                log.info("%s: %d unknown files examined so far", self._mirror.provider, number)

    def _record_file(self, place: bytes, path: bytes, displacements: list[Displacement]) -> bool:
        """Record one file, and return whether its place shows in which gap it was present.

        :param displacements: of the file or directories above it, oldest first; parsed from the place.
        """
        first = displacements[0] if displacements else None
        gap = self._gap_of(first) if first is not None else None
        is_clear, stamp, version = True, END, None
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
                self._changes.add(moved_in, moved.stamp, moved.path, ChangeKind.MOVED, version=moved.version)
        return is_clear

    def _gap_of(self, moved: Displacement) -> int | None:
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

    def _md5_of(self, place: bytes) -> bytes | None:
        hashed = self._hash(place)
        return hashed[0] if hashed is not None else None

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
            self._filler.fill_gaps(path, known, by_source.get(_FOUND, []), by_source.get(_INDEX))

    def _all_found(self) -> Iterator[FoundFile]:
        rows = self._table.execute("SELECT * FROM found ORDER BY path, gap, stamp, version")
        return (FoundFile(*row) for row in rows)

    def _known_events(self, path: bytes, changes: Iterable[tuple[int, str, Any, Any]]) -> Iterator[Event]:
        for number, what, old_md5, md5 in changes:
            # Pruned and imported versions concern neither the live file nor its entry.
            if what not in (ChangeKind.PRUNED, ChangeKind.IMPORTED):
                rank = Rank.EDIT if what == ChangeKind.EDITED else Rank.CHANGE
                yield Event(number, rank, old_md5, md5)
        for number, _, _ in self._timeline.moves_above(path):
            yield Event(number, Rank.MOVE)

    # --- write --------------------------------------------------------------------------------------

    def assign_stamps(self) -> None:
        """Give changes at the start or the end of a gap a stamp within it."""
        for index, gap in enumerate(self._gaps):
            first, last = self._changes.first_and_last(index)
            start = self._start_of(gap, first)
            end = stamp_beside(gap.before, -1) if gap.before else stamp_beside(last or start, 1)
            self._changes.assign_stamp(index, START, start)
            self._changes.assign_stamp(index, END, max(end, last or start))

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
        return self._changes.counts()

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
        stamps = self._changes.stamps_in(index)
        start = self._start_of(gap, None)
        if start not in stamps and (gap.within or not stamps):
            stamps.insert(0, start)
        return stamps

    def _write_file(self, gap: int, stamp: str, damaged: CommitTime | None, **header: str) -> None:
        """Write one history file: a new one, or in place of a damaged one, with that one's readable lines."""
        changes = self._changes.changes_at(gap, stamp)
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
        # An index with this digest is later trusted as canonical without being read.
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
