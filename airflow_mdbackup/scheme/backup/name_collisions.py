"""Names that the consumer's file system cannot hold apart, because it folds case, say (policy row 18).

::

    asked   a probe tells whether it takes two names for one at all; the usual ones do not, and pay no more
    new     the paths that a run would add are made, as empty trees of names, in its directory; a name that
            is there already is another's, whose path it holds
    there   the paths that stay in the consumer index are looked for among them

The file system itself says so what it holds apart, by whatever rule. The path that was there first keeps its
file; the other one fails. A path whose twin leaves the index in the same run (``Readme`` became ``README``)
has no twin: it takes the file over as if that had been its own, so that the old bytes become a version of it.

Two names of one directory are no clash while the files in it have different names; the disk spells it as the
first path did.

What this does not give: the file system is asked once, where the run's directory lies. One directory of the
mirror that alone folds case is not found out. Under FUSE the kernel remembers names for a second, lowntfs-3g
(``ignore_case``) itself for longer: what was just replaced under one name may still be the old file under the
other, so that a file which changes its bytes in one run, and its case in the next, may lose the version in
between.
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

_MOST_KNOWN = 100_000  # names
_LONGEST_OLD = 40  # bytes of a name that some file system may take for .old
# A name, and others that one file system or another takes for it. It is long, in case names are cut off.
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


def clashes(
    run: Run, coming: Iterable[bytes], current_index: Callable[[], Path | None]
) -> dict[bytes, bytes]:
    """Return which of the paths that a run brings cannot be told from another, and from which.

    :param coming: paths that the run would put in place, in path order.
    :param current_index: gives the consumer index in canonical form, if there is one; called if need be.
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
            with _Reserved(run) as reserved:
                found |= _among_new(names, reserved.let_through(_new(coming, current), found))
            for path, _ in _staying(run, current):
                for new in _holders(names, path):
                    if not _may_share(new, path):
                        found.setdefault(new, path)
        return found
    finally:
        remove_tree(run.names)


def reason(other: bytes) -> str:
    """Return why a path fails that clashes with ``other``, and what to do."""
    if other.endswith(b"/" + OLD):
        return (
            f"this side's file system takes its name for {to_text(other)}, where versions lie; rename or "
            "exclude it, or use a dest on a file system that holds the two names apart"
        )
    return (
        f"it and {to_text(other)} are one file on this side's file system, which cannot hold the two names "
        "apart; rename or exclude one of them, or use a dest on a file system that can"
    )


class _Reserved:
    """Tells names that the file system takes for ``.old``, which is for versions. A context manager."""

    def __init__(self, run: Run) -> None:
        self._folder = run.folder / "reserved"
        make_directory(self._folder)
        self._tree = Tree(self._folder)
        with suppress(FileExistsError):  # after a kill
            os.close(self._tree.create(b"/" + OLD))
        self._known: dict[bytes, bool] = {OLD: False}  # which is never among them

    def __enter__(self) -> _Reserved:
        return self

    def __exit__(self, *error: object) -> None:
        self._tree.close()
        remove_tree(self._folder)

    def let_through(self, paths: Iterable[bytes], found: dict[bytes, bytes]) -> Iterator[bytes]:
        """Yield the paths without such a name; the others come into ``found``, with what they clash with."""
        for path in paths:
            before = b""
            for name in path.split(b"/")[1:]:
                if self._is_old(name):
                    found[path] = before + b"/" + OLD
                    break
                before += b"/" + name
            else:
                yield path

    def _is_old(self, name: bytes) -> bool:
        if len(name) > _LONGEST_OLD:
            return False
        if len(self._known) > _MOST_KNOWN:
            self._known = {OLD: False}
        if name not in self._known:
            self._known[name] = self._tree.lstat(b"/" + name) is not None
        return self._known[name]


def _folds(tree: Tree) -> bool:
    """Whether the file system takes any two names for one."""
    # A file system that knows ASCII only may refuse the first one.
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


def _staying(run: Run, current: Path | None) -> Iterator[Entry]:
    leaving = SortedLookup(read_records(run.forget, ForgottenEntry))
    for entry in read_entries(current) if current else ():
        left = leaving.find(entry.path)
        if left is None or left.md5 != entry.md5:
            yield entry


def _among_new(names: Tree, paths: Iterable[bytes]) -> dict[bytes, bytes]:
    """Make the names of ``paths``, and return those that cannot be told from an earlier one."""
    found: dict[bytes, bytes] = {}
    for path in paths:
        try:
            descriptor = names.create(path)
        except (FileExistsError, PathBlocked):
            # None, if a directory of the name is all that came of a path that was refused.
            found.update((path, other) for other in _holders(names, path)[:1])
        except OSError as error:
            if not concerns_one_file(error):
                raise
            # The mirror will refuse that name too, and says why.
        else:
            try:
                write_all(descriptor, path)
            finally:
                os.close(descriptor)
    return found


def _holders(names: Tree, path: bytes) -> list[bytes]:
    """Return the new paths that stand where ``path`` would: its twin, or what lies above or below one."""
    try:
        blocked = names.blocker(path)
        at = blocked.at if blocked else path
        there = names.lstat(at)
        if there is None:
            return []
        return (
            [_content(names, at)] if is_file(there) else [_content(names, p) for p in names.files_below(at)]
        )
    except OSError as error:
        if not concerns_one_file(error):
            raise
        return []


def _content(names: Tree, path: bytes) -> bytes:
    with names.opened(path) as descriptor:
        return os.read(descriptor, 1 << 16)


def _may_share(new: bytes, path: bytes) -> bool:
    """Whether one is a directory of the other by its very name, so that it makes way (policy row 10)."""
    return new.startswith(path + b"/") or path.startswith(new + b"/")
