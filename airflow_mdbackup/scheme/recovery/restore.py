"""Files are restored: the mirror as of some time is written into a directory.

::

    select    the selected files that the consumer index had then (see state)
    compare   with the target: a file that is there with this content is skipped; others are not touched
    copy      hashing on the way; from its place, or from wherever else in the mirror its content is
    rename    to its final name, with the provider's time and mode, once the md5 is the one in the index and
              everything is on the disk (syncfs), many files at a time

After a crash the same command does the rest: a file with its final name is complete. Nothing in the mirror is
changed and no lock is taken, so backups continue meanwhile; a file that they displace is found at its new
place. Content without a usable history is looked for by version names in ``.old``.

Limitations: owners, extended attributes and empty directories are not restored, because no backup has them.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from hashlib import md5
from itertools import count
from operator import attrgetter
from pathlib import Path

from airflow_mdbackup.scheme.common.parallel import parallel_map
from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.common.sorted_paths import batches
from airflow_mdbackup.scheme.errors import DestinationFull, DestinationRefused
from airflow_mdbackup.scheme.files.content import copy_of, md5_of
from airflow_mdbackup.scheme.files.disk import free_space
from airflow_mdbackup.scheme.files.folder import Folder
from airflow_mdbackup.scheme.files.syscalls import concerns_one_file, is_file, permissions
from airflow_mdbackup.scheme.files.tree import PathBlocked, Tree, TreePerThread
from airflow_mdbackup.scheme.history.replay import FileVersion
from airflow_mdbackup.scheme.history.timeline import Timeline
from airflow_mdbackup.scheme.recovery.restore_target import OpenTarget, resolve_trusted
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.version_names import versions_on_disk

_BATCH, _BATCH_SIZE = 2000, 1 << 30  # files, or bytes, that get their names together


class RestoreOutcome(StrEnum):
    """What became of a file that was to be restored."""

    RESTORED = "restored"
    THERE = "there"  # it already exists with this content
    KEPT = "kept"  # something else has its name in the target, and overwriting was not asked for
    LOST = "lost"  # no file in the mirror has its content
    PRUNED = "pruned"  # likewise, because an operator pruned it
    FAILED = "failed"  # the target could not take it, or the mirror could not be read

    @property
    def good(self) -> bool:
        """Whether the target has what it should."""
        return self in (RestoreOutcome.RESTORED, RestoreOutcome.THERE)


@dataclass(frozen=True, slots=True)
class Restored:
    """What became of one file.

    :ivar size: bytes written, or that would be.
    :ivar detail: for people: why it was not restored, and what to do.
    :ivar replaced: whether it replaced, or would replace, another file in the target.
    :ivar overwritable: whether it was kept because of a different file that ``overwrite`` would replace.
    :ivar temporary: its name while it waits for its final one; empty otherwise.
    """

    content: FileVersion
    outcome: RestoreOutcome
    size: int = 0
    detail: str = ""
    replaced: bool = False
    overwritable: bool = False
    temporary: bytes = b""


def restore(
    mirror: Mirror,
    timeline: Timeline,
    contents: Iterable[FileVersion],
    target: Path,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    threads: int = 4,
) -> Iterator[Restored]:
    """Write contents into a directory, each under its path, and yield what became of them, in their order.

    Everything yielded is on the target's disk.

    :param timeline: where to look for contents that are not where they should be.
    :param target: created if missing. Symlinks in it are not followed.
    :param overwrite: replace existing files that have another content, time or mode.
    :param dry_run: change nothing; what would be written has the outcome ``restored``.
    :param threads: how many files are hashed and written at a time.
    :raises DestinationRefused: the target is not a directory, or within the backup; or see
        :class:`.OpenTarget`.
    :raises DestinationBusy: another restore is writing to it.
    :raises DestinationFull: the disk of the target is full; what was restored by then stays.
    :raises OSError: that disk, or the mirror's, is broken.
    """
    directory = _check_target(mirror, target)
    with ExitStack() as stack:
        opened = None if dry_run else stack.enter_context(OpenTarget(directory))
        sources = stack.enter_context(TreePerThread(mirror.tree))
        targets = None
        if opened is not None or directory.exists():
            targets = stack.enter_context(TreePerThread(opened.tree if opened else lambda: Tree(directory)))
        restorer = _Restorer(timeline, sources, targets, opened, overwrite)
        for batch in batches(contents, _BATCH, _BATCH_SIZE, lambda content: content.size or 0):
            with _explain_full_disk(target):
                restored = list(parallel_map(batch, restorer.restore, threads, attrgetter("size")))
                if opened is not None:
                    restored = restorer.rename(restored)
            yield from restored


def _check_target(mirror: Mirror, target: Path) -> Path:
    """Return the resolved path of the target.

    :raises DestinationRefused: see :func:`restore`.
    """
    directory, dest = resolve_trusted(target), mirror.dest.resolve()
    if directory.exists() and not directory.is_dir():
        raise DestinationRefused(f"{target} is a file: name a directory")
    if directory.is_relative_to(dest) or dest.is_relative_to(directory):
        where = "within the backup" if directory.is_relative_to(dest) else "above the backup"
        raise DestinationRefused(f"{target} is {where} {mirror.dest}: name a directory elsewhere")
    return directory


@contextmanager
def _explain_full_disk(target: Path) -> Iterator[None]:
    """Say what to do if the disk of the target is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DestinationFull(
            f"the disk of {target} is full: {error} ({free_space(target)} are free). What was restored "
            "stays: free some space, and run the same command again"
        ) from error


