"""Applies changes that were written ahead to the files of the mirror, one by one.

Each may be applied again after a crash. The disk shows how far it came: if the new content is still waiting,
whole, it is put in place; if not, the live file must have the new md5, or else that change did not happen.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from airflow_mdbackup.scheme.common.paths import from_text, to_text
from airflow_mdbackup.scheme.common.progress import ReportTimer
from airflow_mdbackup.scheme.common.sorted_paths import Prefixes
from airflow_mdbackup.scheme.files.content import md5_of
from airflow_mdbackup.scheme.files.folder import Folder
from airflow_mdbackup.scheme.files.jsonl import read_header, read_records
from airflow_mdbackup.scheme.files.syscalls import concerns_one_file, is_file, permissions, seconds
from airflow_mdbackup.scheme.files.tree import PathBlocked, Tree
from airflow_mdbackup.scheme.history.changes import Change, ChangeKind
from airflow_mdbackup.scheme.history.usage import UsageChange
from airflow_mdbackup.scheme.store.mirror import Mirror

log = logging.getLogger(__name__)

STAGING = "staging"


def is_gone(tree: Tree, place: bytes) -> bool:
    """Whether nothing is at ``place``. False if that cannot be seen."""
    try:
        return tree.lstat(place) is None and tree.blocker(place) is None
    except OSError as error:
        if not concerns_one_file(error):
            raise
        return False


def apply(
    mirror: Mirror,
    tree: Tree,
    path: Path,
    *,
    verified: bool,
    edits: Iterator[Change],
    missed: Callable[[Change, str], None],
    usage: UsageChange,
) -> Iterator[Change]:
    """Apply the changes in the history file ``path``, and yield those that the disk then shows.

    :param verified: whether the new content was seen to be whole since the last crash. If not, it is hashed.
    :param edits: manual edits of the index, which history records before all other changes.
    :param missed: called with each change that could not be applied, and why.
    :param usage: adds up what the changes add to the disk.
    """
    with _open_new_content(mirror, path) as new:
        timer, taken = ReportTimer(), Prefixes()
        for number, change in enumerate(read_records(path, Change), 1):
            if timer.due():
                log.info("%s changes applied so far", number)
            if change.what != ChangeKind.EDITED:
                yield from edits
            taken.advance(change.path)
            problem = _try(tree, change, new, verified, taken)
            if _takes_place(tree, change, done=problem is None):
                taken.push(change.path)
            if problem is None:
                usage.add(tree, change)
                yield msgspec.structs.replace(change, content=None, replaces=None)
            else:
                missed(change, problem)
                if change.replaces is not None:
                    yield _not_replaced(tree, change, change.replaces)
        yield from edits


def warn_of_missed(change: Change, why: str) -> None:
    log.warning("%s: change not applied (%s); the next run retries", to_text(change.path), why)


def reason_of(error: Exception) -> str:
    """Return why one file could not be put into the mirror."""
    if isinstance(error, PathBlocked):
        what = "a symlink" if error.is_symlink else "not a directory"
        return f"{to_text(error.at)} is {what} in the mirror; replace it by a directory"
    return f"{error.strerror} on this side" if isinstance(error, OSError) else str(error)


def _takes_place(tree: Tree, change: Change, *, done: bool) -> bool:
    """Whether entries at or below the path of a change cannot stay after it."""
    if change.what == ChangeKind.MOVED:  # or somebody removed it, so that something else can be put there
        return done or is_gone(tree, change.path)
    return done and change.what in (ChangeKind.ADDED, ChangeKind.REPLACED, ChangeKind.ADOPTED)


def _not_replaced(tree: Tree, change: Change, md5: bytes) -> Change:
    """Return what becomes of an entry with this md5 which a change was to replace, but did not.

    It has left the index. It returns if the live file still has that md5; if not, the next run pulls the
    file. An entry that was only to make room for another one returns as it was.
    """
    path = change.path
    if change.what == ChangeKind.FORGOTTEN:
        return Change(path, ChangeKind.KEPT, md5=md5)
    try:
        with tree.opened(path) as live:
            is_there = md5_of(live) == md5
    except OSError as error:
        if not concerns_one_file(error):
            raise
        is_there = False
    return (
        Change(path, ChangeKind.KEPT, md5=md5)
        if is_there
        else Change(path, ChangeKind.FORGOTTEN, old_md5=md5)
    )


class _NewContent(NamedTuple):
    """Where new bytes wait for the commit: in staging, or as copies in the run's directory."""

    staging: Folder
    copies: Folder | None
    copies_path: Path

    def find(self, change: Change) -> tuple[Folder | None, bytes]:
        """Return the folder and the name in it of what a change adds; no folder if nothing is waiting."""
        if change.content is None:
            return None, b""
        if change.content == STAGING:
            return self.staging, change.md5 or b""
        return self.copies, change.content.encode()

    def import_source(self, change: Change) -> Path | None:
        """Return the file that is to become an imported version; None if it is no longer waiting."""
        if change.content is None:
            return None
        if change.content.startswith("/"):
            path = Path(os.fsdecode(from_text(change.content)))
        else:
            path = self.copies_path / change.content
        return path if path.is_file() and not path.is_symlink() else None


