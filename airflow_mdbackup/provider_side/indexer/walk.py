"""Directories and files below the sources, in the order of the raw bytes of their paths.

A directory's name is sorted with the slash behind it, so that the paths below it come where they belong.
"""

import os
import stat
from typing import Callable, Iterator, List, NamedTuple, Optional, Tuple

from airflow_mdbackup.provider_side.indexer.batch import BATCH_LINES
from airflow_mdbackup.provider_side.indexer.common import (
    GONE,
    MAX_LOGGED,
    MAX_NAME_BYTES,
    MAX_PATH_BYTES,
    OPEN_DIRECTORY,
    OPEN_PASSAGE,
    is_too_long,
    open_below,
    prefixes,
    printable,
    reason_of,
)
from airflow_mdbackup.provider_side.indexer.exclude import Excluded
from airflow_mdbackup.provider_side.indexer.lines import MUST_ESCAPE
from airflow_mdbackup.provider_side.indexer.place import Place
from airflow_mdbackup.provider_side.indexer.report import Report
from airflow_mdbackup.provider_side.indexer.request import Request


class Level(NamedTuple):
    """A directory that the walk is in."""

    path: bytes  # ends with a slash
    descriptor: int
    names: Iterator[bytes]  # in order; directories end with a slash
    identity: Tuple[int, int]  # device, inode
    escape: bool  # some name may need to be escaped in the index
    passage: bool = False  # on another filesystem: only the way to the sources below it is walked


