"""Old versions that another tool kept, as ``rsync --backup-dir`` does, become versions of the mirror.

::

    walked    each regular file of a tree; the caller tells what it is a version of, and when it was displaced
    hashed    several at a time
    named     the next free name in .old; what is there already with these bytes is not brought again
    copied    beside the runs, and verified, where it is not to be moved
    ahead     the history of all that comes
    finished  each is given its name by one rename, never over another (see settle)

A crash leaves each file where it was or under its name; whoever comes next finishes the commit. Neither index
nor live files change.

What this does not give: the state of the whole at a moment before the first commit. A tool that keeps what it
displaces says of no moment which files there were.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.common.sorted_paths import SortedLookup
from airflow_mdbackup.scheme.errors import DestinationRefused
from airflow_mdbackup.scheme.files.content import copy_of, md5_of
from airflow_mdbackup.scheme.files.syscalls import (
    concerns_one_file,
    is_file,
    make_directory,
    make_new_directory,
    open_for_owner,
    permissions,
)
from airflow_mdbackup.scheme.files.tree import Tree, remove_tree
from airflow_mdbackup.scheme.history.changes import Change, ChangeKind, pending
from airflow_mdbackup.scheme.history.consumer_index import present_index
from airflow_mdbackup.scheme.history.journal import transaction
from airflow_mdbackup.scheme.history.status_file import refresh_status
from airflow_mdbackup.scheme.history.timeline import Timeline
from airflow_mdbackup.scheme.index.canonical import check_path, read_entries
from airflow_mdbackup.scheme.store.locks import OPERATOR_WAIT
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.run import Run
from airflow_mdbackup.scheme.store.version_names import OLD, version_path
from airflow_mdbackup.scheme.takeover.survey import SkipReason, SourceTree, Survey, SurveyedFile, SurveyReport

Meaning = Callable[[bytes], "tuple[bytes, str] | None"]
"""Tells of a file's path of which it is a version, and the stamp of when it was displaced, if it is one."""


@dataclass(slots=True)
class Imported:
    """What became of old versions.

    :ivar versions: that came, or would; ``size`` is their bytes.
    :ivar there: that were there already.
    :ivar finished: whether an earlier commit that was cut off was finished first.
    """

    told: SurveyReport
    versions: int = 0
    size: int = 0
    there: int = 0
    finished: bool = False


def import_versions(
    mirror: Mirror,
    source: SourceTree,
    meaning: Meaning,
    *,
    copy: bool = False,
    dry_run: bool = False,
    threads: int = 2,
    progress: Callable[[Survey], Callable[[int], None]] = lambda survey: lambda size: None,
) -> Imported:
    """Bring the files of a tree as versions.

    :param source: the tree, which may be the mirror itself: then what history or the index knows is passed
        over.
    :param copy: leave the tree as it is.
    :param progress: given the survey, returns what is called with how much more was hashed.
    :raises DestinationRefused: there is no backup yet; or the tree is on another file system, and not to be
        copied.
    :raises ConsumerIndexDamaged: somebody damaged the consumer index.
    :raises DestinationBusy: a run holds the lock for too long.
    :raises DestinationFull, DestinationBroken, WorkerExhausted: see :meth:`.Mirror.translate_os_errors`.
    """
    with mirror.translate_os_errors():
        mirror.check()
        # What an earlier import was to move is none of what this one finds.
        finished = not dry_run and _settle(mirror)
        return _import_versions(mirror, source, meaning, copy, dry_run, threads, progress, finished)


def _settle(mirror: Mirror) -> bool:
    """Finish commits that were cut off, and return whether there were any."""
    found = any(pending(mirror))
    with transaction(mirror, "import", OPERATOR_WAIT):
        return found


def _import_versions(
    mirror: Mirror,
    source: SourceTree,
    meaning: Meaning,
    copy: bool,
    dry_run: bool,
    threads: int,
    progress: Callable[[Survey], Callable[[int], None]],
    finished: bool,
) -> Imported:
    with Timeline(mirror) as past:
        if not copy and os.stat(source.directory).st_dev != os.stat(mirror.files).st_dev:
            raise DestinationRefused(
                f"{mirror.provider}: {source.directory} is on another file system than {mirror.dest}, so "
                "that no rename brings its files there: --copy copies them, and leaves them where they are"
            )
        past.record_places()
        is_mirror = source.directory.resolve() == mirror.files.resolve()

        def passes_over(path: bytes) -> bool:
            return meaning(path) is None or (is_mirror and past.has_place(path))

        with Survey([source], None, passes_over) as survey, mirror.tree() as tree:
            survey.walk()
            for why in (
                SkipReason.PASSED_OVER,
                SkipReason.EMPTY,
                *([SkipReason.RESERVED] if is_mirror else ()),
            ):
                survey.told.left.pop(why, None)
            survey.hash(threads, progress(survey))
            importing = _Importing(mirror, past, tree, source, meaning, survey, copy, is_mirror)
            importing.outcome.finished = finished
            if dry_run:
                with TemporaryDirectory(prefix="mdbackup-") as folder:
                    index = present_index(mirror, Path(folder) / "index.md5")
                    for _ in importing.changes(None, index):
                        pass
            else:
                importing.commit()
            return importing.outcome


