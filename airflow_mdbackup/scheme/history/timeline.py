"""What the mirror was at any moment, and where on the disk each content that ever was in it lies now.

::

    read      the histories of all commits, oldest first, into a table; a gap in their chain is told
    replayed  path by path: a content is live until another one displaces it, or a directory above it moves
    told      the contents as of a moment, or all that a path ever had, each with where it should be now

The state as of a moment is the consumer index as committed then. What had left the index by then is not part
of it, but its file stays, and can be asked for. A place is where bytes should be; whoever reads them compares
their md5, for hands and bad disks write no history. A commit that a crash cut off may have happened or not,
so that both places are told.

What this does not give: anything of a commit whose history is lost, but for what ``.old`` still shows.

Source: :mod:`.history.changes`.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.common.sorted_paths import batches
from airflow_mdbackup.scheme.common.times import NoSuchTime, RequestedTime, format_time, stamp_of
from airflow_mdbackup.scheme.files.jsonl import CorruptFile, read_header, read_records
from airflow_mdbackup.scheme.history.changes import Change, ChangeKind, commits, pending, taken_out_by
from airflow_mdbackup.scheme.history.clock import claimed, contradiction, true_times
from airflow_mdbackup.scheme.index.canonical import digest, digest_of_empty_index, read_entries
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.version_names import displaced_at, is_stamp

_BATCH = 1000  # contents whose places are noted in one go
UNKNOWN = "unknown"
"""Why an entry left the index, as far as a history tells that was rebuilt."""


class CommitTime(NamedTuple):
    """A commit.

    :ivar stamp: its place among all, as ``20261123T031500.123456Z``. It is in the names of versions.
    :ivar time: when it was, written likewise: its stamp, unless the clock was wrong (see :mod:`.clock`).
    :ivar file: what it changed.
    :ivar finished: false for one that a crash cut off.
    :ivar rebuilt: whether its history was lost, and reconstructed (see :mod:`.rebuild_history`).
    :ivar is_set: whether a person has said when it was (see `mdbackup clock`).
    """

    number: int
    stamp: str
    time: str
    run_id: str
    file: Path
    finished: bool
    rebuilt: bool = False
    is_set: bool = False


class HistoryGap(NamedTuple):
    """Where history is missing.

    :ivar number: of the moment before which that is; the number of all moments, if it is the end.
    :ivar after: stamp of the moment before, and ``before`` of the one behind it; empty if there is none.
    :ivar within: whether part of the history of ``after`` is missing too.
    """

    number: int
    after: str
    before: str
    within: bool

    def holds(self, stamp: str) -> bool:
        """Whether a commit of that stamp may be missing here."""
        begun = stamp > self.after or (self.within and stamp == self.after)
        return begun and (not self.before or stamp < self.before)


@dataclass(slots=True)
class FileVersion:
    """What a path held for a while.

    :ivar size: in bytes; ``mtime`` in Unix seconds and ``mode`` are the provider's; None where not known.
    :ivar since: time of the commit that brought it (see :class:`CommitTime`); empty if history tells of none.
    :ivar left: time of the commit with which it left the index while its file stayed; empty if it did not.
    :ivar taken_out: why it left: ``forget``, ``repair``, or :data:`UNKNOWN` where history was rebuilt; empty
        if the provider had it no more.
    :ivar until: time of the commit that displaced it; empty as long as it is live.
    :ivar pruned: time of the pruning that took it away, or, if it has places, that was cut off and may have.
    :ivar places: where it should be, as paths of the mirror's tree, the likeliest first; none if it is lost.
    """

    path: bytes
    md5: bytes
    size: int | None = None
    mtime: int | None = None
    mode: int | None = None
    since: str = ""
    left: str = ""
    taken_out: str = ""
    until: str = ""
    pruned: str = ""
    places: list[bytes] = field(default_factory=list)


class Timeline:
    """The history of one mirror, as far as it is about some paths. A context manager.

    :param wanted: tells of a path whether it is one of them.
    :ivar moments: the commits, oldest first.
    :ivar claims: when each of them was by what it says itself (see :mod:`.clock`).
    :ivar problems: what is wrong with the history itself, for people.
    :ivar damaged: files of history that cannot be read to their end.
    :ivar clock_doubt: for people: why times may be wrong just now; None if nothing speaks for that.
    :ivar noted: whether :meth:`noting` came to its end.
    :raises DestinationRefused: a file of history has a newer format.
    """

    def __init__(self, mirror: Mirror, wanted: Callable[[bytes], bool] = lambda path: True) -> None:
        self.moments: list[CommitTime] = []
        self.problems: list[str] = []
        self.damaged: list[Path] = []
        self.noted = False
        self._mirror = mirror
        self._wanted = wanted
        self._moves: dict[bytes, list[tuple[int, bytes]]] = {}
        self._gaps: dict[int, bool] = {}  # by the number of the moment behind: see Gap.within
        self._edited = False  # whether the file read last tells of an index that was edited by hand
        self._whole: Timeline | None = None
        self._lock = threading.Lock()
        # One thread at a time, if not always the same.
        self._table = sqlite3.connect(
            "", check_same_thread=False
        )  # nameless, and on the disk where it does not fit in memory
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
        if self._whole is not None:
            self._whole.close()

    # --- reading ------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Read all histories; also of what is committed meanwhile, for no lock is held."""
        self.problems += [
            f"{path} has the name of a file of history, and cannot be one: it is left alone; move it away"
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
                continue  # in that time others may have come to their end
            try:
                for path in cut_off:
                    after = self._read_one(path, after)
                    read.add(path)
            except FileNotFoundError:
                if all(map(os.path.lexists, cut_off)):
                    raise
                continue  # it has come to its end
            lacks = self._what_it_lacks(after)
            if not lacks:
                return
            if not {*commits(self._mirror), *pending(self._mirror)} - read:
                self.problems.append(lacks)
                self._gaps.setdefault(len(self.moments), False)
                return

    def _read_one(self, path: Path, after: str) -> str:
        """Read a history, and return the digest of the index after it.

        :param after: the digest of the index after the one before.
        :raises FileNotFoundError: it has got another name.
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
        time = claimed(header, stamp, path)
        self.moments.append(CommitTime(number, stamp, time, run_id, path, finished, rebuilt, "set" in header))
        self._edited = False
        try:
            self._table.executemany("INSERT INTO change VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", self._rows(path))
        except FileNotFoundError:
            self.moments.pop()
            raise
        # A first commit without files leaves an index, and no history.
        known = (after,) if after else ("", digest_of_empty_index())
        if header.get("before", "") not in known and not self._edited:
            self.problems.append(f"history is missing before {path.name}: commits are not known")
            self._gaps.setdefault(number, False)
        return str(header.get("after", after))

    def _what_it_lacks(self, after: str) -> str:
        """Return what is missing, if the present index is not what the last history has led to."""
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
            self.problems.append(f"{error}; what follows there is not known")
            self.damaged.append(path)
            self._gaps[number + 1] = True

    # --- telling ------------------------------------------------------------------------------------

    @property
    def gaps(self) -> list[HistoryGap]:
        """Where history is missing, the oldest first."""
        stamps = ["", *(moment.stamp for moment in self.moments), ""]
        return [HistoryGap(n, stamps[n], stamps[n + 1], within) for n, within in sorted(self._gaps.items())]

    @property
    def newest(self) -> str:
        """The stamp of the last commit that it knows of, finished or not; empty if there is none."""
        return self.moments[-1].stamp if self.moments else ""

    def moment_at(self, time: str) -> CommitTime | None:
        """Return the last commit that was not after a time and came to its end; None if there was none.

        :param time: if it is the stamp of a commit, as the names of versions have it, that one is meant.
        """
        finished = [moment for moment in self.moments if moment.finished]
        stamped = (moment for moment in finished if moment.stamp == time)
        return next(stamped, None) or max((m for m in finished if m.time <= time), default=None)

    def asked(self, asked: RequestedTime) -> CommitTime | None:
        """Return the commit of the run that somebody names, or else the last one as of the moment, if any.

        :raises NoSuchMoment: it is neither, or the run that has this id committed at another moment.
        """
        finished = [moment for moment in self.moments if moment.finished]
        by_moment = None if asked.when is None else self.moment_at(stamp_of(asked.when))
        if asked.word.lower() == "latest":
            return finished[-1] if finished else None
        of_run = [m for m in finished if asked.word in (m.stamp, m.run_id, to_text(os.fsencode(m.run_id)))]
        if not of_run:
            if asked.when is None:
                raise NoSuchTime(asked.why)
            return by_moment
        if asked.when is not None and of_run[-1] is not by_moment:
            raise NoSuchTime(
                f"{asked.word!r} is the id of a run, which committed at {format_time(of_run[-1].time)}, and a"
                f" moment, too: write {of_run[-1].stamp} or '{asked.when:%Y-%m-%d %H:%M:%S %z}'"
            )
        return of_run[-1]

    def state(
        self, moment: CommitTime, *, gone: bool = False, first: bytes = b"", last: bytes | None = None
    ) -> Iterator[FileVersion]:
        """Yield what the consumer index had as of ``moment``, in path order.

        :param gone: and what had left it by then, whose files stay.
        :param first: the path to begin with; ``last`` the one to end with, or None.
        """
        for path, changes in self._by_path(first, last):
            replay = _Replay(self, path, changes)
            replay.go_on_to(moment.number)
            content = replay.live
            if content is not None and (replay.listed or gone):
                replay.go_on_to(len(self.moments))
                yield content

    def present(self, index: Path) -> Iterator[FileVersion]:
        """Yield what an index has, with what history knows of it, in path order.

        :param index: the consumer index as it is now, in canonical form.
        """
        by_path = self._by_path()
        known = next(by_path, None)
        for entry in read_entries(index):
            if not self._wanted(entry.path):
                continue
            while known is not None and known[0] < entry.path:
                known = next(by_path, None)
            content = None
            if known is not None and known[0] == entry.path:
                _, content = self._ever(entry.path, list(known[1]))
            if content is None or content.md5 != entry.md5:
                content = FileVersion(entry.path, entry.md5, places=[entry.path])
            yield content

    def contents(self, first: bytes = b"", last: bytes | None = None) -> Iterator[FileVersion]:
        """Yield all that each path ever held, by path, and then by age, the oldest first.

        :param first: the path to begin with; ``last`` the one to end with, or None.
        """
        for path, changes in self._by_path(first, last):
            yield from self._ever(path, list(changes))[0]

    def _ever(
        self, path: bytes, changes: list[tuple[Any, ...]]
    ) -> tuple[list[FileVersion], FileVersion | None]:
        """Return all that a path ever held, and what it holds now."""
        if len(changes) == 1 and not self._moves:
            _, number, what, _, md5, size, mtime, mode, _ = changes[0]
            moment = self.moments[number]
            if what == ChangeKind.ADDED and moment.finished:  # as most files, which never changed
                content = FileVersion(path, md5, size, mtime, mode, moment.time, places=[path])
                return [content], content
        replay = _Replay(self, path, changes)
        replay.go_on_to(len(self.moments))
        return replay.contents, replay.live

    def elsewhere(self, md5: bytes) -> list[bytes]:
        """Return where bytes with this md5 should be, whatever path they came for. For any thread."""
        with self._lock:
            return list(self._elsewhere(md5))

    def _elsewhere(self, md5: bytes) -> Iterator[bytes]:
        if self._whole is None:
            self._whole = Timeline(self._mirror)
            self._whole._table.execute("CREATE INDEX by_md5 ON change (md5)")
            self._whole._table.execute("CREATE INDEX by_old_md5 ON change (old_md5)")
        whole = self._whole
        paths = whole._table.execute(
            "SELECT path FROM change WHERE md5 = ? UNION SELECT path FROM change WHERE old_md5 = ?",
            (md5, md5),
        )
        for (path,) in paths.fetchall():
            for content in whole.contents(path, path):
                if content.md5 == md5:
                    yield from content.places

    @property
    def has_imported(self) -> bool:
        """Whether there are versions of which no state of the whole is known, for they were imported."""
        found = self._table.execute("SELECT 1 FROM change WHERE what = ? LIMIT 1", (ChangeKind.IMPORTED,))
        return found.fetchone() is not None

    def knows(self, path: bytes) -> bool:
        """Whether a path, or anything below it, ever was in the index."""
        above = path.rstrip(b"/")
        found = self._table.execute(
            "SELECT 1 FROM change WHERE path = ? OR (path > ? AND path < ?) LIMIT 1",
            (path, above + b"/", above + b"0"),
        )
        return found.fetchone() is not None

    def moves_above(self, path: bytes) -> list[tuple[int, bytes, bytes]]:
        """Return the moves of ``path`` and of the directories above it: when, from where and to where."""
        found: list[tuple[int, bytes, bytes]] = []
        while path and self._moves:
            found += [(moment, path, to) for moment, to in self._moves.get(path, ())]
            path = path.rpartition(b"/")[0]
        return found

    def arrived(self) -> Iterator[tuple[CommitTime, int]]:
        """Yield how many bytes each commit put in place."""
        rows = self._table.execute(
            "SELECT moment, SUM(size) FROM change WHERE what IN (?, ?) GROUP BY moment",
            (ChangeKind.ADDED, ChangeKind.REPLACED),
        )
        return ((self.moments[number], size or 0) for number, size in rows)

    def noting(self, contents: Iterable[FileVersion]) -> Iterator[FileVersion]:
        """Yield contents, and note on the way where they should be, for :meth:`has_place`."""
        self._table.execute("CREATE TABLE IF NOT EXISTS place (path BLOB PRIMARY KEY) WITHOUT ROWID")
        for some in batches(contents, _BATCH):
            places = ((place,) for content in some for place in content.places)
            self._table.executemany("INSERT OR IGNORE INTO place VALUES (?)", places)
            yield from some
        self.noted = True

    def note_places(self) -> None:
        """Note where all contents should be, unless that was done."""
        if not self.noted:
            for _ in self.noting(self.contents()):
                pass

    def has_place(self, path: bytes) -> bool:
        """Whether some content should be there."""
        found = self._table.execute("SELECT 1 FROM place WHERE path = ?", (path,))
        return found.fetchone() is not None

    def forgotten(self, moments: Iterable[CommitTime]) -> Iterator[bytes]:
        """Yield the paths that left the index with one of these commits, in path order."""
        numbers = {moment.number for moment in moments}
        rows = self._table.execute(
            "SELECT path, moment FROM change WHERE what = ? ORDER BY path", (ChangeKind.FORGOTTEN,)
        )
        paths = (path for path, number in rows if number in numbers)
        return (path for path, _ in groupby(paths))

    def changes(self) -> Iterator[tuple[bytes, list[tuple[int, str, bytes | None, bytes | None]]]]:
        """Yield what happened to each path: the number of the moment, what, old and new md5."""
        for path, rows in self._by_path():
            yield path, [(row[1], row[2], row[3], row[4]) for row in rows]

    def _by_path(
        self, first: bytes = b"", last: bytes | None = None
    ) -> Iterator[tuple[bytes, Iterator[tuple[Any, ...]]]]:
        within = "WHERE path >= ?" if last is None else "WHERE path BETWEEN ? AND ?"
        rows = self._table.execute(
            f"SELECT * FROM change {within} ORDER BY path, moment, rowid",  # noqa: S608 - one of two
            (first,) if last is None else (first, last),
        )
        return groupby(rows, key=itemgetter(0))


class _Replay:
    """What happened to one path, moment by moment.

    :ivar contents: what it held so far.
    :ivar live: what it holds, by what history tells; its file stays when it leaves the index.
    :ivar listed: whether that is in the index.
    """

    def __init__(self, past: Timeline, path: bytes, changes: Iterable[tuple[Any, ...]]) -> None:
        self.contents: list[FileVersion] = []
        self.live: FileVersion | None = None
        self.listed = False
        self._path = path
        self._moments = past.moments
        self._pruned = 0  # how many contents there are up to the one that was pruned last
        happened = [
            (row[1], 0 if row[2] == ChangeKind.EDITED else 2, n, row) for n, row in enumerate(changes)
        ]
        happened += [(move[0], 1, 0, move) for move in past.moves_above(path)]
        self._ahead = sorted(happened, reverse=True)

    def go_on_to(self, number: int) -> None:
        """Let everything happen up to and with the moment of this number."""
        while self._ahead and self._ahead[-1][0] <= number:
            moment, kind, _, told = self._ahead.pop()
            if kind == 1:
                self._move(self._moments[moment], *told[1:])
            else:
                self._take(self._moments[moment], *told[2:])

    def _move(self, moment: CommitTime, source: bytes, target: bytes) -> None:
        for content in self.contents:
            moved = [_moved(place, source, target) for place in content.places]
            content.places[:] = moved if moment.finished else dict.fromkeys([*content.places, *moved])
        if moment.finished and self.live is not None:
            self.live.until = moment.time
            self.live, self.listed = None, False

    def _take(
        self,
        moment: CommitTime,
        what: str,
        old_md5: bytes | None,
        md5: bytes | None,
        size: int | None,
        mtime: int | None,
        mode: int | None,
        version: bytes | None,
    ) -> None:
        live = self.live
        if what == ChangeKind.PRUNED:
            self._prune(moment, version or b"")
            return
        if what == ChangeKind.IMPORTED:
            if moment.finished:
                self._import(
                    FileVersion(self._path, old_md5 or b"", size, mtime, mode, places=[version or b""])
                )
            return
        if not moment.finished:
            if live is not None and version is not None:
                live.places.append(version)
            return
        self.listed = md5 is not None
        if md5 is None:
            if live is not None and what == ChangeKind.FORGOTTEN:
                live.left = moment.time
                by = taken_out_by(moment.run_id, moment.stamp)
                live.taken_out = by or (UNKNOWN if moment.rebuilt else "")
            return
        if what == ChangeKind.REPLACED and version is not None:
            if live is None or live.md5 != old_md5:
                # It is not what the index said: somebody had changed it on this side.
                self._displaced(moment)
                live = self._holds(FileVersion(self._path, old_md5 or b""))
            live.places[:] = [version]
            live.until = moment.time
        elif live is not None and live.md5 == md5:
            # The bytes stay, or came again, and so do their places, which both share from now on.
            self.live = self.contents[-1] = replace(
                live,
                left="",
                taken_out="",
                mtime=live.mtime if mtime is None else mtime,
                mode=live.mode if mode is None else mode,
            )
            return
        else:
            self._displaced(moment)
        self._holds(FileVersion(self._path, md5, size, mtime, mode, moment.time, places=[self._path]))

    def _prune(self, moment: CommitTime, place: bytes) -> None:
        # They mostly come in the order of the contents.
        total = len(self.contents)
        for number in range(self._pruned, self._pruned + total):
            content = self.contents[number % total]
            if place in content.places:
                self._pruned = number % total + 1
                content.pruned = moment.time
                if moment.finished:
                    content.places.remove(place)
                    if content is self.live:  # it had left the index, and hands took it away
                        content.until = moment.time
                        self.live = None
                return

    def _holds(self, content: FileVersion) -> FileVersion:
        self.live = content
        self.contents.append(content)
        return content

    def _import(self, content: FileVersion) -> None:
        """Put an old version among the contents; the name that it has tells when it was displaced."""
        content.until = displaced_at(content.places[0])
        later = (n for n, known in enumerate(self.contents) if not "" < known.until <= content.until)
        self.contents.insert(next(later, len(self.contents)), content)

    def _displaced(self, moment: CommitTime) -> None:
        """Note that what was live was not there any more when it was to become a version."""
        if self.live is not None:
            self.live.until = moment.time
            self.live.places.clear()


def _moved(place: bytes, source: bytes, target: bytes) -> bytes:
    """Return where ``place`` is when ``source`` has moved to ``target`` as a whole."""
    if place == source or place.startswith(source + b"/"):
        return target + place[len(source) :]
    return place


def _digest(index: Path) -> str:
    """Return the digest of an index; an empty text if it is not there, or is no file."""
    try:
        return digest(index) if index.is_file() else ""
    except FileNotFoundError:
        return ""
