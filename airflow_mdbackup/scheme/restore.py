"""Files come back: the mirror as of some moment is written into a directory.

::

    chosen   what the consumer index had then, as far as it is wanted (see past)
    looked   at the target: a file that is there with these bytes is left; another one is not touched
    copied   hashing on the way; from its place, or wherever else in the mirror its bytes are
    put      under its name, with the provider's time and mode, once the md5 is the one that the index had,
             and all of it is on the disk (syncfs), many at a time

What was cut off is done again by the same command: what has its name is whole. Nothing in the mirror is
changed, and no lock is taken, so that backups go on meanwhile; a file that they displace is found where it
went. What has no history is looked for by its version names in ``.old``.

What this does not give: owners, extended attributes and empty directories, which no backup has.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from hashlib import md5
from itertools import count
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryDirectory

from pathspec import GitIgnoreSpec

from airflow_mdbackup.scheme.disk import free
from airflow_mdbackup.scheme.errors import DestinationFull, DestinationRefused
from airflow_mdbackup.scheme.history import taken_out_by
from airflow_mdbackup.scheme.index import has_path, read_entries
from airflow_mdbackup.scheme.last_run import LastRun
from airflow_mdbackup.scheme.mirror import Mirror, versions_on_disk
from airflow_mdbackup.scheme.moments import Asked, NoSuchMoment, in_words
from airflow_mdbackup.scheme.names import from_text, to_text
from airflow_mdbackup.scheme.ordered import Alongside, batches
from airflow_mdbackup.scheme.past import Content, Moment, Past
from airflow_mdbackup.scheme.settle import permissions, present_index
from airflow_mdbackup.scheme.target import OpenTarget, trusted
from airflow_mdbackup.scheme.threads import TreePerThread, spread
from airflow_mdbackup.scheme.tree import (
    Blocked,
    Folder,
    Tree,
    concerns_one_file,
    copy_of,
    is_file,
    md5_of,
)

_BATCH, _BATCH_SIZE = 2000, 1 << 30  # files, or bytes, that get their names together


class Came(StrEnum):
    """What became of a file that was to come back."""

    RESTORED = "restored"
    THERE = "there"  # with these bytes already
    KEPT = "kept"  # something else has its name in the target, and overwriting was not asked for
    LOST = "lost"  # its bytes are nowhere in the mirror
    PRUNED = "pruned"  # likewise, and a person had them taken away
    FAILED = "failed"  # the target could not take it, or the mirror could not be read

    @property
    def good(self) -> bool:
        """Whether the target has what it should."""
        return self in (Came.RESTORED, Came.THERE)


@dataclass(frozen=True, slots=True)
class Restored:
    """What became of one file.

    :ivar size: bytes that were written, or would be.
    :ivar detail: for people, of what did not come back: why, and what to do.
    :ivar replaced: whether another file had its name in the target, or has.
    :ivar differs: whether it was kept because a file with other bytes has its name, which may be overwritten.
    :ivar waits: the name under which it waits for its own, while that is so.
    """

    content: Content
    came: Came
    size: int = 0
    detail: str = ""
    replaced: bool = False
    differs: bool = False
    waits: bytes = b""


class Selection:
    """Paths that somebody asked for: files, directories with all below, and gitignore patterns.

    A word that is a path of the past means just that one, whatever characters are in it; call :meth:`settle`
    once the past is read. No words mean everything.

    :param words: as people write them: escaped (see :mod:`.names`) or not, with or without a leading slash.
    :raises ValueError: one is empty, or no pattern.
    """

    def __init__(self, words: Iterable[str] = ()) -> None:
        self._words = {word: as_path(word) for word in words}
        if "" in self._words:
            raise ValueError("a path is empty")
        self._found: set[str] = set()
        self._paths = dict(self._words)
        self._patterns = {word: GitIgnoreSpec.from_lines([_pattern(word)]) for word in self._words}

    def __call__(self, path: bytes) -> bool:
        return not self._words or any(self._matching(path))

    def take(self, path: bytes) -> bool:
        """Whether ``path`` is chosen; noting for which words."""
        found = list(self._matching(path))
        self._found.update(found)
        return bool(found) or not self._words

    @property
    def is_everything(self) -> bool:
        """Whether there are no words."""
        return not self._words

    @property
    def not_found(self) -> list[str]:
        """Words for which no path was taken."""
        return [word for word in self._words if word not in self._found]

    def settle(self, knows: Callable[[bytes], bool]) -> None:
        """Take each word for a path, if there ever was one, or anything below it, and else for a pattern."""
        for word, path in self._words.items():
            del (self._patterns if knows(path) else self._paths)[word]

    def _matching(self, path: bytes) -> Iterator[str]:
        for word, wanted in self._paths.items():
            if path == wanted or path.startswith(wanted.rstrip(b"/") + b"/"):
                yield word
        for word, spec in self._patterns.items():
            if spec.match_file(os.fsdecode(path[1:])):
                yield word


def as_path(word: str) -> bytes:
    """Return the path that somebody means who writes it escaped or not, with or without a leading slash."""
    try:
        path = from_text(word)
    except ValueError:
        path = os.fsencode(word)
    return b"/" + path.strip(b"/")


def _pattern(word: str) -> str:
    """Return a gitignore pattern in which nothing at the beginning has another meaning than elsewhere."""
    return "\\" + word if word.startswith(("!", "#")) else word


class State:
    """What a backup had at some moment, as far as somebody asks for it; see :func:`state_of`.

    :ivar past: where it is from.
    :ivar said: as of when, and by what that is known; for people.
    :ivar needs_history: whether it may lack what is wrong with the history.
    :param taken_out: what it lacks because a person took it out of the index, in path order; asked for once.
    """

    def __init__(
        self,
        mirror: Mirror,
        past: Past,
        wanted: Selection,
        read: Callable[[], Iterator[Content]],
        said: str,
        taken_out: Iterable[Content],
    ) -> None:
        self._mirror = mirror
        self.past = past
        self.said = said
        self.needs_history = True
        self._wanted = wanted
        self._read = read
        self._taken_out = taken_out

    def contents(self) -> Iterator[Content]:
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
            f"the provider's index of {in_words(last.fetched)} no longer has the file": gone,
        }
        return [
            f"{number:,} file{'s are' if number > 1 else ' is'} left out: `forget` or `verify --repair` had "
            f"taken the entry out of the index, and {why}; {option} takes what is left of it"
            for why, number in since.items()
            if number
        ]


@contextmanager
def state_of(
    mirror: Mirror, wanted: Selection, as_of: datetime | Asked | None = None, *, gone: bool = False
) -> Iterator[State]:
    """Hold the state of a backup as of some moment, to be restored.

    :param wanted: the paths that are asked for; it is settled here.
    :param as_of: the moment, with a time zone, or what somebody wrote for it; None: now.
    :param gone: and what had gone from the provider by then.
    :raises NoSuchMoment: there was no backup yet, or no such run.
    :raises DestinationRefused: a file of history has a newer format.
    :raises OSError: the disk is full or broken.
    """
    with Past(mirror, wanted) as past, TemporaryDirectory(prefix="mdbackup-") as folder:
        index = present_index(mirror, Path(folder) / "index.md5")
        wanted.settle(lambda path: past.knows(path) or (index is not None and has_path(index, path)))
        if as_of is None and index is not None and not gone:
            last = past.moment_at(past.newest)
            said = "As of now, by the index"
            if last is not None:
                said += f"; the last commit was at {in_words(last.time)}"
            present = index
            taken_out = _not_in(present, _taken_out(past, last))
            state = State(mirror, past, wanted, lambda: past.present(present), said, taken_out)
        else:
            moment = _moment(past, as_of)
            said = f"As of {in_words(moment.time)}, by {to_text(os.fsencode(moment.run_id))}"
            if moment.rebuilt:
                said += "; its history was lost, and told anew: there may be too much"
            taken_out = _taken_out(past, None if gone else moment)
            state = State(mirror, past, wanted, lambda: past.state(moment, gone=gone), said, taken_out)
        # The index tells what is there now, and no history is needed for that.
        state.needs_history = as_of is not None
        yield state


def _taken_out(past: Past, moment: Moment | None) -> Iterator[Content]:
    """Yield what a person took out of the index by a moment, if none had come back by then."""
    if moment is None:
        return
    by_hand = [m for m in past.moments if m.number <= moment.number and taken_out_by(m.run_id, m.stamp)]
    times = {m.time for m in by_hand}
    for path in past.forgotten(by_hand):
        for content in past.state(moment, gone=True, first=path, last=path):
            if content.left in times:
                yield content


def _not_in(index: Path, contents: Iterable[Content]) -> Iterator[Content]:
    """Yield those of some contents, in path order, whose paths an index does not have."""
    entries = Alongside(read_entries(index))
    yield from (content for content in contents if entries.find(content.path) is None)


def _moment(past: Past, as_of: datetime | Asked | None) -> Moment:
    """Return the last commit as of then.

    :raises NoSuchMoment: there was none yet.
    """
    asked = as_of if isinstance(as_of, Asked) else Asked("", as_of or datetime.now().astimezone())
    moment = past.asked(asked)
    when = asked.when or datetime.now().astimezone()
    if moment is None:
        finished = [moment for moment in past.moments if moment.finished]
        first = f"the first one was at {in_words(finished[0].time)}" if finished else "history knows of none"
        if finished and finished[0].rebuilt:
            first += ", and its history was lost and told anew: what was there before is in it"
        if past.has_imported:
            first += "; of what was imported, only the versions are known (`mdbackup versions`)"
        if past.problems:
            first += "; history is missing or damaged: `mdbackup rebuild` tells it anew, by what is left"
        is_sure = not past.problems and not (finished and finished[0].rebuilt)
        there_was = "there was no backup yet at" if is_sure else "no backup is known of"
        raise NoSuchMoment(f"{there_was} {when:%Y-%m-%d %H:%M:%S %z}: {first}")
    return moment


def restore(
    mirror: Mirror,
    past: Past,
    contents: Iterable[Content],
    target: Path,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    threads: int = 4,
) -> Iterator[Restored]:
    """Write contents into a directory, each under its path, and yield what became of them, in their order.

    All that has been yielded is on the target's disk.

    :param past: where contents are looked for that are not where they should be.
    :param target: made if it is not there. Symlinks in it are not followed.
    :param overwrite: replace files that are there and have other bytes, or another time or mode.
    :param dry_run: change nothing; what would be written has the outcome ``restored``.
    :param threads: how many files are hashed and written at a time.
    :raises DestinationRefused: the target is no directory, or within the backup; or see :class:`.OpenTarget`.
    :raises DestinationBusy: another restore writes to it.
    :raises DestinationFull: the disk of the target is full; what is there by then stays.
    :raises OSError: that disk, or the mirror's, is broken.
    """
    there, dest = trusted(target), mirror.dest.resolve()
    if there.exists() and not there.is_dir():
        raise DestinationRefused(f"{target} is a file: name a directory")
    if there.is_relative_to(dest) or dest.is_relative_to(there):
        where = "within the backup" if there.is_relative_to(dest) else "above the backup"
        raise DestinationRefused(f"{target} is {where} {mirror.dest}: name a directory elsewhere")
    with ExitStack() as stack:
        opened = None if dry_run else stack.enter_context(OpenTarget(there))
        sources = stack.enter_context(TreePerThread(mirror.tree))
        targets = None
        if opened is not None or there.exists():
            targets = stack.enter_context(TreePerThread(opened.tree if opened else lambda: Tree(there)))
        restorer = _Restorer(past, sources, targets, opened, overwrite)
        for batch in batches(contents, _BATCH, _BATCH_SIZE, lambda content: content.size or 0):
            with _full_told(target):
                came = list(spread(batch, restorer.bring, threads, attrgetter("size")))
                if opened is not None:
                    came = restorer.named(came)
            yield from came


@contextmanager
def _full_told(target: Path) -> Iterator[None]:
    """Say what to do if the disk of the target is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DestinationFull(
            f"the disk of {target} is full: {error} ({free(target)} are free). What has come back stays: "
            "make room, and give the same command again"
        ) from error


