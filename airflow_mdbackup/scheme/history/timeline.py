"""What the mirror was at any time, and where on the disk each version that it ever held is now.

::

    read       the history files of all commits, oldest first, into a table; a gap in their chain is reported
    replay     path by path: see :mod:`.replay`
    query      the versions as of a commit, or all that a path ever held, each with where it should be now

The state as of a commit is the consumer index as committed then. A file that had left the index by then is
not part of that state, but it is still on the disk and can be requested. A place is where a version should
be; whoever reads it compares the md5, because manual edits and disk corruption are not recorded.

Limitations: of a commit whose history is lost, only what ``.old`` still shows is known.

Source: :mod:`.history.changes`.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.common.sorted_paths import batches
from airflow_mdbackup.scheme.common.times import NoSuchTime, RequestedTime, format_time, stamp_of
from airflow_mdbackup.scheme.files.jsonl import CorruptFile, read_header, read_records
from airflow_mdbackup.scheme.history.changes import Change, ChangeKind, commits, pending
from airflow_mdbackup.scheme.history.clock import claimed_time, contradiction, true_times
from airflow_mdbackup.scheme.history.replay import ChangeRow, CommitTime, FileVersion, Move, Replay
from airflow_mdbackup.scheme.index.canonical import digest, digest_of_empty_index, read_entries
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.version_names import is_stamp

_BATCH = 1000  # versions whose places are recorded in one transaction


class HistoryGap(NamedTuple):
    """Where history is missing.

    :ivar number: of the commit after the gap; the number of all commits if the gap is at the end.
    :ivar after: stamp of the last commit before the gap, and ``before`` of the first one after it; empty if
        there is none.
    :ivar within: whether part of the history of the commit ``after`` is missing as well.
    """

    number: int
    after: str
    before: str
    within: bool

    def holds(self, stamp: str) -> bool:
        """Whether a commit with that stamp may be missing here."""
        begun = stamp > self.after or (self.within and stamp == self.after)
        return begun and (not self.before or stamp < self.before)


class Timeline:
    """The history of one mirror, limited to some paths. A context manager.

    :param wanted: says whether a path is one of them.
    :ivar moments: the commits, oldest first.
    :ivar claims: for each of them, the time that its history file claims (see :mod:`.clock`).
    :ivar problems: messages about what is wrong with the history itself.
    :ivar damaged: history files that cannot be read to the end.
    :ivar clock_doubt: a message why times may be wrong at present; None if nothing suggests that.
    :ivar places_recorded: whether :meth:`recording_places` has seen everything.
    :raises DestinationRefused: a history file has a newer format.
    """

    def __init__(self, mirror: Mirror, wanted: Callable[[bytes], bool] = lambda path: True) -> None:
        self.moments: list[CommitTime] = []
        self.problems: list[str] = []
        self.damaged: list[Path] = []
        self.places_recorded = False
        self._mirror = mirror
        self._wanted = wanted
        self._moves: dict[bytes, list[tuple[int, bytes]]] = {}
        self._gaps: dict[int, bool] = {}  # by the number of the commit after it: see HistoryGap.within
        self._edited = False  # whether the history read last records a manual edit of the index
        self._unfiltered: Timeline | None = None
        self._lock = threading.Lock()
        # A temporary database, on the disk if memory is short. Used by one thread at a time, not always the
        # same one.
        self._table = sqlite3.connect("", check_same_thread=False)
        self._table.execute(
            "CREATE TABLE change (path BLOB, moment INTEGER, what TEXT, old_md5 BLOB, md5 BLOB, size INTEGER,"
            " mtime INTEGER, mode INTEGER, version BLOB)"
        )
        self._read()
        self.claims = [moment.time for moment in self.moments]
        self.clock_doubt = contradiction(self.claims, mirror.now())
        times = true_times(self.claims, mirror.now())
        self.moments = [moment._replace(time=time) for moment, time in zip(self.moments, times, strict=True)]
        self._table.execute("CREATE INDEX by_path ON change (path, moment)")

    def __enter__(self) -> Timeline:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._table.close()
        if self._unfiltered is not None:
            self._unfiltered.close()

    # --- reading ------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Read all history files. No lock is held, so others may commit meanwhile; that is read as well."""
        self.problems += [
            f"{path} is named like a history file but cannot be one: it is ignored; move it away"
            for path in self._mirror.strange_in_history()
        ]
        read: set[Path] = set()
        after = ""
        while True:
            waiting = [path for path in pending(self._mirror) if path not in read]
            cut_off = [path for path in waiting if not path.with_suffix("").exists()]
            finished = [path for path in commits(self._mirror) if path not in read]
            for path in finished:
                after = self._read_one(path, after)
                read.add(path)
            if finished:
                continue  # others may have finished meanwhile
            try:
                for path in cut_off:
                    after = self._read_one(path, after)
                    read.add(path)
            except FileNotFoundError:
                if all(map(os.path.lexists, cut_off)):
                    raise
                continue  # it has finished
            problem = self._missing_end(after)
            if not problem:
                return
            if not {*commits(self._mirror), *pending(self._mirror)} - read:
                self.problems.append(problem)
                self._gaps.setdefault(len(self.moments), False)
                return

    def _read_one(self, path: Path, after: str) -> str:
        """Read a history file, and return the digest of the index after its commit.

        :param after: the digest of the index after the previous commit.
        :raises FileNotFoundError: it has been renamed.
        """
        try:
            header = read_header(path)
            stamp, run_id = str(header["stamp"]), str(header["run_id"])
            if not is_stamp(stamp):
                raise ValueError
        except (CorruptFile, KeyError, ValueError):
            self.problems.append(f"{path} is damaged: what was committed then is not known")
            self.damaged.append(path)
            return after
        number, finished = len(self.moments), path.suffix == ".jsonl"
        rebuilt = bool(header.get("rebuilt"))
        time = claimed_time(header, stamp, path)
        self.moments.append(CommitTime(number, stamp, time, run_id, path, finished, rebuilt, "set" in header))
        self._edited = False
        try:
            self._table.executemany("INSERT INTO change VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", self._rows(path))
        except FileNotFoundError:
            self.moments.pop()
            raise
        # A first commit without files leaves an index, but no history.
        known = (after,) if after else ("", digest_of_empty_index())
        if header.get("before", "") not in known and not self._edited:
            self.problems.append(f"history is missing before {path.name}: commits are not known")
            self._gaps.setdefault(number, False)
        return str(header.get("after", after))

    def _missing_end(self, after: str) -> str:
        """Return what is missing, if the last history does not lead to the present index."""
        if not self.moments and _digest(self._mirror.index) not in ("", digest_of_empty_index()):
            return "there is no history at all: only the present state is known"
        copies = {_digest(self._mirror.committed), _digest(self._mirror.next_committed)} - {""}
        if after and copies and after not in copies:
            return "history is missing at its end: the last commits are not known"
        return ""

    def _rows(self, path: Path) -> Iterator[tuple[Any, ...]]:
        number = self.moments[-1].number
        try:
            for change in read_records(path, Change):
                self._edited = self._edited or change.what == ChangeKind.EDITED
                if change.what == ChangeKind.MOVED:
                    self._moves.setdefault(change.path, []).append((number, change.version or b""))
                elif self._wanted(change.path):
                    yield (
                        *(change.path, number, change.what, change.old_md5, change.md5),
                        *(change.size, change.mtime, change.mode, change.version),
                    )
        except CorruptFile as error:
            self.problems.append(f"{error}; the rest of it is not known")
            self.damaged.append(path)
            self._gaps[number + 1] = True

    # --- commits ------------------------------------------------------------------------------------

    @property
    def gaps(self) -> list[HistoryGap]:
        """Where history is missing, oldest first."""
        stamps = ["", *(moment.stamp for moment in self.moments), ""]
        return [HistoryGap(n, stamps[n], stamps[n + 1], within) for n, within in sorted(self._gaps.items())]

    @property
    def newest(self) -> str:
        """The stamp of the last known commit, finished or not; empty if there is none."""
        return self.moments[-1].stamp if self.moments else ""

    def moment_at(self, time: str) -> CommitTime | None:
        """Return the last finished commit at or before a time; None if there was none.

        :param time: the stamp of a commit, as in the names of versions, always means that commit.
        """
        finished = [moment for moment in self.moments if moment.finished]
        stamped = (moment for moment in finished if moment.stamp == time)
        return next(stamped, None) or max((m for m in finished if m.time <= time), default=None)

    def find_commit(self, requested: RequestedTime) -> CommitTime | None:
        """Return the commit of the run that was requested, or else the last one as of that time, if any.

        :raises NoSuchTime: it is neither, or a run has this id but committed at another time.
        """
        finished = [moment for moment in self.moments if moment.finished]
        at_time = None if requested.when is None else self.moment_at(stamp_of(requested.when))
        word = requested.word
        if word.lower() == "latest":
            return finished[-1] if finished else None
        of_run = [m for m in finished if word in (m.stamp, m.run_id, to_text(os.fsencode(m.run_id)))]
        if not of_run:
            if requested.when is None:
                raise NoSuchTime(requested.why)
            return at_time
        if requested.when is not None and of_run[-1] is not at_time:
            raise NoSuchTime(
                f"{word!r} is both a time and the id of a run, which committed at "
                f"{format_time(of_run[-1].time)}: write {of_run[-1].stamp} or "
                f"'{requested.when:%Y-%m-%d %H:%M:%S %z}'"
            )
        return of_run[-1]

    def bytes_added(self) -> Iterator[tuple[CommitTime, int]]:
        """Yield how many bytes each commit put in place."""
        rows = self._table.execute(
            "SELECT moment, SUM(size) FROM change WHERE what IN (?, ?) GROUP BY moment",
            (ChangeKind.ADDED, ChangeKind.REPLACED),
        )
        return ((self.moments[number], size or 0) for number, size in rows)

    # --- versions -----------------------------------------------------------------------------------

    def state(
        self, moment: CommitTime, *, gone: bool = False, first: bytes = b"", last: bytes | None = None
    ) -> Iterator[FileVersion]:
        """Yield what the consumer index held as of a commit, in path order.

        :param gone: include what had left the index by then; those files are still on the disk.
        :param first: the first path, and ``last`` the last one, or None.
        """
        for path, rows in self._by_path(first, last):
            replay = self._replay(path, rows)
            replay.advance_to(moment.number)
            version = replay.live
            if version is not None and (replay.listed or gone):
                replay.advance_to(len(self.moments))
                yield version

    def present(self, index: Path) -> Iterator[FileVersion]:
        """Yield the entries of an index as versions, with what history knows about them, in path order.

        :param index: the consumer index as it is now, in canonical form.
        """
        by_path = self._by_path()
        known = next(by_path, None)
        for entry in read_entries(index):
            if not self._wanted(entry.path):
                continue
            while known is not None and known[0] < entry.path:
                known = next(by_path, None)
            version = None
            if known is not None and known[0] == entry.path:
                _, version = self._all_and_live(entry.path, list(known[1]))
            if version is None or version.md5 != entry.md5:
                version = FileVersion(entry.path, entry.md5, places=[entry.path])
            yield version

    def contents(self, first: bytes = b"", last: bytes | None = None) -> Iterator[FileVersion]:
        """Yield everything that each path ever held, by path and then by age, oldest first.

        :param first: the first path, and ``last`` the last one, or None.
        """
        for path, rows in self._by_path(first, last):
            yield from self._all_and_live(path, list(rows))[0]

    def _all_and_live(
        self, path: bytes, rows: list[ChangeRow]
    ) -> tuple[list[FileVersion], FileVersion | None]:
        """Return everything that a path ever held, and what it holds now."""
        if len(rows) == 1 and not self._moves:
            row = rows[0]
            commit = self.moments[row.commit]
            if row.what == ChangeKind.ADDED and row.md5 and commit.finished:  # most files: never changed
                version = FileVersion(
                    path, row.md5, row.size, row.mtime, row.mode, commit.time, places=[path]
                )
                return [version], version
        replay = self._replay(path, rows)
        replay.advance_to(len(self.moments))
        return replay.versions, replay.live

    def _replay(self, path: bytes, rows: Iterable[ChangeRow]) -> Replay:
        return Replay(path, self.moments, rows, self.moves_above(path) if self._moves else ())

    def places_of(self, md5: bytes) -> list[bytes]:
        """Return where bytes with this md5 should be, whatever their path. Callable from any thread."""
        with self._lock:
            return list(self._places_of(md5))

    def _places_of(self, md5: bytes) -> Iterator[bytes]:
        if self._unfiltered is None:
            self._unfiltered = Timeline(self._mirror)
            self._unfiltered._table.execute("CREATE INDEX by_md5 ON change (md5)")
            self._unfiltered._table.execute("CREATE INDEX by_old_md5 ON change (old_md5)")
        timeline = self._unfiltered
        paths = timeline._table.execute(
            "SELECT path FROM change WHERE md5 = ? UNION SELECT path FROM change WHERE old_md5 = ?",
            (md5, md5),
        )
        for (path,) in paths.fetchall():
            for version in timeline.contents(path, path):
                if version.md5 == md5:
                    yield from version.places

    @property
    def has_imported(self) -> bool:
        """Whether there are imported versions; the state of the whole mirror at their time is not known."""
        found = self._table.execute("SELECT 1 FROM change WHERE what = ? LIMIT 1", (ChangeKind.IMPORTED,))
        return found.fetchone() is not None

    def knows(self, path: bytes) -> bool:
        """Whether a path, or anything below it, was ever in the index."""
        above = path.rstrip(b"/")
        found = self._table.execute(
            "SELECT 1 FROM change WHERE path = ? OR (path > ? AND path < ?) LIMIT 1",
            (path, above + b"/", above + b"0"),
        )
        return found.fetchone() is not None

    def moves_above(self, path: bytes) -> list[Move]:
        """Return the moves of ``path`` and of the directories above it."""
        found: list[Move] = []
        while path and self._moves:
            found += [Move(commit, path, to) for commit, to in self._moves.get(path, ())]
            path = path.rpartition(b"/")[0]
        return found

    def forgotten(self, moments: Iterable[CommitTime]) -> Iterator[bytes]:
        """Yield the paths that left the index with one of these commits, in path order."""
        numbers = {moment.number for moment in moments}
        rows = self._table.execute(
            "SELECT path, moment FROM change WHERE what = ? ORDER BY path", (ChangeKind.FORGOTTEN,)
        )
        paths = (path for path, number in rows if number in numbers)
        return (path for path, _ in groupby(paths))

    def changes(self) -> Iterator[tuple[bytes, list[tuple[int, str, bytes | None, bytes | None]]]]:
        """Yield what happened to each path: number of the commit, kind of change, old and new md5."""
        for path, rows in self._by_path():
            yield path, [(row.commit, row.what, row.old_md5, row.md5) for row in rows]

    def _by_path(
        self, first: bytes = b"", last: bytes | None = None
    ) -> Iterator[tuple[bytes, Iterator[ChangeRow]]]:
        within = "WHERE path >= ?" if last is None else "WHERE path BETWEEN ? AND ?"
        rows = self._table.execute(
            f"SELECT * FROM change {within} ORDER BY path, moment, rowid",  # noqa: S608 - one of two
            (first,) if last is None else (first, last),
        )
        return groupby(map(ChangeRow._make, rows), key=itemgetter(0))

    # --- places -------------------------------------------------------------------------------------

    def recording_places(self, contents: Iterable[FileVersion]) -> Iterator[FileVersion]:
        """Yield versions, recording on the way where they should be, for :meth:`has_place`."""
        self._table.execute("CREATE TABLE IF NOT EXISTS place (path BLOB PRIMARY KEY) WITHOUT ROWID")
        for some in batches(contents, _BATCH):
            places = ((place,) for version in some for place in version.places)
            self._table.executemany("INSERT OR IGNORE INTO place VALUES (?)", places)
            yield from some
        self.places_recorded = True

    def record_places(self) -> None:
        """Record where all versions should be, unless that has been done."""
        if not self.places_recorded:
            for _ in self.recording_places(self.contents()):
                pass

    def has_place(self, path: bytes) -> bool:
        """Whether some version should be at ``path``. Only after :meth:`record_places`."""
        found = self._table.execute("SELECT 1 FROM place WHERE path = ?", (path,))
        return found.fetchone() is not None


def _digest(index: Path) -> str:
    """Return the digest of an index; empty if it is missing, or not a file."""
    try:
        return digest(index) if index.is_file() else ""
    except FileNotFoundError:
        return ""
