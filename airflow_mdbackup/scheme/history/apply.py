"""Changes that were written ahead are applied to the files of the mirror, one by one.

Each may be applied again after a crash. The disk shows how far it came: content that still waits, whole, is
put in place; where none waits, the live file must have the new md5, or else that change did not happen.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import msgspec

from airflow_mdbackup.scheme.common.paths import from_text, to_text
from airflow_mdbackup.scheme.common.progress import ReportTimer
from airflow_mdbackup.scheme.common.sorted_paths import Prefixes
from airflow_mdbackup.scheme.files.content import md5_of
from airflow_mdbackup.scheme.files.jsonl import read_header, read_records
from airflow_mdbackup.scheme.files.syscalls import concerns_one_file, is_file, permissions, seconds
from airflow_mdbackup.scheme.files.tree import Folder, PathBlocked, Tree
from airflow_mdbackup.scheme.history.changes import Change, ChangeKind
from airflow_mdbackup.scheme.history.usage import UsageChange
from airflow_mdbackup.scheme.store.mirror import Mirror

log = logging.getLogger(__name__)

STAGING = "staging"


def is_gone(tree: Tree, place: bytes) -> bool:
    """Whether nothing stands at ``place``, as far as that can be seen."""
    try:
        return tree.lstat(place) is None and tree.blocker(place) is None
    except OSError as error:
        if not concerns_one_file(error):
            raise
        return False


# --- the files --------------------------------------------------------------------------------------


def apply(
    mirror: Mirror,
    tree: Tree,
    path: Path,
    fresh: bool,
    edited: Iterator[Change],
    missed: Callable[[Change, str], None],
    tally: UsageChange,
) -> Iterator[Change]:
    """Carry out the changes, yield those that the disk then shows, and add up what they add to it."""
    with ExitStack() as stack:
        staging = stack.enter_context(mirror.open_staging())
        copies = mirror.run(str(read_header(path)["run_id"])).copies
        folder = stack.enter_context(Folder(copies)) if copies.exists() else None
        waiting = _Waiting(staging, folder, copies)
        pace, taken = ReportTimer(), Prefixes()
        for number, change in enumerate(read_records(path, Change), 1):
            if pace.due():
                log.info("%s changes carried out so far", number)
            if change.what != ChangeKind.EDITED:
                yield from edited
            taken.advance(change.path)
            try:
                done = _carry_out(tree, change, waiting, fresh, taken)
                why = (
                    "its content is gone" if change.what != ChangeKind.FORGOTTEN else "nothing took its place"
                )
            except OSError as error:
                if not concerns_one_file(error):
                    raise
                done, why = False, reason_of(error)
            if _takes_place(tree, change, done):
                taken.push(change.path)
            if done:
                tally.add(tree, change)
                yield msgspec.structs.replace(change, content=None, replaces=None)
            else:
                missed(change, why)
                if change.replaces is not None:
                    yield _unreplaced(tree, change, change.replaces)
        yield from edited


def _takes_place(tree: Tree, change: Change, done: bool) -> bool:
    """Whether entries at or below the path of a change cannot stay after it."""
    if change.what == ChangeKind.MOVED:  # or somebody has taken it away, so that something else can come
        return done or is_gone(tree, change.path)
    return done and change.what in (ChangeKind.ADDED, ChangeKind.REPLACED, ChangeKind.ADOPTED)


def _unreplaced(tree: Tree, change: Change, md5: bytes) -> Change:
    """Return what becomes of an entry that had this md5, and that a change was to replace, but did not.

    It has left the index, and comes back if the live file still is what it says; else a run sees to it. One
    that was only to give way comes back as it was.
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


def warn_of_missed(change: Change, why: str) -> None:
    log.warning(
        "It did not come to the change of %s (%s); the next run sees to it", to_text(change.path), why
    )


def reason_of(error: Exception) -> str:
    """Return why one file could not be brought into the mirror."""
    if isinstance(error, PathBlocked):
        what = "a symlink" if error.is_symlink else "no directory"
        return f"{to_text(error.at)} is {what} in the mirror; replace it by a directory"
    return f"{error.strerror} on this side" if isinstance(error, OSError) else str(error)