class Walk:
    """Enters each directory below the sources, and reports the paths that it cannot read.

    `visit(level)` is called with the current directory being that of the level, first when it is entered, and
    again after each subdirectory. It consumes the names of files, and returns the first name of a directory,
    or nothing at the end.
    """

    def __init__(
        self,
        request: Request,
        root: int,
        place: Place,
        report: Report,
        excluded: Excluded,
        visit: Callable[[Level], bytes],
    ) -> None:
        self._sources = request.source
        self._one_file_system = request.one_file_system
        self._root = root
        self._place = place
        self._report = report
        self._excluded = excluded
        self._visit = visit
        self._skipped = 0

    def run(self) -> None:
        for start in sorted(self._starts()):
            self._run_from(start)

    def refuse(self, path: bytes, error: OSError) -> None:
        """Report a file or directory as unreadable, unless it is gone or excluded."""
        excluded = self._excluded.has_all_below if path.endswith(b"/") else self._excluded.has
        if error.errno in GONE:
            # Anything may be deleted during the walk, except a source.
            if (path.rstrip(b"/") or b"/") in self._sources:
                self._report.add_unreadable(path.rstrip(b"/") or b"/", "does not exist")
        elif not excluded(path):
            self._report.add_unreadable(path.rstrip(b"/") or b"/", reason_of(error))

    # The sources.

    def _starts(self) -> List[bytes]:
        """Return the sources that exist, each once, without those that lie in another."""
        found = {start for start in map(self._start_at, self._sources) if start is not None}
        directories = [start for start in found if start.endswith(b"/")]
        return [
            start for start in found if not any(start != top and start.startswith(top) for top in directories)
        ]

    def _start_at(self, source: bytes) -> Optional[bytes]:
        """Return a source, with a slash at the end if it is a directory; or None, after reporting why."""
        if source == b"/":
            return source
        directory = os.dup(self._root)
        mode = 0
        try:
            for prefix in prefixes(source):
                name = prefix.rsplit(b"/", 1)[1]
                mode = os.lstat(name, dir_fd=directory).st_mode
                if stat.S_ISLNK(mode):
                    what = "is a symlink" if prefix == source else "lies below a symlink"
                    self._report.add_unreadable(source, what)
                    return None
                if prefix != source:
                    below = os.open(name, OPEN_PASSAGE, dir_fd=directory)
                    os.close(directory)
                    directory = below
        except OSError as error:
            self._report.add_unreadable(source, "does not exist" if error.errno in GONE else reason_of(error))
            return None
        finally:
            os.close(directory)
        if stat.S_ISDIR(mode):
            return source + b"/"
        if stat.S_ISREG(mode):
            return source
        self._report.add_unreadable(source, "is neither a regular file nor a directory")
        return None

    # The directories below them.

    def _run_from(self, start: bytes) -> None:
        level = self._first_level(start)
        stack = [level] if level else []
        while stack:
            subdirectory = self._visit(stack[-1])
            if subdirectory:
                below = self._enter(stack, subdirectory)
                if below is not None:
                    stack.append(below)
                else:
                    os.fchdir(stack[-1].descriptor)
            else:
                os.close(stack.pop().descriptor)
                if stack:
                    os.fchdir(stack[-1].descriptor)

    def _first_level(self, start: bytes) -> Optional[Level]:
        """Enter a source, or the directory of a source that is a file; None if that fails."""
        folder, name = start.rsplit(b"/", 1)
        try:
            descriptor = open_below(self._root, folder)
            os.fchdir(descriptor)
        except OSError as error:
            self.refuse(start, error)
            return None
        if not name:
            return self._listed(start, descriptor)
        names = [] if self._is_own(folder + b"/", name) else [name]
        status = os.fstat(descriptor)
        escape = MUST_ESCAPE(start) is not None
        return Level(folder + b"/", descriptor, iter(names), (status.st_dev, status.st_ino), escape)

    def _enter(self, stack: List[Level], name: bytes) -> Optional[Level]:
        """Enter a subdirectory of the last level; None if it is not to be walked."""
        above = stack[-1]
        path = above.path + name
        if self._excluded.has_all_below(path) or self._is_own(above.path, name):
            return None
        descriptor = -1
        try:
            descriptor = os.open(name[:-1], OPEN_DIRECTORY)
            os.fchdir(descriptor)
            status = os.fstat(descriptor)
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            self.refuse(path, error)
            return None
        passage = (
            self._one_file_system
            and (above.passage or status.st_dev != above.identity[0])
            and path[:-1] not in self._sources
        )
        reason = ""
        if passage and not any(source.startswith(path) for source in self._sources):
            reason = "is on another filesystem"
        elif any(level.identity == (status.st_dev, status.st_ino) for level in stack):
            reason = "is mounted below itself"
        if reason:
            os.close(descriptor)
            self._skipped += 1
            if self._skipped <= MAX_LOGGED:
                self._report.note(f"{printable(path[:-1])} {reason}, skipped")
            return None
        return self._listed(path, descriptor, passage)

    def _listed(self, path: bytes, descriptor: int, passage: bool = False) -> Level:
        """List the directory that the walk has just entered."""
        names = self._names(path)
        if path == self._place.directory + b"/":
            names = [name for name in names if not self._place.is_own(name)]
        if passage:
            ways = [source + b"/" for source in self._sources]
            names = [
                name for name in names if any(way.startswith(path + name.rstrip(b"/") + b"/") for way in ways)
            ]
        names.sort()
        some = range(0, len(names), BATCH_LINES)
        escape = any(MUST_ESCAPE(path + b"".join(names[at : at + BATCH_LINES])) for at in some)
        status = os.fstat(descriptor)
        return Level(path, descriptor, iter(names), (status.st_dev, status.st_ino), escape, passage)

    def _names(self, path: bytes) -> List[bytes]:
        """Return the files and directories in the current directory, without those of too long names."""
        names: List[bytes] = []
        add = names.append
        try:
            with os.scandir(b".") as entries:
                for entry in entries:
                    if entry.is_file(follow_symlinks=False):
                        add(entry.name)
                    elif entry.is_dir(follow_symlinks=False):
                        add(entry.name + b"/")
        except OSError as error:
            self.refuse(path, error)
        longest = max(map(len, names)) if names else 0
        if longest <= MAX_NAME_BYTES and len(path) + longest <= MAX_PATH_BYTES:
            return names
        # No index can hold such a path itself, not even as unreadable.
        short = [name for name in names if not is_too_long(path + name.rstrip(b"/"))]
        if len(short) < len(names):
            self._report.add_unreadable(path.rstrip(b"/") or b"/", "a path or name in it is too long")
        return short

    def _is_own(self, folder: bytes, name: bytes) -> bool:
        return folder == self._place.directory + b"/" and self._place.is_own(name) is not None
