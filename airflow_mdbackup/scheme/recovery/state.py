"""What a backup contained at some time: the files to be restored, and why others are missing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.common.sorted_paths import SortedLookup
from airflow_mdbackup.scheme.common.times import NoSuchTime, RequestedTime, format_time
from airflow_mdbackup.scheme.history.changes import taken_out_by
from airflow_mdbackup.scheme.history.consumer_index import present_index
from airflow_mdbackup.scheme.history.replay import CommitTime, FileVersion
from airflow_mdbackup.scheme.history.timeline import Timeline
from airflow_mdbackup.scheme.index.canonical import has_path, read_entries
from airflow_mdbackup.scheme.recovery.last_run import LastRun
from airflow_mdbackup.scheme.recovery.selection import Selection, as_path
from airflow_mdbackup.scheme.store.mirror import Mirror


class MirrorState:
    """The selected part of a backup as of some time; made by :func:`state_of`.

    :param removed: the files it lacks because an operator removed their entries from the index, in path
        order; read once.
    :ivar timeline: the history that it is computed from.
    :ivar description: the time, and the commit or index that the state is taken from; for people.
    :ivar needs_history: whether damage in the history may make it incomplete.
    """

    def __init__(
        self,
        mirror: Mirror,
        timeline: Timeline,
        wanted: Selection,
        read: Callable[[], Iterator[FileVersion]],
        description: str,
        removed: Iterable[FileVersion],
    ) -> None:
        self._mirror = mirror
        self.timeline = timeline
        self.description = description
        self.needs_history = True
        self._wanted = wanted
        self._read = read
        self._removed = removed

    def contents(self) -> Iterator[FileVersion]:
        """Yield the selected files. May be called again."""
        return (content for content in self._read() if self._wanted.take(content.path))

    def describe_not_found(self, option: str) -> list[str]:
        """Return, for people, why each word that selected nothing did so.

        :param option: the option that includes deleted files.
        """
        return [
            f"There was nothing under {word!r} at that time; {option} includes what had been deleted by then"
            if self.timeline.knows(as_path(word))
            else describe_never_backed_up(word)
            for word in self._wanted.not_found
        ]

    def describe_removed(self, option: str) -> list[str]:
        """Return, for people, how many files are missing because their entries were removed from the index.

        :param option: the option that includes deleted files.
        :returns: one line per reason; empty if there are no such files.
        """
        last_run = LastRun(self._mirror)
        listed = [last_run.lists(content) for content in self._removed if self._wanted(content.path)]
        gone = listed.count(False)
        waiting = len(listed) - gone
        fetched = format_time(last_run.fetched)
        lines = []
        if waiting:
            lines.append(f"{_removed(waiting)}, and no run has pulled {_them(waiting)} since")
        if gone:
            index = f"the provider's index of {fetched}"
            lines.append(f"{_removed(gone)}, and {index} no longer has {_them(gone)}")
        return [f"{line}; {option} includes what is left" for line in lines]


def _removed(number: int) -> str:
    files, entries = ("1 file", "entry") if number == 1 else (f"{number:,} files", "entries")
    return f"{files} excluded: `forget` or `verify --repair` removed the index {entries}"


def _them(number: int) -> str:
    return "it" if number == 1 else "them"


@contextmanager
def state_of(
    mirror: Mirror,
    wanted: Selection,
    as_of: datetime | RequestedTime | None = None,
    *,
    include_deleted: bool = False,
) -> Iterator[MirrorState]:
    """Provide the state of a backup as of some time, in a ``with`` block.

    :param wanted: the selected paths; resolved here.
    :param as_of: the time, with a time zone, or as an operator wrote it; None for now.
    :param include_deleted: also what the provider had deleted by then.
    :raises NoSuchTime: the first backup is newer, or there is no such run.
    :raises DestinationRefused: a history file has a newer format.
    :raises OSError: the disk is full or broken.
    """
    with Timeline(mirror, wanted) as timeline, TemporaryDirectory(prefix="mdbackup-") as folder:
        index = present_index(mirror, Path(folder) / "index.md5")
        wanted.resolve(lambda path: timeline.knows(path) or (index is not None and has_path(index, path)))
        if as_of is None and index is not None and not include_deleted:
            state = _present_state(mirror, timeline, wanted, index)
        else:
            state = _past_state(mirror, timeline, wanted, as_of, include_deleted)
        state.needs_history = as_of is not None  # the index alone shows what is there now
        yield state


def _present_state(mirror: Mirror, timeline: Timeline, wanted: Selection, index: Path) -> MirrorState:
    """Return the state by the consumer index, which needs no history."""
    last = timeline.moment_at(timeline.newest)
    description = "As of now, by the index"
    if last is not None:
        description += f"; the last commit was at {format_time(last.time)}"
    entries = SortedLookup(read_entries(index))
    removed = (gone for gone in _find_removed(timeline, last) if entries.find(gone.path) is None)
    return MirrorState(mirror, timeline, wanted, lambda: timeline.present(index), description, removed)


def _past_state(
    mirror: Mirror,
    timeline: Timeline,
    wanted: Selection,
    as_of: datetime | RequestedTime | None,
    include_deleted: bool,
) -> MirrorState:
    """Return the state by the history.

    :raises NoSuchTime: see :func:`state_of`.
    """
    commit = _find_commit(timeline, as_of)
    description = f"As of {format_time(commit.time)}, by {to_text(os.fsencode(commit.run_id))}"
    if commit.rebuilt:
        description += "; its history was lost and rebuilt: there may be too many files"
    removed = _find_removed(timeline, None if include_deleted else commit)

    def read() -> Iterator[FileVersion]:
        return timeline.state(commit, gone=include_deleted)

    return MirrorState(mirror, timeline, wanted, read, description, removed)


def _find_removed(timeline: Timeline, commit: CommitTime | None) -> Iterator[FileVersion]:
    """Yield what operators had removed from the index by a commit, and no run had brought back by then."""
    if commit is None:
        return
    removals = [
        each
        for each in timeline.moments
        if each.number <= commit.number and taken_out_by(each.run_id, each.stamp)
    ]
    times = {removal.time for removal in removals}
    for path in timeline.forgotten(removals):
        for content in timeline.state(commit, gone=True, first=path, last=path):
            if content.left in times:
                yield content


def _find_commit(timeline: Timeline, as_of: datetime | RequestedTime | None) -> CommitTime:
    """Return the last commit as of a time.

    :raises NoSuchTime: there is none.
    """
    if isinstance(as_of, RequestedTime):
        requested = as_of
    else:
        requested = RequestedTime("", as_of or datetime.now().astimezone())
    commit = timeline.find_commit(requested)
    if commit is None:
        raise NoSuchTime(_describe_too_early(timeline, requested.when or datetime.now().astimezone()))
    return commit


def _describe_too_early(timeline: Timeline, when: datetime) -> str:
    """Return, for people, why there is no commit as of a time."""
    first = next((commit for commit in timeline.moments if commit.finished), None)
    is_rebuilt = first is not None and first.rebuilt
    is_certain = not timeline.problems and not is_rebuilt
    time = f"{when:%Y-%m-%d %H:%M:%S %z}"
    text = f"the first backup is newer than {time}" if is_certain else f"no known backup is as old as {time}"
    if first is None:
        text = f"there is no backup as of {time}: the history has none at all"
    else:
        text += f": {'it was at' if is_certain else 'the oldest is of'} {format_time(first.time)}"
    if is_rebuilt:
        text += ", and its history was lost and rebuilt: it includes what was there before"
    if timeline.has_imported:
        text += "; of imported files only the versions are known (`mdbackup versions`)"
    if timeline.problems:
        text += "; history is missing or damaged: `mdbackup rebuild` reconstructs it from what is left"
    return text


def describe_never_backed_up(word: str) -> str:
    """Return, for people, that the history knows nothing about a path."""
    return f"Nothing was ever backed up under {word!r}: write absolute paths as backupop sees them"