class _Restorer:
    """Restores files, in any thread.

    :param targets: None if the target does not exist, in a dry run.
    :param opened: the target, and the directory in it for files without their final names; None in a dry
        run.
    """

    def __init__(
        self,
        timeline: Timeline,
        sources: TreePerThread,
        targets: TreePerThread | None,
        opened: OpenTarget | None,
        overwrite: bool,
    ) -> None:
        self._timeline = timeline
        self._sources = sources
        self._targets = targets
        self._opened = opened
        self._work = opened.work if opened is not None else None
        self._overwrite = overwrite
        self._numbers = count()

    def restore(self, content: FileVersion) -> Restored:
        """Write one file, unless it exists. It gets its final name by :meth:`rename`.

        :raises OSError: no other file can be written either.
        """
        try:
            return self._restore(content)
        except OSError as error:
            return self._describe_failure(content, error)

    def _describe_failure(self, content: FileVersion, error: OSError) -> Restored:
        if isinstance(error, PathBlocked):
            what = "a symlink" if error.is_symlink else "not a directory"
            detail = f"{to_text(error.at)} is {what} in the target: move it away"
            return Restored(content, RestoreOutcome.KEPT, detail=detail)
        if not concerns_one_file(error):
            raise OSError(error.errno, error.strerror, to_text(content.path)) from error
        return Restored(content, RestoreOutcome.FAILED, detail=f"{error.strerror}")

    def _restore(self, content: FileVersion) -> Restored:
        if content.path.split(b"/")[1] == OpenTarget.WORK.encode():
            detail = f"restoring needs the name {OpenTarget.WORK} for itself"
            return Restored(content, RestoreOutcome.FAILED, detail=detail)
        source, target = self._sources(), self._targets() if self._targets else None
        existing = target.lstat(content.path) if target is not None else None
        if target is not None and existing is not None:
            reason = self._reason_to_skip(target, content, existing)
            if reason is not None:
                return reason
        restored = self._write(source, content) if self._work else self._pretend(source, content)
        if existing is not None and restored.outcome.good:
            return replace(restored, replaced=True)
        return restored

    def _reason_to_skip(
        self, target: Tree, content: FileVersion, existing: os.stat_result
    ) -> Restored | None:
        """Return the result for a file that is not to be written, given what has its name; else None."""
        if not is_file(existing):
            detail = f"{_describe_type(existing)} with this name exists: move it away"
            return Restored(content, RestoreOutcome.KEPT, detail=detail)
        if self._is_restored(target, content, existing):
            return Restored(content, RestoreOutcome.THERE)
        if not self._overwrite:
            detail = "a different file with this name exists"
            return Restored(content, RestoreOutcome.KEPT, detail=detail, overwritable=True)
        return None

    def _is_restored(self, target: Tree, content: FileVersion, existing: os.stat_result) -> bool:
        """Whether a file already is what is to be restored. If it may be overwritten, time and mode count."""
        if content.size not in (None, existing.st_size):
            return False
        if self._overwrite and not _has_attributes(content, existing):
            return False
        return _has_content(target, content.path, content.md5)

    def rename(self, restored: list[Restored]) -> list[Restored]:
        """Give files their final names once all of them are on the disk; return what became of each.

        So a file with its final name is complete, even if the disk refused some of what was written.

        :raises OSError: no other file can be renamed either.
        """
        assert self._opened is not None and self._targets is not None
        waiting = [each.content.path for each in restored if each.temporary]
        if not waiting:
            return restored
        target, work = self._targets(), self._opened.work
        with self._opened.naming(() if self._overwrite else waiting):
            return [self._rename(target, work, each) if each.temporary else each for each in restored]

    def _rename(self, target: Tree, work: Folder, restored: Restored) -> Restored:
        content, name = restored.content, restored.temporary
        try:
            if self._overwrite:
                target.put(work, name, content.path)
            else:
                target.put_new(work, name, content.path)
        except FileExistsError:
            detail = "something with this name was created just now"
            return Restored(content, RestoreOutcome.KEPT, detail=detail)
        except OSError as error:
            return self._describe_failure(content, error)
        return replace(restored, temporary=b"")

    def _pretend(self, source: Tree, content: FileVersion) -> Restored:
        """Return what would become of a file."""
        for place in _find_places(self._timeline, source, content):
            found = source.lstat(place)
            if found is None or not is_file(found) or content.size not in (None, found.st_size):
                continue
            # If it was pruned, another version of its path may have the same size.
            if not content.pruned or _has_content(source, place, content.md5):
                return Restored(content, RestoreOutcome.RESTORED, found.st_size)
        return _lost(content)

    def _write(self, source: Tree, content: FileVersion) -> Restored:
        """Write a file under a temporary name."""
        assert self._work is not None
        name = b"%d" % next(self._numbers)
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(name, flags, 0o600, dir_fd=self._work.descriptor)
        try:
            found = self._copy(source, descriptor, content)
            if found is not None:
                _set_attributes(descriptor, content, found)
                size = os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
        if found is None:
            self._work.remove(name)
            return _lost(content)
        return Restored(content, RestoreOutcome.RESTORED, size, temporary=name)

    def _copy(self, source: Tree, target: int, content: FileVersion) -> os.stat_result | None:
        """Copy the content from wherever it is, and return the status of its source; None if it is lost."""
        for place in _find_places(self._timeline, source, content):
            try:
                with source.opened(place) as descriptor:
                    if copy_of(descriptor, target) == content.md5:
                        return os.fstat(descriptor)
            except OSError as error:
                if not concerns_one_file(error):
                    raise
        return None