class _Restorer:
    """Brings contents, in any thread.

    :param targets: None where there is no target yet.
    :param opened: the target, with where files are written before they have their names; None in a dry run.
    """

    def __init__(
        self,
        past: Past,
        sources: TreePerThread,
        targets: TreePerThread | None,
        opened: OpenTarget | None,
        overwrite: bool,
    ) -> None:
        self._past = past
        self._sources = sources
        self._targets = targets
        self._opened = opened
        self._work = opened.work if opened is not None else None
        self._overwrite = overwrite
        self._numbers = count()

    def bring(self, content: Content) -> Restored:
        """Write one file, unless it is there. It gets its name by :meth:`named`.

        :raises OSError: no other one can be written either.
        """
        try:
            return self._bring(content)
        except OSError as error:
            return self._failed(content, error)

    def _failed(self, content: Content, error: OSError) -> Restored:
        if isinstance(error, Blocked):
            what = "a symlink" if error.is_symlink else "no directory"
            why = f"{to_text(error.at)} is {what} in the target: move it away"
            return Restored(content, Came.KEPT, detail=why)
        if not concerns_one_file(error):
            raise OSError(error.errno, error.strerror, to_text(content.path)) from error
        return Restored(content, Came.FAILED, detail=f"{error.strerror}")

    def _bring(self, content: Content) -> Restored:
        if content.path.split(b"/")[1] == OpenTarget.WORK.encode():
            why = f"restoring needs the name {OpenTarget.WORK} for itself"
            return Restored(content, Came.FAILED, detail=why)
        source, target = self._sources(), self._targets() if self._targets else None
        there = target.lstat(content.path) if target is not None else None
        if target is not None and there is not None:
            if not is_file(there):
                return Restored(content, Came.KEPT, detail=f"{_what(there)} has its name: move it away")
            if self._is_there(target, content, there):
                return Restored(content, Came.THERE)
            if not self._overwrite:
                return Restored(
                    content, Came.KEPT, detail="a file with other bytes has its name", differs=True
                )
        restored = self._write(source, content) if self._work else self._would_bring(source, content)
        return replace(restored, replaced=True) if there is not None and restored.came.good else restored

    def _is_there(self, target: Tree, content: Content, there: os.stat_result) -> bool:
        """Whether a file is what is to come back. Its time and mode count if it may be overwritten."""
        if content.size not in (None, there.st_size):
            return False
        if self._overwrite and not _has_attributes(content, there):
            return False
        return _has(target, content.path, content.md5)

    def named(self, came: list[Restored]) -> list[Restored]:
        """Give files their names, once all of them are on the disk, and return what became of each.

        So what has its name is whole, also if the disk has refused some of what was written.

        :raises OSError: no other one can be named either.
        """
        assert self._opened is not None and self._targets is not None
        waiting = [restored.content.path for restored in came if restored.waits]
        if not waiting:
            return came
        target, work = self._targets(), self._opened.work
        with self._opened.naming(() if self._overwrite else waiting):
            return [self._named(target, work, each) if each.waits else each for each in came]

    def _named(self, target: Tree, work: Folder, restored: Restored) -> Restored:
        content, name = restored.content, restored.waits
        try:
            if self._overwrite:
                target.put(work, name, content.path)
            else:
                target.put_new(work, name, content.path)
        except FileExistsError:
            return Restored(content, Came.KEPT, detail="something has its name since a moment ago")
        except OSError as error:
            return self._failed(content, error)
        return replace(restored, waits=b"")

    def _would_bring(self, source: Tree, content: Content) -> Restored:
        for place in _places(self._past, source, content):
            found = source.lstat(place)
            if found is None or not is_file(found) or content.size not in (None, found.st_size):
                continue
            # If it was pruned, another version of its path may be of the same size.
            if not content.pruned or _has(source, place, content.md5):
                return Restored(content, Came.RESTORED, found.st_size)
        return _lost(content)

    def _write(self, source: Tree, content: Content) -> Restored:
        assert self._work is not None
        name = b"%d" % next(self._numbers)
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(name, flags, 0o600, dir_fd=self._work.descriptor)
        try:
            found = self._copy(source, descriptor, content)
            if found is not None:
                _give_attributes(descriptor, content, found)
                size = os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
        if found is None:
            self._work.remove(name)
            return _lost(content)
        return Restored(content, Came.RESTORED, size, waits=name)

    def _copy(self, source: Tree, target: int, content: Content) -> os.stat_result | None:
        """Copy the bytes from wherever they are, and return what is known of the file that has them."""
        for place in _places(self._past, source, content):
            try:
                with source.opened(place) as descriptor:
                    if copy_of(descriptor, target) == content.md5:
                        return os.fstat(descriptor)
            except OSError as error:
                if not concerns_one_file(error):
                    raise
        return None


