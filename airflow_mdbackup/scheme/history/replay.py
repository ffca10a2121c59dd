"""What one path held over time, replayed from the changes that history recorded for it.

A version is live until another one displaces it, or until a directory above it is moved away. A commit that a
crash cut off may or may not have happened, so each version that it would move is listed at both places.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from airflow_mdbackup.scheme.history.changes import ChangeKind, taken_out_by
from airflow_mdbackup.scheme.store.version_names import stamp_of_version

UNKNOWN = "unknown"
"""Why an entry left the index, where a rebuilt history does not say."""


class CommitTime(NamedTuple):
    """A commit.

    :ivar number: its position among all commits, from 0.
    :ivar stamp: its stamp, as ``20261123T031500.123456Z``; the names of versions contain it.
    :ivar time: when it happened, in the same form: the stamp, unless the clock was wrong (see :mod:`.clock`).
    :ivar file: its history file.
    :ivar finished: false if a crash cut it off.
    :ivar rebuilt: whether its history was lost and then rebuilt (see :mod:`.rebuild_history`).
    :ivar is_set: whether an operator has set its time (see `mdbackup clock`).
    """

    number: int
    stamp: str
    time: str
    run_id: str
    file: Path
    finished: bool
    rebuilt: bool = False
    is_set: bool = False


@dataclass(slots=True)
class FileVersion:
    """What a path held for a while.

    :ivar size: in bytes; ``mtime`` in Unix seconds and ``mode`` are the provider's; None if unknown.
    :ivar since: time of the commit that added it (see :class:`CommitTime`); empty if history does not say.
    :ivar left: time of the commit that removed it from the index while its file stayed; empty if none did.
    :ivar taken_out: why it left: ``forget``, ``repair``, or :data:`UNKNOWN` if history was rebuilt; empty if
        the provider no longer had it.
    :ivar until: time of the commit that displaced it; empty while it is live.
    :ivar pruned: time of the prune that deleted it. If it still has places, that prune was cut off.
    :ivar places: where it should be, as paths in the mirror's tree, most likely first; empty if it is lost.
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


class ChangeRow(NamedTuple):
    """A :class:`.Change` as it is in the timeline's table; ``commit`` is the number of its commit."""

    path: bytes
    commit: int
    what: str
    old_md5: bytes | None
    md5: bytes | None
    size: int | None
    mtime: int | None
    mode: int | None
    version: bytes | None


class Move(NamedTuple):
    """A file or directory that a commit moved as a whole into ``.old``."""

    commit: int
    source: bytes
    target: bytes