def _find_places(timeline: Timeline, source: Tree, content: FileVersion) -> Iterator[bytes]:
    """Yield where the content may be: where it should, where history knows a copy, and what .old has."""
    tried = set()
    for find in (
        lambda: content.places,
        lambda: timeline.places_of(content.md5),
        lambda: [content.path, *versions_on_disk(source, content.path)],
    ):
        for place in find():
            if place not in tried:
                tried.add(place)
                yield place


def read_content(mirror: Mirror, timeline: Timeline, content: FileVersion) -> bytes | None:
    """Return a content, completely in memory; None if no file of the mirror has it.

    :raises OSError: the whole disk fails.
    """
    with mirror.tree() as tree:
        for place in _find_places(timeline, tree, content):
            try:
                with tree.opened(place) as descriptor, open(descriptor, "rb", closefd=False) as file:
                    if content.size not in (None, os.fstat(descriptor).st_size):
                        continue
                    data = file.read()
            except OSError as error:
                if not concerns_one_file(error):
                    raise
            else:
                if md5(data, usedforsecurity=False).hexdigest().encode() == content.md5:
                    return data
    return None


def _set_attributes(descriptor: int, content: FileVersion, found: os.stat_result) -> None:
    """Give an open file the provider's mode and time; if these are not known, those of ``found``."""
    mode = found.st_mode if content.mode is None else content.mode
    mtime = found.st_mtime_ns if content.mtime is None else content.mtime * 10**9
    os.fchmod(descriptor, permissions(mode))
    os.utime(descriptor, ns=(mtime, mtime))


def _has_attributes(content: FileVersion, existing: os.stat_result) -> bool:
    """Whether a file has the provider's mode and time, as far as they are known."""
    return (content.mode is None or stat.S_IMODE(existing.st_mode) == permissions(content.mode)) and (
        content.mtime is None or existing.st_mtime_ns == content.mtime * 10**9
    )


def _has_content(tree: Tree, place: bytes, md5: bytes) -> bool:
    try:
        with tree.opened(place) as descriptor:
            return md5_of(descriptor) == md5
    except OSError as error:
        if not concerns_one_file(error):
            raise
        return False


def _describe_type(status: os.stat_result) -> str:
    types = {stat.S_IFDIR: "a directory", stat.S_IFLNK: "a symlink"}
    return types.get(stat.S_IFMT(status.st_mode), "a special file")


def _lost(content: FileVersion) -> Restored:
    if content.pruned:
        return Restored(content, RestoreOutcome.PRUNED, detail=f"it was pruned on {_date(content.pruned)}")
    detail = (
        "no file of the backup has this content any more. If the provider still has it,"
        " `mdbackup verify --repair --missing` makes the next run copy it again"
    )
    if not content.places:
        detail = "when it was to become a version, its file was missing or had other content"
    return Restored(content, RestoreOutcome.LOST, detail=detail)


def _date(stamp: str) -> str:
    return f"{stamp[:4]}-{stamp[4:6]}-{stamp[6:8]} (UTC)"
