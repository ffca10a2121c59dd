"""History that is lost or damaged is told anew, as far as the names in ``.old`` and the index go.

::

    gaps     where the chain of digests does not close, and where a file cannot be read to its end (see past)
    found    versions of which no history tells, and whose stamp falls into a gap
    judged   path by path: what must have happened in a gap, by what was before it, versions, and what follows
    written  a file of history for each stamp that was found, and one before them for what was there by then

When a version was displaced is exact. What was added is taken to be there from the beginning of its gap (of
the first one: since ``dest`` was set up), and what went from the provider to be there until its end, so that
a restore brings too much rather than too little. A damaged file stays, under a name that ends in
``.damaged``; its readable lines stay in force.

What this does not give: what left no trace, such as a file that came and went within a gap; versions whose
names had to be shortened.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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
from airflow_mdbackup.scheme.history.replay import CommitTime
from airflow_mdbackup.scheme.history.timeline import HistoryGap, Timeline
from airflow_mdbackup.scheme.index.canonical import digest, read_entries
from airflow_mdbackup.scheme.recovery.verify import unknown
from airflow_mdbackup.scheme.store.locks import OPERATOR_WAIT
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.version_names import Displaced, displaced, stamp_beside, stamp_of_file

log = logging.getLogger(__name__)

_RUN_ID = "rebuilt"
_MOVE = 2  # rank of a move within its moment
_BEGIN, _END = "", "~"  # of a gap, in place of a stamp


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What was rebuilt, or would be.

    :ivar gaps: how many there were.
    :ivar changes: how many of each kind are told of now, by stamp of the file of history.
    :ivar unclear: places of versions of which it is not known whose they are, or that fall into no gap.
    """

    gaps: int
    changes: dict[str, dict[str, int]]
    unclear: tuple[bytes, ...]