class _Waiting(NamedTuple):
    """Where the new bytes wait: in staging, or as copies."""

    staging: Folder
    copies: Folder | None
    copies_path: Path

    def content(self, change: Change) -> tuple[Folder | None, bytes]:
        """Return the folder and the name in it of what a change brings; no folder if nothing waits."""
        if change.content is None:
            return None, b""
        if change.content == STAGING:
            return self.staging, change.md5 or b""
        return self.copies, change.content.encode()

    def source(self, change: Change) -> Path | None:
        """Return the file that is to become an imported version; None if it waits no more."""
        if change.content is None:
            return None
        if change.content.startswith("/"):
            path = Path(os.fsdecode(from_text(change.content)))
        else:
            path = self.copies_path / change.content
        return path if path.is_file() and not path.is_symlink() else None


def _carry_out(tree: Tree, change: Change, waiting: _Waiting, fresh: bool, taken: Prefixes) -> bool:
    """Bring one change about, if the disk does not show it already; return whether it does then.

    :param taken: the places that changes before it have taken, from entries that give way.
    """
    if change.what == ChangeKind.FORGOTTEN and change.replaces is not None:
        return taken.above(change.path) is not None
    if change.what in (ChangeKind.EDITED, ChangeKind.FORGOTTEN):
        return True
    if change.what == ChangeKind.MOVED:
        return _move(tree, change)
    if change.what == ChangeKind.IMPORTED:
        return _import(tree, change, waiting, fresh)
    return _place(tree, change, *waiting.content(change), fresh)


def _move(tree: Tree, change: Change) -> bool:
    assert change.version is not None
    return tree.move_again(change.path, change.version)


def _import(tree: Tree, change: Change, waiting: _Waiting, fresh: bool) -> bool:
    """Bring an old version to its place, never over another file; return whether it is there then."""
    assert change.version is not None and change.old_md5 is not None
    source = waiting.source(change)
    if source is not None:
        name = os.fsencode(source.name)
        with Folder(source.parent) as folder:
            if is_file(tree.lstat(change.version)):
                tree.drop_rest(folder, name, change.version)
            if tree.lstat(change.version) is None:
                if not (fresh or folder.is_whole(name, change.old_md5)):
                    return False  # it has changed since
                tree.put_new(folder, name, change.version)
                tree.give(change.version)
                return True
    try:
        tree.give(change.version)
        with tree.opened(change.version) as version:
            return (fresh and source is None) or md5_of(version) == change.old_md5
    except FileNotFoundError:
        return False


def _place(tree: Tree, change: Change, folder: Folder | None, name: bytes, fresh: bool) -> bool:
    """Make the live file what ``change`` says, from the file ``name`` of ``folder`` if that still waits."""
    try:
        # After a power cut the new bytes may be there by name only, or in part.
        if (
            change.what != ChangeKind.ADOPTED
            and folder
            and (fresh or folder.is_whole(name, change.md5 or b""))
        ):
            _give_attributes(name, folder.descriptor, change)
            tree.put(folder, name, change.path)
            return True
    except FileNotFoundError:
        pass
    try:
        with tree.opened(change.path) as live:
            if not (fresh and change.what == ChangeKind.ADOPTED) and md5_of(live) != change.md5:
                return False
            if change.what == ChangeKind.ADOPTED:
                _give_attributes(live, None, change)
    except FileNotFoundError:
        return False
    if folder is not None:
        folder.remove(name)
    return True


def _give_attributes(target: bytes | int, directory: int | None, change: Change) -> None:
    """Give a file, by name or by open descriptor, the provider's mode and time where they are known."""
    now = os.stat(target, dir_fd=directory)
    # Who adopts a file need not be its owner, and its time may be finer than seconds.
    if change.mode is not None and stat.S_IMODE(now.st_mode) != permissions(change.mode):
        os.chmod(target, permissions(change.mode), dir_fd=directory)
    if change.mtime is not None and seconds(now) != change.mtime:
        os.utime(target, (change.mtime, change.mtime), dir_fd=directory)