@contextmanager
def _open_new_content(mirror: Mirror, path: Path) -> Iterator[_NewContent]:
    """Open where the changes in the history file ``path`` find their content."""
    copies = mirror.run(str(read_header(path)["run_id"])).copies
    with ExitStack() as stack:
        staging = stack.enter_context(mirror.open_staging())
        folder = stack.enter_context(Folder(copies)) if copies.exists() else None
        yield _NewContent(staging, folder, copies)


def _try(tree: Tree, change: Change, new: _NewContent, verified: bool, taken: Prefixes) -> str | None:
    """Apply one change, unless the disk shows it already; return why it is not applied, or None."""
    try:
        if _apply_one(tree, change, new, verified, taken):
            return None
    except OSError as error:
        if not concerns_one_file(error):
            raise
        return reason_of(error)
    return "nothing took its place" if change.what == ChangeKind.FORGOTTEN else "its content is gone"


def _apply_one(tree: Tree, change: Change, new: _NewContent, verified: bool, taken: Prefixes) -> bool:
    """Return whether the disk shows the change now.

    :param taken: the places that earlier changes have taken from entries that make room for them.
    """
    match change.what:
        case ChangeKind.FORGOTTEN:
            return change.replaces is None or taken.above(change.path) is not None
        case ChangeKind.EDITED:
            return True
        case ChangeKind.MOVED:
            assert change.version is not None
            return tree.move_again(change.path, change.version)
        case ChangeKind.IMPORTED:
            return _import(tree, change, new, verified)
    return _put_live(tree, change, *new.find(change), verified)


def _import(tree: Tree, change: Change, new: _NewContent, verified: bool) -> bool:
    """Move an old version to its place, never over another file; return whether it is there then."""
    assert change.version is not None and change.old_md5 is not None
    source = new.import_source(change)
    if source is not None:
        name = os.fsencode(source.name)
        with Folder(source.parent) as folder:
            if is_file(tree.lstat(change.version)):
                tree.drop_rest(folder, name, change.version)
            if tree.lstat(change.version) is None:
                if not (verified or folder.is_whole(name, change.old_md5)):
                    return False  # it has changed since
                tree.put_new(folder, name, change.version)
                tree.give(change.version)
                return True
    try:
        tree.give(change.version)
        with tree.opened(change.version) as version:
            return (verified and source is None) or md5_of(version) == change.old_md5
    except FileNotFoundError:
        return False


def _put_live(tree: Tree, change: Change, folder: Folder | None, name: bytes, verified: bool) -> bool:
    """Make the live file what ``change`` says, from the file ``name`` of ``folder`` if it waits there."""
    adopts = change.what == ChangeKind.ADOPTED
    try:
        # After a power cut the new file may exist by name only, or in part.
        if not adopts and folder and (verified or folder.is_whole(name, change.md5 or b"")):
            _set_attributes(name, folder.descriptor, change)
            tree.put(folder, name, change.path)
            return True
    except FileNotFoundError:
        pass
    try:
        with tree.opened(change.path) as live:
            if not (verified and adopts) and md5_of(live) != change.md5:
                return False
            if adopts:
                _set_attributes(live, None, change)
    except FileNotFoundError:
        return False
    if folder is not None:
        folder.remove(name)
    return True


def _set_attributes(target: bytes | int, directory: int | None, change: Change) -> None:
    """Give a file, by name or open descriptor, the provider's mode and time where they are known."""
    now = os.stat(target, dir_fd=directory)
    # An adopted file may belong to another user, and its time may be finer than seconds.
    if change.mode is not None and stat.S_IMODE(now.st_mode) != permissions(change.mode):
        os.chmod(target, permissions(change.mode), dir_fd=directory)
    if change.mtime is not None and seconds(now) != change.mtime:
        os.utime(target, (change.mtime, change.mtime), dir_fd=directory)