def rebuild(mirror: Mirror, *, dry_run: bool = False) -> Rebuilt:
    """Tell history anew where it is missing.

    :param dry_run: write nothing.
    :raises ConsumerIndexDamaged: somebody damaged the consumer index, and no copy of it is left.
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
        with Timeline(mirror) as past, mirror.tree() as tree, _Rebuilding(mirror, past, tree) as work:
            # What a damaged file of an import or a pruning told leaves no gap.
            if not past.gaps and not past.damaged:
                return Rebuilt(0, {}, ())
            unclear = tuple(work.find(verified.place for verified in unknown(mirror, past)))
            # Of a damaged index it is not known what it has: nothing is made up of that.
            index = present_index(mirror, folder / "index.md5")
            work.judge(index or index_to_look_at(mirror, folder / "index.md5"))
            work.settle_stamps()
            if not dry_run:
                work.write()
            return Rebuilt(len(past.gaps), work.counts(), unclear)


class _Found(NamedTuple):
    """A file that was displaced in a gap.

    :ivar version: where it went; None if a directory above it went there.
    """

    path: bytes
    gap: int
    stamp: str
    md5: bytes
    size: int
    mtime: int
    mode: int
    version: bytes | None


class _Event(NamedTuple):
    """Something that happened to a path, or a gap, in which it is not known what did.

    :ivar rank: its place within the moment.
    :ivar md5: what the index said from then on.
    """

    moment: int
    rank: int
    old_md5: bytes | None
    md5: bytes | None
    gap: int | None = None


_FOUND = (
    "path BLOB, gap INTEGER, stamp TEXT, md5 BLOB, size INTEGER, mtime INTEGER, mode INTEGER, version BLOB"
)
_MADE = (
    "gap INTEGER, stamp TEXT, path BLOB, what TEXT, old_md5 BLOB, md5 BLOB, size INTEGER, mtime INTEGER,"
    " mode INTEGER, version BLOB, UNIQUE (stamp, path, what, version)"
)


class _Rebuilding:
    """The work, in tables that need not fit in memory. A context manager."""

    def __init__(self, mirror: Mirror, past: Timeline, tree: Tree) -> None:
        self._mirror = mirror
        self._past = past
        self._gaps = past.gaps
        self._tree = tree
        self._table = sqlite3.connect("")
        self._table.execute(f"CREATE TABLE found ({_FOUND})")
        self._table.execute(f"CREATE TABLE made ({_MADE})")
        self._moments = {moment.stamp: moment.number for moment in past.moments}
        self._moves: dict[bytes, set[tuple[int, str]]] = {}

    def __enter__(self) -> _Rebuilding:
        return self

    def __exit__(self, *error: object) -> None:
        self._table.close()

    # --- found --------------------------------------------------------------------------------------

    def find(self, places: Iterable[bytes]) -> Iterator[bytes]:
        """Take in files that history does not know, and yield places of which too little is told."""
        pace = ReportTimer()
        for number, place in enumerate(places):
            told = displaced(place)
            if told is None or not self._take(place, *told):
                yield place
            if pace.due():
                log.info("%s: %d unknown files looked at so far", self._mirror.provider, number)

    def _take(self, place: bytes, path: bytes, went: list[Displaced]) -> bool:
        """Take in one file, and return whether its place tells in which gap it was there.

        :param went: what of it went to ``.old``, the oldest first.
        """
        own = went[0] if went else None
        gap = self._gap_of(own) if own is not None else None
        clear, stamp, version = True, _END, None
        if own is not None and gap is not None:
            stamp, version = own.stamp, own.version if own.path == path else None
        else:
            # Its entry had left the index when the gap ended, or what is known now tells more of it.
            moment = self._moments.get(own.stamp) if own is not None else len(self._moments)
            clear = moment is not None
            before = [n for n, each in enumerate(self._gaps) if each.number <= (moment or 0)]
            gap = before[-1] if before else None
        if gap is not None and (facts := self._facts(place)) is not None:
            row = (path, gap, stamp, *facts, version)
            self._table.execute("INSERT INTO found VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        for moved in went[1:] if version is not None else went:
            where = self._gap_of(moved)
            if where is not None:
                self._make(where, moved.stamp, moved.path, ChangeKind.MOVED, *[None] * 5, moved.version)
        return clear

    def _gap_of(self, moved: Displaced) -> int | None:
        """Return in which gap something was displaced; None if history tells of that, or it is in none."""
        told = ((path, to) for _, path, to in self._past.moves_above(moved.path))
        if (moved.path, moved.version) in told:
            return None
        return next((n for n, gap in enumerate(self._gaps) if gap.holds(moved.stamp)), None)

    def _facts(self, place: bytes) -> tuple[bytes, int, int, int] | None:
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

    # --- judged -------------------------------------------------------------------------------------

    def judge(self, index: Path | None) -> None:
        """Find out what must have happened in the gaps.

        :param index: the consumer index as it is now, in canonical form; None if there is none.
        """
        now = read_entries(index) if index is not None else iter(())
        told = merge(
            ((path, 0, changes) for path, changes in self._past.changes()),
            ((path, 1, [*rows]) for path, rows in groupby(self._all_found(), key=attrgetter("path"))),
            ((entry.path, 2, entry.md5) for entry in now),
            key=itemgetter(0, 1),
        )
        for path, parts in groupby(told, key=itemgetter(0)):
            by_kind: dict[int, Any] = {kind: part for _, kind, part in parts}
            known = list(self._known(path, by_kind.get(0, ())))
            self._judge_path(path, known, by_kind.get(1, []), by_kind.get(2))

    def _all_found(self) -> Iterator[_Found]:
        rows = self._table.execute("SELECT * FROM found ORDER BY path, gap, stamp, version")
        return (_Found(*row) for row in rows)

    def _known(self, path: bytes, changes: Iterable[tuple[int, str, Any, Any]]) -> Iterator[_Event]:
        for moment, what, old_md5, md5 in changes:
            if what not in (
                ChangeKind.PRUNED,
                ChangeKind.IMPORTED,
            ):  # which leaves file and entry as they are
                yield _Event(moment, 1 if what == ChangeKind.EDITED else 3, old_md5, md5)
        for moment, _, _ in self._past.moves_above(path):
            yield _Event(moment, _MOVE, None, None)

    def _judge_path(self, path: bytes, known: list[_Event], found: list[_Found], now: bytes | None) -> None:
        gaps = (_Event(gap.number, 0, None, None, number) for number, gap in enumerate(self._gaps))
        if now is not None or any(event.rank != _MOVE for event in known):
            found = [each for each in found if each.stamp != _END]  # that tells what became of it
        events = sorted([*known, *gaps], key=itemgetter(0, 1))
        listed: bytes | None = None
        for position, event in enumerate(events):
            if event.gap is None:
                listed = event.md5
                continue
            versions = [each for each in found if each.gap == event.gap]
            expected = self._expected(path, events[position + 1 :], found, now)
            if expected is None and not versions and self._may_go_later(events[position + 1 :]):
                continue
            is_last = not any(later.gap is None for later in events[position + 1 :])
            live = self._live(path) if is_last and (expected or versions) else None
            self._fill(path, event.gap, listed, versions, expected, live)
            listed = expected

    def _may_go_later(self, later: list[_Event]) -> bool:
        """Whether an entry that went may have done so only after a gap, by what comes next."""
        if not later:
            return False
        following = later[0]
        # With what is moved, entries go; but not all of that may be readable.
        lost = any(gap.within and gap.number == following.moment + 1 for gap in self._gaps)
        return following.gap is not None or (following.rank == _MOVE and lost)

    def _expected(
        self, path: bytes, later: list[_Event], found: list[_Found], now: bytes | None
    ) -> bytes | None:
        """Return the md5 that the index must have had of a path behind a gap, by what comes later.

        :param now: what it has now.
        """
        for position, event in enumerate(later):
            if event.gap is None:
                same = [each for each in later[position:] if each.moment == event.moment and each.gap is None]
                return next((each.old_md5 for each in same if each.old_md5 is not None), None)
            versions = [each for each in found if each.gap == event.gap]
            if versions:
                return versions[0].md5
            if self._last_move(event.gap, path, _END):
                return None  # it came after what stood in its way
        return now

    def _live(self, path: bytes) -> os.stat_result | None:
        try:
            status = self._tree.lstat(path)
        except OSError as error:
            if not concerns_one_file(error):
                raise
            return None
        return status if is_file(status) else None

    def _fill(
        self,
        path: bytes,
        gap: int,
        listed: bytes | None,
        versions: list[_Found],
        expected: bytes | None,
        live: os.stat_result | None,
    ) -> None:
        """Tell what happened to a path in a gap.

        :param listed: the md5 that it had in the index before, and ``expected`` behind the gap.
        :param live: the file that has its name now, if nothing else happened to it since.
        """
        facts = (live.st_size, seconds(live), stat.S_IMODE(live.st_mode)) if live else (None, None, None)
        since = _BEGIN
        for version, following in zip_longest(versions, versions[1:]):
            # What the commit itself displaced, of which a part is lost, did not come with it.
            with_it = self._gaps[gap].within and version.stamp == self._gaps[gap].after
            if listed != version.md5 and not with_it:
                since = max(since, self._last_move(gap, path, version.stamp))
                self._make(gap, since, path, ChangeKind.ADDED, None, *version[3:7])
            listed, since = None, version.stamp
            if version.stamp == _END:
                listed = version.md5
                break
            if version.version is None:
                continue  # what moved the directory is told of that
            if following is not None:
                listed, new = following.md5, following[4:7]
            else:
                listed, new = expected or self._md5_of_live(path, live), facts
            what = ChangeKind.MOVED if listed is None else ChangeKind.REPLACED
            new = (None, None, None) if listed is None else new
            self._make(gap, version.stamp, path, what, version.md5, listed, *new, version.version)
        if listed != expected and expected is not None:
            since = max(since, self._last_move(gap, path, _END))
            self._make(gap, since, path, ChangeKind.ADDED, None, expected, *facts)
        elif listed != expected:
            self._make(gap, _END, path, ChangeKind.FORGOTTEN, listed, None)

    def _last_move(self, gap: int, path: bytes, before: str) -> str:
        """Return when what stood at a path or above it was moved last in a gap; empty if it was not."""
        last = ""
        while path:
            stamps = (stamp for where, stamp in self._moves.get(path, ()) if where == gap and stamp < before)
            last = max(last, *stamps, "")
            path = path.rpartition(b"/")[0]
        return last

    def _md5_of_live(self, path: bytes, live: os.stat_result | None) -> bytes | None:
        facts = self._facts(path) if live is not None else None
        return facts[0] if facts is not None else None

    def _make(self, gap: int, stamp: str, path: bytes, what: ChangeKind, *facts: Any) -> None:
        """Note a change.

        :param stamp: when; empty for the beginning of the gap, ``~`` for its end.
        """
        if what == ChangeKind.MOVED:
            self._moves.setdefault(path, set()).add((gap, stamp))
        row = (gap, stamp, path, what, *facts, *[None] * (6 - len(facts)))
        self._table.execute("INSERT OR IGNORE INTO made VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    # --- written ------------------------------------------------------------------------------------

    def settle_stamps(self) -> None:
        """Give what has no stamp of its own one, within its gap."""
        for number, gap in enumerate(self._gaps):
            query = "SELECT min(stamp), max(stamp) FROM made WHERE gap = ? AND stamp NOT IN ('', '~')"
            first, last = self._table.execute(query, (number,)).fetchone()
            begin = self._beginning(gap, first)
            end = stamp_beside(gap.before, -1) if gap.before else stamp_beside(last or begin, 1)
            for mark, stamp in ((_BEGIN, begin), (_END, max(end, last or begin))):
                self._table.execute(
                    "UPDATE made SET stamp = ? WHERE gap = ? AND stamp = ?", (stamp, number, mark)
                )

    def _beginning(self, gap: HistoryGap, first: str | None) -> str:
        if gap.within:
            return gap.after
        if gap.after:
            return stamp_beside(gap.after, 1)
        known = first or gap.before
        latest = stamp_beside(known, -1) if known else stamp_of_file(self._mirror.index)
        # What came with the first commits was there at some moment since then.
        return min(self._mirror.set_up_at(), latest)

    def counts(self) -> dict[str, dict[str, int]]:
        """Return how many changes of each kind there are, by stamp."""
        found: dict[str, dict[str, int]] = {}
        query = "SELECT stamp, what, count(*) FROM made GROUP BY stamp, what ORDER BY stamp, what"
        for stamp, what, number in self._table.execute(query):
            found.setdefault(stamp, {})[what] = number
        return found

    def write(self) -> None:
        """Write the files of history, and put what is damaged beside them."""
        headers = [read_header(moment.file) for moment in self._past.moments]
        for number, gap in enumerate(self._gaps):
            query = "SELECT DISTINCT stamp FROM made WHERE gap = ? ORDER BY stamp"
            stamps = [stamp for (stamp,) in self._table.execute(query, (number,))]
            begin = self._beginning(gap, None)
            if begin not in stamps and (gap.within or not stamps):
                stamps.insert(0, begin)  # though nothing is known of it, the chain must close
            above = headers[gap.number - 1] if gap.number else {}
            behind = headers[gap.number] if gap.number < len(headers) else {"before": self._digest_at_end()}
            digests = [str(above.get("before" if gap.within else "after", ""))]
            digests += [f"not known: {stamp}" for stamp in stamps[:-1]] + [str(behind.get("before", ""))]
            for stamp, (before, after) in zip(stamps, pairwise(digests), strict=True):
                header = {"before": before, "after": after, "order": above.get("order", "")}
                damaged = self._past.moments[gap.number - 1] if gap.within and stamp == begin else None
                self._write(number, stamp, damaged, **header)
        for path in self._past.damaged:
            if path.exists() and not _damaged(path).exists():
                path.rename(_damaged(path))
        fsync_directory(self._mirror.history)

    def _write(self, gap: int, stamp: str, damaged: CommitTime | None, **header: str) -> None:
        """Write one file of history: anew, or in place of a damaged one, of which readable lines are kept."""
        query = (
            "SELECT path, what, NULL, old_md5, md5, size, mtime, mode, version FROM made"
            " WHERE gap = ? AND stamp = ? ORDER BY path, rowid"
        )
        rows = self._table.execute(query, (gap, stamp))
        changes: Iterator[Change] = (Change(*row) for row in rows)
        if damaged is None:
            run_id, path = _RUN_ID, self._mirror.history_path(stamp, _RUN_ID)
        else:
            run_id, path = damaged.run_id, damaged.file
            if not _damaged(path).exists():
                os.link(path, _damaged(path))
            changes = chain(_readable(_damaged(path)), changes)
        provider = self._mirror.provider
        write_records(path, changes, run_id=run_id, provider=provider, stamp=stamp, rebuilt=True, **header)

    def _digest_at_end(self) -> str:
        # Whoever finds an index with this digest takes it for canonical without reading it.
        copies = (self._mirror.committed, self._mirror.index)
        with TemporaryDirectory(prefix="mdbackup-") as folder:
            target = Path(folder) / "index.md5"
            return next((digest(path) for path in copies if is_canonical(path, target)), "")


def _readable(path: Path) -> Iterator[Change]:
    try:
        yield from read_records(path, Change)
    except CorruptFile:
        return


def _damaged(path: Path) -> Path:
    return path.with_name(path.name + ".damaged")