class _Importing:
    """Brings what a survey found.

    :param past: all of it, with its places noted.
    """

    def __init__(
        self,
        mirror: Mirror,
        past: Timeline,
        tree: Tree,
        source: SourceTree,
        meaning: Meaning,
        survey: Survey,
        copy: bool,
        is_mirror: bool,
    ) -> None:
        self.outcome = Imported(survey.told)
        self._mirror = mirror
        self._past = past
        self._tree = tree
        self._source = source
        self._meaning = meaning
        self._survey = survey
        self._copy = copy
        self._is_mirror = is_mirror
        self._taken: set[bytes] = set()  # version names that are given out, where several compete for one

    def commit(self) -> None:
        """Write the history ahead, and finish."""
        mirror = self._mirror
        with transaction(mirror, "import", OPERATOR_WAIT) as tx, ExitStack() as stack:
            staging = stack.enter_context(mirror.open_staging())
            was_whole = all(moment.finished for moment in self._past.moments)
            if mirror.last_commit() != self._past.newest or not was_whole:  # by another import, perhaps
                self._past = stack.enter_context(Timeline(mirror))
                self._past.record_places()
            if tx.index is None:
                raise DestinationRefused(
                    f"{mirror.provider}: {mirror.dest} has no index yet: adopt a tree, or let a run end"
                )
            header = tx.header()
            run = mirror.run(header["run_id"])
            make_new_directory(run.folder)
            try:
                tx.draft(run.changes, self.changes(run, tx.index), header)
                if self.outcome.versions:
                    staging.sync()
                    tx.publish(run.changes, header)
                    tx.carry_out(missed=self._missed)
                refresh_status(mirror)
            finally:
                # Of a commit that could not be finished, the copies are still needed.
                if not any(pending(mirror)):
                    remove_tree(run.folder)

    def _missed(self, change: Change, why: str) -> None:
        self.outcome.versions -= 1
        self.outcome.size -= change.size or 0
        self.outcome.told.leave(SkipReason.MOVING, change.path)

    def changes(self, run: Run | None, index: Path | None) -> Iterator[Change]:
        """Yield what comes, each with where its bytes wait.

        :param run: for copies; None in a dry run.
        :param index: the consumer index as it is now, in canonical form. What it claims stays where it is,
            also if a run has brought it since the survey, or its history is lost.
        """
        claimed = SortedLookup(read_entries(index) if index is not None and self._is_mirror else ())
        for file in self._survey.found():
            meant = self._meaning(file.path)
            if meant is None or file.md5 is None or claimed.find(file.path) is not None:
                continue
            path, stamp = meant
            at = self._source.directory / os.fsdecode(file.path[len(self._source.at) + 1 :])
            why = self._why_left(file, path, at)
            if why is not None:
                self.outcome.told.leave(why, file.path)
                continue
            version, is_there = self._version(file, path, stamp)
            if is_there and self._past.has_place(version):
                self.outcome.there += 1
                continue
            content = None
            if run is not None and not is_there:
                content = self._copied(run, file, at) if self._copy else to_text(os.fsencode(at.resolve()))
                if not content:
                    self.outcome.told.leave(SkipReason.MOVING, file.path)
                    continue
            self._taken.add(version)
            self.outcome.versions += 1
            self.outcome.size += file.size
            yield Change(
                *(path, ChangeKind.IMPORTED),
                old_md5=file.md5,
                size=file.size,
                mtime=file.modified // 10**9,
                mode=file.mode,
                version=version,
                content=content,
            )

    def _why_left(self, file: SurveyedFile, path: bytes, at: Path) -> SkipReason | None:
        if OLD in path.split(b"/"):
            return SkipReason.RESERVED
        try:
            check_path(path)
            if not file.is_as(at.lstat()):
                return SkipReason.MOVING
        except ValueError:
            return SkipReason.BAD_NAME
        except FileNotFoundError:
            return SkipReason.MOVING
        except OSError as error:
            if not concerns_one_file(error):
                raise
            return SkipReason.UNREADABLE
        return None if self._tree.blocker(version_path(path, "")) is None else SkipReason.BLOCKING

    def _version(self, file: SurveyedFile, path: bytes, stamp: str) -> tuple[bytes, bool]:
        """Return a version's name that is free, or that has these bytes, and which of both."""
        for attempt in count():
            version = version_path(path, stamp, attempt)
            if version in self._taken:
                continue
            there = self._tree.lstat(version)
            if there is None:
                return version, False
            if is_file(there) and there.st_size == file.size:
                with self._tree.opened(version) as descriptor:
                    if md5_of(descriptor) == file.md5:
                        return version, True
        raise AssertionError

    def _copied(self, run: Run, file: SurveyedFile, at: Path) -> str:
        """Return the number of a verified copy; an empty text if the file changed meanwhile."""
        make_directory(run.copies)
        name = str(self.outcome.versions)
        target = open_for_owner(run.copies / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            source = os.open(at, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if copy_of(source, target) != file.md5:
                    return ""
            finally:
                os.close(source)
            os.fchmod(target, permissions(file.mode))
            os.utime(target, ns=(file.modified, file.modified))
        finally:
            os.close(target)
        return name
