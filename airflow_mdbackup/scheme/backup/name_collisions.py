"""Finds names that the consumer's file system cannot tell apart, for example ignoring case (policy row 18).

::

    probe     whether the file system takes any two names for one; most do not, and need nothing more
    new       create the paths that the run would add as a tree of files in its directory, each containing its
              path; if a name exists already, the file says which path has it
    existing  look up the paths that stay in the consumer index in that tree

So the file system itself decides which names are different, by whatever rule. The path that was there first
keeps its file; the other one fails. A path whose twin leaves the index in the same run (``Readme`` became
``README``) does not collide: it takes over the file as its own, whose old bytes become its version.

Two names of a directory do not collide as long as the files in it have different names; the directory keeps
the spelling of the first path.

Limitations: the file system is probed once, in the run's directory. A directory of the mirror that alone
ignores case is not noticed. Under FUSE the kernel caches names for a second, and lowntfs-3g (``ignore_case``)
for longer: a file just replaced under one name may still appear as the old one under the other. So a file
whose bytes change in one run, and whose case changes in the next, may lose the version in between.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.common.sorted_paths import SortedLookup
from airflow_mdbackup.scheme.files.content import write_all
from airflow_mdbackup.scheme.files.jsonl import read_records
from airflow_mdbackup.scheme.files.syscalls import (
    concerns_one_file,
    is_file,
    make_directory,
    make_new_directory,
)
from airflow_mdbackup.scheme.files.tree import PathBlocked, Tree, remove_tree
from airflow_mdbackup.scheme.history.forget import ForgottenEntry
from airflow_mdbackup.scheme.index.canonical import Entry, read_entries
from airflow_mdbackup.scheme.store.run import Run
from airflow_mdbackup.scheme.store.version_names import OLD

_MAX_CACHED = 100_000  # names
_MAX_OLD = 40  # bytes of a name that a file system may take for .old
# A name, and others that some file systems take for it. It is long, in case names are truncated.
_NAME = "/Probe \N{LATIN SMALL LETTER E WITH ACUTE}"
_LONG = "n" * 230
_TWINS = (
    "/probe \N{LATIN SMALL LETTER E WITH ACUTE}" + _LONG,
    "/Probe \N{LATIN CAPITAL LETTER E WITH ACUTE}" + _LONG,
    "/Probe e\N{COMBINING ACUTE ACCENT}" + _LONG,
    _NAME + _LONG + ".",
    _NAME + _LONG + " ",
    _NAME + _LONG[1:] + "m",
)


def find_collisions(
    run: Run, coming: Iterable[bytes], current_index: Callable[[], Path | None]
) -> dict[bytes, bytes]:
    """Return which new paths cannot be told from another path, with that path.

    :param coming: paths that the run would put in place, in path order.
    :param current_index: returns the consumer index in canonical form, if there is one; called if needed.
    :raises OSError: the disk is full or broken.
    """
    with Tree(run.folder) as folder:
        if not _folds(folder):
            return {}
    current = current_index()
    remove_tree(run.names)
    make_new_directory(run.names)
    try:
        with Tree(run.names) as names:
            found = dict[bytes, bytes]()
            with _ReservedNames(run) as reserved:
                found |= _collide_among_new(names, reserved.filter(_new(coming, current), found))
            for path, _ in _remaining_entries(run, current):
                for new in _paths_at(names, path):
                    if not _gives_way(new, path):
                        found.setdefault(new, path)
        return found
    finally:
        remove_tree(run.names)


def explain_collision(other: bytes) -> str:
    """Return why a path fails that collides with ``other``, and what to do."""
    if other.endswith(b"/" + OLD):
        return (
            f"this side's file system takes its name for {to_text(other)}, which is for versions; rename or "
            "exclude it, or use a dest on a file system that can tell the two names apart"
        )
    return (
        f"it and {to_text(other)} are one file on this side's file system, which cannot tell the two names "
        "apart; rename or exclude one of them, or use a dest on a file system that can"
    )


class _ReservedNames:
    """Finds names that the file system takes for ``.old``, which is for versions. A context manager."""

    def __init__(self, run: Run) -> None:
        self._folder = run.folder / "reserved"
        make_directory(self._folder)
        self._tree = Tree(self._folder)
        with suppress(FileExistsError):  # after a kill
            os.close(self._tree.create(b"/" + OLD))
        self._is_old_cached: dict[bytes, bool] = {OLD: False}  # .old itself is refused elsewhere

    def __enter__(self) -> _ReservedNames:
        return self

    def __exit__(self, *error: object) -> None:
        self._tree.close()
        remove_tree(self._folder)

    def filter(self, paths: Iterable[bytes], found: dict[bytes, bytes]) -> Iterator[bytes]:
        """Yield the paths without such a name; add the others to ``found``, with what they collide with."""
        for path in paths:
            directory = b""
            for name in path.split(b"/")[1:]:
                if self._is_old(name):
                    found[path] = directory + b"/" + OLD
                    break
                directory += b"/" + name
            else:
                yield path

    def _is_old(self, name: bytes) -> bool:
        if len(name) > _MAX_OLD:
            return False
        if len(self._is_old_cached) > _MAX_CACHED:
            self._is_old_cached = {OLD: False}
        if name not in self._is_old_cached:
            self._is_old_cached[name] = self._tree.lstat(b"/" + name) is not None
        return self._is_old_cached[name]


def _folds(tree: Tree) -> bool:
    """Whether the file system takes any two names for one."""
    # A file system that supports only ASCII may refuse the first name.
    for name, twins in ((_NAME + _LONG, _TWINS), ("/Probe", ("/probe",))):
        probe = name.encode()
        try:
            with suppress(FileExistsError):  # after a kill
                os.close(tree.create(probe))
        except OSError as error:
            if not concerns_one_file(error):
                raise
            continue
        folds = any(tree.lstat(twin.encode()) for twin in twins)
        tree.unlink(probe)
        return folds
    return False


def _new(coming: Iterable[bytes], current: Path | None) -> Iterator[bytes]:
    index = SortedLookup(read_entries(current) if current else iter(()))
    return (path for path in coming if index.find(path) is None)


def _remaining_entries(run: Run, current: Path | None) -> Iterator[Entry]:
    leaving = SortedLookup(read_records(run.forget, ForgottenEntry))
    for entry in read_entries(current) if current else ():
        left = leaving.find(entry.path)
        if left is None or left.md5 != entry.md5:
            yield entry


def _collide_among_new(names: Tree, paths: Iterable[bytes]) -> dict[bytes, bytes]:
    """Create the names of ``paths``, and return those that collide with an earlier one."""
    found: dict[bytes, bytes] = {}
    for path in paths:
        try:
            descriptor = names.create(path)
        except (FileExistsError, PathBlocked):
            # None, if only a directory was created for a path that was then refused.
            found.update((path, other) for other in _paths_at(names, path)[:1])
        except OSError as error:
            if not concerns_one_file(error):
                raise
            # The mirror will refuse that name too, and say why.
        else:
            try:
                write_all(descriptor, path)
            finally:
                os.close(descriptor)
    return found


def _paths_at(names: Tree, path: bytes) -> list[bytes]:
    """Return the new paths in the place of ``path``: its twin, or what is above or below that."""
    try:
        blocked = names.blocker(path)
        at = blocked.at if blocked else path
        there = names.lstat(at)
        if there is None:
            return []
        return (
            [_path_in(names, at)] if is_file(there) else [_path_in(names, p) for p in names.files_below(at)]
        )
    except OSError as error:
        if not concerns_one_file(error):
            raise
        return []


def _path_in(names: Tree, path: bytes) -> bytes:
    with names.opened(path) as descriptor:
        return os.read(descriptor, 1 << 16)


def _gives_way(new: bytes, path: bytes) -> bool:
    """Whether one is a directory of the other by its exact name, so that it moves away (policy row 10)."""
    return new.startswith(path + b"/") or path.startswith(new + b"/")
