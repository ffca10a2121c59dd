"""TODO"""

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
    """What a backup had at some moment, as far as somebody asks for it; see :func:`state_of`.

    :ivar past: where it is from.
    :ivar said: as of when, and by what that is known; for people.
    :ivar needs_history: whether it may lack what is wrong with the history.
    :param taken_out: what it lacks because a person took it out of the index, in path order; asked for once.
    """

    def __init__(
        self,
        mirror: Mirror,
        past: Timeline,
        wanted: Selection,
        read: Callable[[], Iterator[FileVersion]],
        said: str,
        taken_out: Iterable[FileVersion],
    ) -> None:
        self._mirror = mirror
        self.past = past
        self.said = said
        self.needs_history = True
        self._wanted = wanted
        self._read = read
        self._taken_out = taken_out

    def contents(self) -> Iterator[FileVersion]:
        """Yield what was asked for. May be called again."""
        return (content for content in self._read() if self._wanted.take(content.path))

    def not_found(self, option: str) -> list[str]:
        """Return of each word for which nothing was yielded why that is so; for people.

        :param option: by which they ask for what had gone.
        """
        known = [word for word in self._wanted.not_found if self.past.knows(as_path(word))]
        return [
            f"There was nothing under {word!r} then; {option} takes what had gone by then, too"
            if word in known
            else nothing_under(word)
            for word in self._wanted.not_found
        ]

    def taken_out(self, option: str) -> list[str]:
        """Return, for people, how many files it lacks since a person took them out of the index; or nothing.

        :param option: by which they ask for what had gone.
        """
        last = LastRun(self._mirror)
        taken = [last.lists(content) for content in self._taken_out if self._wanted(content.path)]
        gone = taken.count(False)
        since = {
            "no run had pulled the file since": len(taken) - gone,
            f"the provider's index of {format_time(last.fetched)} no longer has the file": gone,
        }
        return [
            f"{number:,} file{'s are' if number > 1 else ' is'} left out: `forget` or `verify --repair` had "
            f"taken the entry out of the index, and {why}; {option} takes what is left of it"
            for why, number in since.items()
            if number
        ]


@contextmanager
def state_of(
    mirror: Mirror, wanted: Selection, as_of: datetime | RequestedTime | None = None, *, gone: bool = False
) -> Iterator[MirrorState]:
    """Hold the state of a backup as of some moment, to be restored.

    :param wanted: the paths that are asked for; it is settled here.
    :param as_of: the moment, with a time zone, or what somebody wrote for it; None: now.
    :param gone: and what had gone from the provider by then.
    :raises NoSuchMoment: there was no backup yet, or no such run.
    :raises DestinationRefused: a file of history has a newer format.
    :raises OSError: the disk is full or broken.
    """
    with Timeline(mirror, wanted) as past, TemporaryDirectory(prefix="mdbackup-") as folder:
        index = present_index(mirror, Path(folder) / "index.md5")
        wanted.settle(lambda path: past.knows(path) or (index is not None and has_path(index, path)))
        if as_of is None and index is not None and not gone:
            last = past.moment_at(past.newest)
            said = "As of now, by the index"
            if last is not None:
                said += f"; the last commit was at {format_time(last.time)}"
            present = index
            taken_out = _not_in(present, _taken_out(past, last))
            state = MirrorState(mirror, past, wanted, lambda: past.present(present), said, taken_out)
        else:
            moment = _moment(past, as_of)
            said = f"As of {format_time(moment.time)}, by {to_text(os.fsencode(moment.run_id))}"
            if moment.rebuilt:
                said += "; its history was lost, and told anew: there may be too much"
            taken_out = _taken_out(past, None if gone else moment)
            state = MirrorState(mirror, past, wanted, lambda: past.state(moment, gone=gone), said, taken_out)
        # The index tells what is there now, and no history is needed for that.
        state.needs_history = as_of is not None
        yield state


def _taken_out(past: Timeline, moment: CommitTime | None) -> Iterator[FileVersion]:
    """Yield what a person took out of the index by a moment, if none had come back by then."""
    if moment is None:
        return
    by_hand = [m for m in past.moments if m.number <= moment.number and taken_out_by(m.run_id, m.stamp)]
    times = {m.time for m in by_hand}
    for path in past.forgotten(by_hand):
        for content in past.state(moment, gone=True, first=path, last=path):
            if content.left in times:
                yield content


def _not_in(index: Path, contents: Iterable[FileVersion]) -> Iterator[FileVersion]:
    """Yield those of some contents, in path order, whose paths an index does not have."""
    entries = SortedLookup(read_entries(index))
    yield from (content for content in contents if entries.find(content.path) is None)


def _moment(past: Timeline, as_of: datetime | RequestedTime | None) -> CommitTime:
    """Return the last commit as of then.

    :raises NoSuchMoment: there was none yet.
    """
    asked = (
        as_of if isinstance(as_of, RequestedTime) else RequestedTime("", as_of or datetime.now().astimezone())
    )
    moment = past.find_commit(asked)
    when = asked.when or datetime.now().astimezone()
    if moment is None:
        finished = [moment for moment in past.moments if moment.finished]
        first = (
            f"the first one was at {format_time(finished[0].time)}" if finished else "history knows of none"
        )
        if finished and finished[0].rebuilt:
            first += ", and its history was lost and told anew: what was there before is in it"
        if past.has_imported:
            first += "; of what was imported, only the versions are known (`mdbackup versions`)"
        if past.problems:
            first += "; history is missing or damaged: `mdbackup rebuild` tells it anew, by what is left"
        is_sure = not past.problems and not (finished and finished[0].rebuilt)
        there_was = "there was no backup yet at" if is_sure else "no backup is known of"
        raise NoSuchTime(f"{there_was} {when:%Y-%m-%d %H:%M:%S %z}: {first}")
    return moment


def nothing_under(word: str) -> str:
    """Return, for people, that history knows nothing of a path."""
    return f"Nothing was ever backed up under {word!r}: write paths as backupop sees them, from / on"
