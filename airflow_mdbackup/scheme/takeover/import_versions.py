"""Old versions that another tool kept, as ``rsync --backup-dir`` does, become versions of the mirror.

::

    walk      each regular file of a tree; the caller says what it is a version of, and when it was displaced
    hash      several at a time
    name      the next free name in .old; a file that already exists there with this content is not imported
    copy      into a directory of the runs, and verify, unless the files are to be moved
    log       the history of all versions is written ahead
    carry out each gets its name by one rename, which never overwrites (see journal)

After a crash each file is where it was or has its new name; the next command or run finishes the commit.
Neither the index nor live files change.

Limitations: the state of the whole backup at a time before the first commit stays unknown. A tool that keeps
what it displaces does not record which files existed at a given time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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

IdentifyVersion = Callable[[bytes], "tuple[bytes, str] | None"]
"""Given the path of a file: the path that it is a version of, and the stamp of when it was displaced.

None if it is not a version.
"""


@dataclass(slots=True)
class Imported:
    """What became of old versions.

    :ivar versions: how many were imported, or would be; ``size`` is their bytes.
    :ivar already_present: how many already existed.
    :ivar recovered: whether an earlier commit that was cut off was finished first.
    """

    report: SurveyReport
    versions: int = 0
    size: int = 0
    already_present: int = 0
    recovered: bool = False


def import_versions(
    mirror: Mirror,
    source: SourceTree,
    identify: IdentifyVersion,
    *,
    copy: bool = False,
    dry_run: bool = False,
    threads: int = 2,
    progress: Callable[[Survey], Callable[[int], None]] = lambda survey: lambda size: None,
) -> Imported:
    """Import the files of a tree as versions.

    :param source: the tree, which may be the mirror itself: then files that the history or the index knows
        are ignored.
    :param copy: leave the tree as it is.
    :param progress: given the survey, returns what is called with the number of bytes just hashed.
    :raises DestinationRefused: there is no backup yet; or the tree is on another file system, and is not to
        be copied.
    :raises ConsumerIndexDamaged: somebody damaged the consumer index.
    :raises DestinationBusy: a run holds the lock for too long.
    :raises DestinationFull, DestinationBroken, WorkerExhausted: see :meth:`.Mirror.translate_os_errors`.
    """
    with mirror.translate_os_errors():
        mirror.check()
        # First, because what an earlier import was to move must not be found by this one.
        recovered = not dry_run and _recover(mirror)
        with Timeline(mirror) as timeline:
            _check_file_system(mirror, source, copy)
            timeline.record_places()
            is_mirror = source.directory.resolve() == mirror.files.resolve()

            def ignores(path: bytes) -> bool:
                return identify(path) is None or (is_mirror and timeline.has_place(path))

            with Survey([source], None, ignores) as survey, mirror.tree() as tree:
                survey.walk()
                _drop_expected(survey.report, is_mirror)
                survey.hash(threads, progress(survey))
                importer = _Importer(mirror, timeline, tree, source, identify, survey, copy, is_mirror)
                if dry_run:
                    importer.preview()
                else:
                    importer.commit()
                importer.result.recovered = recovered
                return importer.result


def _recover(mirror: Mirror) -> bool:
    """Finish commits that were cut off, and return whether there were any."""
    found = any(pending(mirror))
    with transaction(mirror, "import", OPERATOR_WAIT):
        return found


def _check_file_system(mirror: Mirror, source: SourceTree, copy: bool) -> None:
    """Make sure that the files can be moved into the mirror, unless they are to be copied."""
    if not copy and os.stat(source.directory).st_dev != os.stat(mirror.files).st_dev:
        raise DestinationRefused(
            f"{mirror.provider}: {source.directory} is on another file system than {mirror.dest}, so its "
            "files cannot be moved there. --copy copies them and leaves the originals in place"
        )


def _drop_expected(report: SurveyReport, is_mirror: bool) -> None:
    """Remove from a report what is no surprise here: it is not what was looked for."""
    expected = [SkipReason.PASSED_OVER, SkipReason.EMPTY, *([SkipReason.RESERVED] if is_mirror else ())]
    for reason in expected:
        report.skipped.pop(reason, None)


class _Importer:
    """Imports the files that a survey found.

    :param timeline: of all paths, with its places noted.
    """

    def __init__(
        self,
        mirror: Mirror,
        timeline: Timeline,
        tree: Tree,
        source: SourceTree,
        identify: IdentifyVersion,
        survey: Survey,
        copy: bool,
        is_mirror: bool,
    ) -> None:
        self.result = Imported(survey.report)
        self._mirror = mirror
        self._timeline = timeline
        self._tree = tree
        self._source = source
        self._identify = identify
        self._survey = survey
        self._copy = copy
        self._is_mirror = is_mirror
        self._taken: set[bytes] = set()  # version names given out here, in case several files want the same

    def preview(self) -> None:
        """Count what would be imported."""
        with TemporaryDirectory(prefix="mdbackup-") as folder:
            index = present_index(self._mirror, Path(folder) / "index.md5")
            for _ in self._changes(None, index):
                pass

    def commit(self) -> None:
        """Import the files, in one commit."""
        mirror = self._mirror
        with transaction(mirror, "import", OPERATOR_WAIT) as tx, ExitStack() as stack:
            staging = stack.enter_context(mirror.open_staging())
            if self._is_outdated():
                self._timeline = stack.enter_context(Timeline(mirror))
                self._timeline.record_places()
            if tx.index is None:
                raise DestinationRefused(
                    f"{mirror.provider}: {mirror.dest} has no index yet: adopt a tree, or wait for a run"
                )
            header = tx.header()
            run = stack.enter_context(_run_for_copies(mirror, header["run_id"]))
            tx.draft(run.changes, self._changes(run, tx.index), header)
            if self.result.versions:
                staging.sync()  # before the history claims that the copies exist
                tx.publish(run.changes, header)
                tx.carry_out(missed=self._count_missed)
            refresh_status(mirror)

    def _is_outdated(self) -> bool:
        """Whether somebody has committed since the history was read, such as another import."""
        was_complete = all(commit.finished for commit in self._timeline.moments)
        return self._mirror.last_commit() != self._timeline.newest or not was_complete

    def _count_missed(self, change: Change, why: str) -> None:
        self.result.versions -= 1
        self.result.size -= change.size or 0
        self.result.report.skip(SkipReason.MOVING, change.path)

    def _changes(self, run: Run | None, index: Path | None) -> Iterator[Change]:
        """Yield the versions to import, each with where its content waits.

        :param run: for copies; None in a dry run.
        :param index: the consumer index as it is now, in canonical form. A file that it lists stays in place,
            even if a run brought it since the survey, or its history is lost.
        """
        listed = SortedLookup(read_entries(index) if index is not None and self._is_mirror else ())
        for file in self._survey.surveyed_files():
            version_of = self._identify(file.path)
            if version_of is None or file.md5 is None or listed.find(file.path) is not None:
                continue
            change = self._import_file(file, *version_of, run)
            if change is not None:
                self._taken.add(change.version or b"")
                self.result.versions += 1
                self.result.size += file.size
                yield change

    def _import_file(self, file: SurveyedFile, path: bytes, stamp: str, run: Run | None) -> Change | None:
        """Return the change that imports a file as a version of ``path``; None if it is not imported."""
        location = self._source.directory / os.fsdecode(file.path[len(self._source.at) + 1 :])
        reason = self._reason_to_skip(file, path, location)
        if reason is not None:
            self.result.report.skip(reason, file.path)
            return None
        version, exists = self._choose_name(file, path, stamp)
        if exists and self._timeline.has_place(version):
            self.result.already_present += 1
            return None
        content = None
        if run is not None and not exists:
            content = self._copy_to(run, file, location) if self._copy else _absolute(location)
            if not content:
                self.result.report.skip(SkipReason.MOVING, file.path)
                return None
        return Change(
            *(path, ChangeKind.IMPORTED),
            old_md5=file.md5,
            size=file.size,
            mtime=file.modified // 10**9,
            mode=file.mode,
            version=version,
            content=content,
        )

    def _reason_to_skip(self, file: SurveyedFile, path: bytes, location: Path) -> SkipReason | None:
        if OLD in path.split(b"/"):
            return SkipReason.RESERVED
        try:
            check_path(path)
            if not file.matches(location.lstat()):
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

    def _choose_name(self, file: SurveyedFile, path: bytes, stamp: str) -> tuple[bytes, bool]:
        """Return a name for a version, and whether a file with its content already exists there.

        If not, the name is free.
        """
        for attempt in count():
            version = version_path(path, stamp, attempt)
            if version in self._taken:
                continue
            existing = self._tree.lstat(version)
            if existing is None:
                return version, False
            if is_file(existing) and existing.st_size == file.size:
                with self._tree.opened(version) as descriptor:
                    if md5_of(descriptor) == file.md5:
                        return version, True
        raise AssertionError

    def _copy_to(self, run: Run, file: SurveyedFile, location: Path) -> str:
        """Return the number of a verified copy; an empty text if the file changed meanwhile."""
        make_directory(run.copies)
        number = str(self.result.versions)
        target = open_for_owner(run.copies / number, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            source = os.open(location, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if copy_of(source, target) != file.md5:
                    return ""
            finally:
                os.close(source)
            os.fchmod(target, permissions(file.mode))
            os.utime(target, ns=(file.modified, file.modified))
        finally:
            os.close(target)
        return number


def _absolute(location: Path) -> str:
    return to_text(os.fsencode(location.resolve()))


@contextmanager
def _run_for_copies(mirror: Mirror, run_id: str) -> Iterator[Run]:
    """Provide the directory of a run for copies, which is removed once they are not needed any more."""
    run = mirror.run(run_id)
    make_new_directory(run.folder)
    try:
        yield run
    finally:
        # If the commit could not be finished, whoever finishes it needs the copies.
        if not any(pending(mirror)):
            remove_tree(run.folder)