class Replay:
    """The history of one path, replayed commit by commit.

    :param rows: its changes, in the order of history.
    :param moves: of the path and of the directories above it.
    :ivar versions: what the path has held so far.
    :ivar live: what it holds now, according to history; its file stays when it leaves the index.
    :ivar listed: whether that is in the index.
    """

    def __init__(
        self, path: bytes, commits: Sequence[CommitTime], rows: Iterable[ChangeRow], moves: Sequence[Move]
    ) -> None:
        self.versions: list[FileVersion] = []
        self.live: FileVersion | None = None
        self.listed = False
        self._path = path
        self._commits = commits
        self._next_to_prune = 0  # index in `versions`
        events: list[ChangeRow | Move] = [*rows, *moves]
        if moves:
            events.sort(key=_order)
        self._upcoming = events[::-1]

    def advance_to(self, number: int) -> None:
        """Replay everything up to and including the commit with this number."""
        upcoming = self._upcoming
        while upcoming and upcoming[-1].commit <= number:
            event = upcoming.pop()
            commit = self._commits[event.commit]
            if isinstance(event, Move):
                self._move(commit, event)
            else:
                self._apply(commit, event)

    def _apply(self, commit: CommitTime, row: ChangeRow) -> None:
        match row.what:
            case ChangeKind.PRUNED:
                self._prune(commit, row.version or b"")
            case ChangeKind.IMPORTED:
                if commit.finished:
                    self._import(row)
            case _ if not commit.finished:
                if self.live is not None and row.version is not None:
                    self.live.places.append(row.version)
            case ChangeKind.REPLACED if row.version and row.md5:
                self._replace(commit, row, row.version)
            case ChangeKind.FORGOTTEN:
                self._forget(commit)
            case _:
                self._set(commit, row)

    def _move(self, commit: CommitTime, move: Move) -> None:
        for version in self.versions:
            moved = [_moved(place, move) for place in version.places]
            version.places[:] = moved if commit.finished else dict.fromkeys([*version.places, *moved])
        if commit.finished and self.live is not None:
            self.live.until = commit.time
            self.live, self.listed = None, False

    def _replace(self, commit: CommitTime, row: ChangeRow, place: bytes) -> None:
        """Make the live version an old one, at ``place``, and hold the one that replaced it."""
        live = self.live
        if live is None or live.md5 != row.old_md5:
            # The file was not what the index said: somebody had changed it by hand.
            self._lose_live(commit)
            live = FileVersion(self._path, row.old_md5 or b"")
            self.versions.append(live)
        live.places[:] = [place]
        live.until = commit.time
        self._hold(commit, row)

    def _set(self, commit: CommitTime, row: ChangeRow) -> None:
        """The index has an entry of this path now, or, if edited by hand, no longer has one."""
        live = self.live
        if row.md5 is None:
            self.listed = False
        elif live is not None and live.md5 == row.md5:
            # Same bytes as before, so both versions share the same list of places from now on.
            self.listed = True
            self.live = self.versions[-1] = replace(
                live,
                left="",
                taken_out="",
                mtime=live.mtime if row.mtime is None else row.mtime,
                mode=live.mode if row.mode is None else row.mode,
            )
        else:
            self._lose_live(commit)
            self._hold(commit, row)

    def _hold(self, commit: CommitTime, row: ChangeRow) -> None:
        assert row.md5 is not None
        self.listed = True
        self.live = FileVersion(
            self._path, row.md5, row.size, row.mtime, row.mode, commit.time, places=[self._path]
        )
        self.versions.append(self.live)

    def _lose_live(self, commit: CommitTime) -> None:
        """The live file was no longer there when it should have become a version."""
        if self.live is not None:
            self.live.until = commit.time
            self.live.places.clear()

    def _forget(self, commit: CommitTime) -> None:
        self.listed = False
        if self.live is not None:
            self.live.left = commit.time
            by = taken_out_by(commit.run_id, commit.stamp)
            self.live.taken_out = by or (UNKNOWN if commit.rebuilt else "")

    def _prune(self, commit: CommitTime, place: bytes) -> None:
        # Mostly they are pruned in the order of `versions`, so search on from the last one.
        total = len(self.versions)
        for number in range(self._next_to_prune, self._next_to_prune + total):
            version = self.versions[number % total]
            if place in version.places:
                self._next_to_prune = number % total + 1
                version.pruned = commit.time
                if commit.finished:
                    version.places.remove(place)
                    if version is self.live:  # it had left the index, and was deleted by hand
                        version.until = commit.time
                        self.live = None
                return

    def _import(self, row: ChangeRow) -> None:
        """Insert an old version; its name says when it was displaced."""
        place = row.version or b""
        version = FileVersion(self._path, row.old_md5 or b"", row.size, row.mtime, row.mode, places=[place])
        version.until = stamp_of_version(place)
        later = (n for n, known in enumerate(self.versions) if not "" < known.until <= version.until)
        self.versions.insert(next(later, len(self.versions)), version)


def _order(event: ChangeRow | Move) -> tuple[int, int, bytes]:
    """Within a commit: first what was edited by hand before it, then moves, then all other changes."""
    if isinstance(event, Move):
        return event.commit, 1, event.source
    return event.commit, 0 if event.what == ChangeKind.EDITED else 2, b""


def _moved(place: bytes, move: Move) -> bytes:
    """Return where ``place`` is after a move."""
    if place == move.source or place.startswith(move.source + b"/"):
        return move.target + place[len(move.source) :]
    return place