def _places(past: Past, source: Tree, content: Content) -> Iterator[bytes]:
    """Yield where the bytes may be: where they should, where history has them too, and what .old has."""
    tried = set()
    for find in (
        lambda: content.places,
        lambda: past.elsewhere(content.md5),
        lambda: [content.path, *versions_on_disk(source, content.path)],
    ):
        for place in find():
            if place not in tried:
                tried.add(place)
                yield place


def bytes_of(mirror: Mirror, past: Past, content: Content) -> bytes | None:
    """Return a content, whole in memory; None if no file of the mirror has its bytes.

    :raises OSError: the disk fails as a whole.
    """
    with mirror.tree() as tree:
        for place in _places(past, tree, content):
            try:
                with tree.opened(place) as descriptor, open(descriptor, "rb", closefd=False) as file:
                    if content.size not in (None, os.fstat(descriptor).st_size):
                        continue
                    found = file.read()
            except OSError as error:
                if not concerns_one_file(error):
                    raise
            else:
                if md5(found, usedforsecurity=False).hexdigest().encode() == content.md5:
                    return found
    return None


def _give_attributes(descriptor: int, content: Content, found: os.stat_result) -> None:
    """Give an open file the provider's mode and time; where they are not known, those of ``found``."""
    mode = found.st_mode if content.mode is None else content.mode
    mtime = found.st_mtime_ns if content.mtime is None else content.mtime * 10**9
    os.fchmod(descriptor, permissions(mode))
    os.utime(descriptor, ns=(mtime, mtime))


