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
from airflow_mdbackup.scheme.recovery.restore_target import OpenTarget, trusted
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.version_names import versions_on_disk

_BATCH, _BATCH_SIZE = 2000, 1 << 30  # files, or bytes, that get their names together


class RestoreOutcome(StrEnum):
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
        return self in (RestoreOutcome.RESTORED, RestoreOutcome.THERE)


@dataclass(frozen=True, slots=True)
class Restored:
    """What became of one file.

    :ivar size: bytes that were written, or would be.
    :ivar detail: for people, of what did not come back: why, and what to do.
    :ivar replaced: whether another file had its name in the target, or has.
    :ivar differs: whether it was kept because a file with other bytes has its name, which may be overwritten.
    :ivar waits: the name under which it waits for its own, while that is so.
    """

    content: FileVersion
    came: RestoreOutcome
    size: int = 0
    detail: str = ""
    replaced: bool = False
    differs: bool = False
    waits: bytes = b""


def restore(
    mirror: Mirror,
    past: Timeline,
    contents: Iterable[FileVersion],
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
                came = list(parallel_map(batch, restorer.bring, threads, attrgetter("size")))
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
            f"the disk of {target} is full: {error} ({free_space(target)} are free). What has come back "
            "stays: make room, and give the same command again"
        ) from error


class _Restorer:
    """Brings contents, in any thread.

    :param targets: None where there is no target yet.
    :param opened: the target, with where files are written before they have their names; None in a dry run.
    """

    def __init__(
        self,
        past: Timeline,
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

    def bring(self, content: FileVersion) -> Restored:
        """Write one file, unless it is there. It gets its name by :meth:`named`.

        :raises OSError: no other one can be written either.
        """
        try:
            return self._bring(content)
        except OSError as error:
            return self._failed(content, error)

    def _failed(self, content: FileVersion, error: OSError) -> Restored:
        if isinstance(error, PathBlocked):
            what = "a symlink" if error.is_symlink else "no directory"
            why = f"{to_text(error.at)} is {what} in the target: move it away"
            return Restored(content, RestoreOutcome.KEPT, detail=why)
        if not concerns_one_file(error):
            raise OSError(error.errno, error.strerror, to_text(content.path)) from error
        return Restored(content, RestoreOutcome.FAILED, detail=f"{error.strerror}")

    def _bring(self, content: FileVersion) -> Restored:
        if content.path.split(b"/")[1] == OpenTarget.WORK.encode():
            why = f"restoring needs the name {OpenTarget.WORK} for itself"
            return Restored(content, RestoreOutcome.FAILED, detail=why)
        source, target = self._sources(), self._targets() if self._targets else None
        there = target.lstat(content.path) if target is not None else None
        if target is not None and there is not None:
            if not is_file(there):
                return Restored(
                    content, RestoreOutcome.KEPT, detail=f"{_what(there)} has its name: move it away"
                )
            if self._is_there(target, content, there):
                return Restored(content, RestoreOutcome.THERE)
            if not self._overwrite:
                return Restored(
                    content, RestoreOutcome.KEPT, detail="a file with other bytes has its name", differs=True
                )
        restored = self._write(source, content) if self._work else self._would_bring(source, content)
        return replace(restored, replaced=True) if there is not None and restored.came.good else restored

    def _is_there(self, target: Tree, content: FileVersion, there: os.stat_result) -> bool:
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
            return Restored(content, RestoreOutcome.KEPT, detail="something has its name since a moment ago")
        except OSError as error:
            return self._failed(content, error)
        return replace(restored, waits=b"")

    def _would_bring(self, source: Tree, content: FileVersion) -> Restored:
        for place in _places(self._past, source, content):
            found = source.lstat(place)
            if found is None or not is_file(found) or content.size not in (None, found.st_size):
                continue
            # If it was pruned, another version of its path may be of the same size.
            if not content.pruned or _has(source, place, content.md5):
                return Restored(content, RestoreOutcome.RESTORED, found.st_size)
        return _lost(content)

    def _write(self, source: Tree, content: FileVersion) -> Restored:
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
        return Restored(content, RestoreOutcome.RESTORED, size, waits=name)

    def _copy(self, source: Tree, target: int, content: FileVersion) -> os.stat_result | None:
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


def _places(past: Timeline, source: Tree, content: FileVersion) -> Iterator[bytes]:
    """Yield where the bytes may be: where they should, where history has them too, and what .old has."""
    tried = set()
    for find in (
        lambda: content.places,
        lambda: past.places_of(content.md5),
        lambda: [content.path, *versions_on_disk(source, content.path)],
    ):
        for place in find():
            if place not in tried:
                tried.add(place)
                yield place


def bytes_of(mirror: Mirror, past: Timeline, content: FileVersion) -> bytes | None:
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


def _give_attributes(descriptor: int, content: FileVersion, found: os.stat_result) -> None:
    """Give an open file the provider's mode and time; where they are not known, those of ``found``."""
    mode = found.st_mode if content.mode is None else content.mode
    mtime = found.st_mtime_ns if content.mtime is None else content.mtime * 10**9
    os.fchmod(descriptor, permissions(mode))
    os.utime(descriptor, ns=(mtime, mtime))


def _has_attributes(content: FileVersion, there: os.stat_result) -> bool:
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


def _what(status: os.stat_result) -> str:
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFLNK: "a symlink"}
    return kinds.get(stat.S_IFMT(status.st_mode), "something that is no file")


def _lost(content: FileVersion) -> Restored:
    if content.pruned:
        return Restored(content, RestoreOutcome.PRUNED, detail=f"it was pruned on {_date(content.pruned)}")
    why = (
        "no file of the backup has these bytes any more. If the provider still has it,"
        " `mdbackup verify --repair --missing` has the next run copy it again"
    )
    if not content.places:
        why = "when it was to become a version, its file had other bytes, or was not there"
    return Restored(content, RestoreOutcome.LOST, detail=why)


def _date(stamp: str) -> str:
    return f"{stamp[:4]}-{stamp[4:6]}-{stamp[6:8]} (UTC)"
