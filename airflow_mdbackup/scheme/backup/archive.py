"""Keeps the old version of every file that is about to be replaced, in ``.old`` (step 2).

::

    under the lock, with one stamp for all:
        finish the commit that a crash cut off, if there is one
        for each staged result, in path order, whose live file exists and has other content:
            hash the live file
            link it to .old/<name>.<stamp>, or to the next free name
        write the records: path, device, inode, true md5, version

A link gives the old bytes a second name before the first one is replaced, so that they never lack a name. It
fails if the name exists, so that no version is ever overwritten. If the file system has no hard links, a copy
is made instead.

The stamp is recorded in the run directory before the first link, so that a retry finds its own links.

Sources: the seed's section "Full Backups and Version History"; link(2).
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import msgspec

from airflow_mdbackup.scheme.backup.name_collisions import find_collisions
from airflow_mdbackup.scheme.backup.plan import Plan, read_plan
from airflow_mdbackup.scheme.backup.results import results
from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.common.progress import ReportTimer
from airflow_mdbackup.scheme.errors import RunIncomplete
from airflow_mdbackup.scheme.files.content import copy_of, md5_of
from airflow_mdbackup.scheme.files.folder import Folder
from airflow_mdbackup.scheme.files.jsonl import (
    CorruptFile,
    Record,
    read_header,
    read_records,
    write_records,
    write_state,
)
from airflow_mdbackup.scheme.files.syscalls import concerns_one_file, is_file, make_directory, open_for_owner
from airflow_mdbackup.scheme.files.tree import Tree
from airflow_mdbackup.scheme.history.journal import transaction
from airflow_mdbackup.scheme.history.outcomes import Outcome
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.run import Run
from airflow_mdbackup.scheme.store.version_names import stamp_in_name, version_path

log = logging.getLogger(__name__)

_COPY = b"version"  # the temporary name of a copy
_NO_LINKS = (errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS)


class Archived(Record, frozen=True):
    """A live file as it was when it was archived.

    :ivar md5: of its actual content.
    :ivar version: the path of its version, or None if the run brings the same content anyway.
    :ivar linked: whether the version is a hard link to the live file, not a copy.
    """

    path: bytes
    device: int
    inode: int
    md5: bytes
    size: int
    modified: int  # nanoseconds
    version: bytes | None = None
    linked: bool = True

    def describes(self, live: os.stat_result) -> bool:
        """Whether the live file is still the one that was archived."""
        now = live.st_dev, live.st_ino, live.st_size, live.st_mtime_ns
        return now == (self.device, self.inode, self.size, self.modified)


@dataclass(slots=True)
class ArchiveSummary:
    """How many files were archived, and their total size in bytes."""

    archived: int = 0
    size: int = 0


def archive(mirror: Mirror, run: Run) -> ArchiveSummary:
    """Archive what the run is about to replace, and write the records.

    :raises RunIncomplete: the run has no plan.
    :raises DestinationBusy: another run holds the lock for too long.
    :raises ConsumerIndexDamaged: a commit was cut off, or names must be compared, and the consumer index is
        damaged.
    :raises DestinationFull: there is no room for versions that must be copies.
    :raises DestinationRefused, DestinationBroken, WorkerExhausted: see :meth:`.Mirror.translate_os_errors`.
    """
    summary = ArchiveSummary()
    with (
        mirror.translate_os_errors(),
        run.lock("archive_old", mirror.provider),
        # It carries out a pending history, which needs its versions, before any version is discarded.
        transaction(mirror, f"archive_old of {run.run_id}", scratch=run.consumer_index) as tx,
        mirror.tree() as tree,
    ):
        plan = read_plan(run)
        # An earlier try may have archived more than this one will.
        discard_unused(mirror, run, tree)
        archiver = Archiver(run, tree, version_stamp(mirror, run))
        colliding = colliding_paths(run, plan, lambda: tx.index)
        records = _records(archiver, run, plan, colliding, summary)
        write_records(run.archived, records, stamp=archiver.stamp)
    return summary


def version_stamp(mirror: Mirror, run: Run) -> str:
    """Return the stamp of this run's versions: an earlier try's, if it is still usable.

    Needs the lock.
    """
    tried = tried_stamps(run)
    # Not if there has been a commit since, or if the clock was ahead.
    if tried and mirror.last_commit() < tried[-1] <= mirror.next_stamp():
        return tried[-1]
    stamp = mirror.next_stamp()
    write_state(run.stamp, {"stamp": stamp, "before": tried})
    return stamp


def tried_stamps(run: Run) -> list[str]:
    """Return the stamps that a run has used for its versions, the latest last."""
    try:
        state = read_header(run.stamp)
    except FileNotFoundError:
        return []
    return [*state.get("before", ()), str(state["stamp"])]


def colliding_paths(run: Run, plan: Plan, current_index: Callable[[], Path | None]) -> dict[bytes, bytes]:
    """Return the paths of the results that this side cannot tell from others, with those others.

    :param current_index: returns the consumer index in canonical form, if there is one.
    """
    coming = (result.path for result in results(run, plan) if Outcome(result.outcome).good)
    return find_collisions(run, coming, current_index)


def _records(
    archiver: Archiver, run: Run, plan: Plan, colliding: Collection[bytes], summary: ArchiveSummary
) -> Iterator[Archived]:
    for result in results(run, plan):
        if Outcome(result.outcome).is_staged and result.path not in colliding:
            try:
                record = archiver.archive(result.path, result.md5)
            except OSError as error:
                if not concerns_one_file(error):
                    raise
                # The commit tries again, and fails that entry only.
                log.warning("Could not archive %s: %s", to_text(result.path), error.strerror)
                continue
            if record is not None:
                if record.version is not None:
                    summary.archived += 1
                    summary.size += record.size
                yield record


class Archiver:
    """Makes versions of live files. Needs the lock."""

    def __init__(self, run: Run, tree: Tree, stamp: str) -> None:
        self._run = run
        self._tree = tree
        self.stamp = stamp
        self._timer = ReportTimer()
        self._hashed_size = 0

    def archive(self, path: bytes, coming: bytes) -> Archived | None:
        """Archive the live file at ``path``, unless it has the md5 ``coming``; None if there is no file.

        :raises PathBlocked: ``.old`` is not a directory.
        :raises OSError: the live file cannot be read.
        """
        if not is_file(self._tree.lstat(path)):
            return None
        with self._tree.opened(path) as live:
            status = os.fstat(live)
            md5 = md5_of(live, progress=self._hashed)
            known = path, status.st_dev, status.st_ino, md5, status.st_size, status.st_mtime_ns
            if md5 == coming:
                return Archived(*known)
            return Archived(*known, *self._version(path, live, status, md5))

    def _hashed(self, size: int) -> None:
        self._hashed_size += size
        if self._timer.due():
            log.info("%.1f MB of live files hashed so far", self._hashed_size / 1e6)

    def _version(self, path: bytes, live: int, status: os.stat_result, md5: bytes) -> tuple[bytes, bool]:
        for attempt in count():
            version = version_path(path, self.stamp, attempt)
            try:
                self._tree.link(path, version)
                return version, True
            except FileExistsError:
                existing = self._tree.lstat(version)
                if existing is not None and os.path.samestat(existing, status):
                    return version, True  # an earlier try's link
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                return self._copy(path, live, status, md5), False
        raise AssertionError

    def _copy(self, path: bytes, live: int, status: os.stat_result, md5: bytes) -> bytes:
        """Make the version a copy, complete before it has its name."""
        for attempt in count():
            version = version_path(path, self.stamp, attempt)
            existing = self._tree.lstat(version)
            if existing is None:
                break
            if is_file(existing) and not existing.st_size:
                # The placeholder of an interrupted rename; or the copy of an empty file, which is remade.
                self._tree.unlink(version)
                break
            if is_file(existing) and existing.st_size == status.st_size and self._md5(version) == md5:
                return version  # an earlier try's copy
        make_directory(self._run.copies)
        with Folder(self._run.copies) as folder:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            target = open_for_owner(_COPY, flags, directory=folder.descriptor)
            try:
                os.lseek(live, 0, os.SEEK_SET)
                copy_of(live, target)
                os.fchmod(target, status.st_mode & 0o777)
                os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
                os.fsync(target)
            finally:
                os.close(target)
            self._tree.put_new(folder, _COPY, version)
        return version

    def _md5(self, path: bytes) -> bytes:
        with self._tree.opened(path) as descriptor:
            return md5_of(descriptor)

    def is_valid(self, record: Archived, live: os.stat_result) -> bool:
        """Whether a record still describes the live file, and its version exists."""
        if not record.describes(live):
            return False
        if record.version is None:
            return True
        version = self._tree.lstat(record.version)
        if version is None:
            return False
        return os.path.samestat(version, live) if record.linked else version.st_size == record.size

    def restamp(self, record: Archived, coming: bytes) -> Archived | None:
        """Rename a version that has another stamp to one with this stamp."""
        if record.version is None:
            return record
        for attempt in count():
            version = version_path(record.path, self.stamp, attempt)
            try:
                self._tree.drop_placeholder(record.version, version)
                self._tree.move(record.version, version)
                return msgspec.structs.replace(record, version=version)
            except FileExistsError:
                continue
            except FileNotFoundError:  # an earlier try has renamed it
                return self.archive(record.path, coming)
        raise AssertionError

    def discard(self, record: Archived) -> None:
        """Discard a version that no history records."""
        if record.version is not None:
            self.remove_redundant(record.path, record.version, record.md5)

    def discard_unrecorded(self, path: bytes, stamp: str) -> None:
        """Discard the versions of a path under a stamp that no history has: left unrecorded by a kill."""
        with _warn_if_kept(path):
            for attempt in count():
                version = version_path(path, stamp, attempt)
                if self._tree.lstat(version) is None:
                    return
                self.remove_redundant(path, version)

    def remove_redundant(self, path: bytes, version: bytes, md5: bytes | None = None) -> None:
        """Remove a version with this md5 if its bytes are also live, or in another version."""
        with _warn_if_kept(version):
            archived = self._tree.lstat(version)
            if archived is not None and self._is_elsewhere(path, version, archived, md5):
                self._tree.unlink(version)

    def _is_elsewhere(self, path: bytes, version: bytes, archived: os.stat_result, md5: bytes | None) -> bool:
        """Whether the bytes of a version are also live, or have another name in ``.old``."""
        live = self._tree.lstat(path)
        if live is not None and os.path.samestat(live, archived):
            return True
        if self._tree.has_twin(version):
            return True
        if live is None or not is_file(live):
            return False
        # Without hard links, the version is a copy.
        found = self._md5(version) if live.st_size == archived.st_size else None
        return found is not None and found == (md5 or found) == self._md5(path)


@contextmanager
def _warn_if_kept(path: bytes) -> Iterator[None]:
    """Let a version stay that cannot be removed, since nothing is lost by that."""
    try:
        yield
    except OSError as error:
        if not concerns_one_file(error):
            raise
        log.warning("Could not remove %s, which no history records: %s", to_text(path), error.strerror)


def discard_unused(mirror: Mirror, run: Run, tree: Tree) -> None:
    """Discard what a run has archived and none of its commits has used. Needs the lock."""
    stamp, records = read_archived(run)
    archiver = Archiver(run, tree, stamp)
    if not is_used(mirror, run, stamp):
        for record in records:
            archiver.discard(record)
    unused = [stamp for stamp in tried_stamps(run) if not is_used(mirror, run, stamp)]
    if unused:
        with suppress(RunIncomplete):
            for result in results(run, read_plan(run)):
                for stamp in unused:
                    archiver.discard_unrecorded(result.path, stamp)


def is_used(mirror: Mirror, run: Run, stamp: str) -> bool:
    """Whether a commit has begun that may use the versions that a run archived under this stamp.

    The run itself records this, because its history may have been lost, and rebuilt under another name. Also,
    two runs may have had the same stamp, and the same version, while the clock was behind: then history has
    it. In doubt it is used.
    """
    try:
        return stamp in used_stamps(run) or stamp in map(stamp_in_name, mirror.names_in_history())
    except CorruptFile:
        return True


def used_stamps(run: Run) -> list[str]:
    """Return the stamps under which commits of a run have begun.

    :raises CorruptFile: they cannot be read.
    """
    try:
        return [str(stamp) for stamp in read_header(run.used).get("stamps", ())]
    except FileNotFoundError:
        return []


def read_archived(run: Run) -> tuple[str, Iterator[Archived]]:
    """Return the stamp and the records of what a run has archived; empty if it has not archived."""
    if not run.archived.exists():
        return "", iter(())
    return str(read_header(run.archived)["stamp"]), read_records(run.archived, Archived)