def _has_attributes(content: Content, there: os.stat_result) -> bool:
    """Whether a file has the provider's mode and time, as far as they are known."""
    return (content.mode is None or stat.S_IMODE(there.st_mode) == permissions(content.mode)) and (
        content.mtime is None or there.st_mtime_ns == content.mtime * 10**9
    )


def _has(source: Tree, place: bytes, md5: bytes) -> bool:
    """Whether a file has these bytes."""
    try:
        with source.opened(place) as descriptor:
            return md5_of(descriptor) == md5
    except OSError as error:
        if not concerns_one_file(error):
            raise
        return False


def nothing_under(word: str) -> str:
    """Return, for people, that history knows nothing of a path."""
    return f"Nothing was ever backed up under {word!r}: write paths as backupop sees them, from / on"


def _what(status: os.stat_result) -> str:
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFLNK: "a symlink"}
    return kinds.get(stat.S_IFMT(status.st_mode), "something that is no file")


def _lost(content: Content) -> Restored:
    if content.pruned:
        return Restored(content, Came.PRUNED, detail=f"it was pruned on {_date(content.pruned)}")
    why = (
        "no file of the backup has these bytes any more. If the provider still has it,"
        " `mdbackup verify --repair --missing` has the next run copy it again"
    )
    if not content.places:
        why = "when it was to become a version, its file had other bytes, or was not there"
    return Restored(content, Came.LOST, detail=why)


def _date(stamp: str) -> str:
    return f"{stamp[:4]}-{stamp[4:6]}-{stamp[6:8]} (UTC)"
