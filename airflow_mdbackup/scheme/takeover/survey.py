"""TODO"""

from __future__ import annotations

import os
import sqlite3
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from airflow_mdbackup.scheme.common.parallel import parallel_map
from airflow_mdbackup.scheme.errors import DestinationBusy
from airflow_mdbackup.scheme.files.content import md5_of
from airflow_mdbackup.scheme.files.syscalls import concerns_one_file, open_for_owner
from airflow_mdbackup.scheme.files.tree import Tree, TreePerThread
from airflow_mdbackup.scheme.history.changes import Change, ChangeKind
from airflow_mdbackup.scheme.index.canonical import IndexWriter, check_path, read_entries
from airflow_mdbackup.scheme.store.version_names import OLD

_PAGE = 1000  # files that are taken from the table at a time
_SHOWN = 5  # paths that are named of each kind that is left


class SkipReason(StrEnum):
    """Why something of a tree is not adopted."""

    SYMLINK = "symlink"
    SPECIAL = "special"  # a device, a fifo, a socket
    RESERVED = "reserved"  # a directory that has the name of those with versions, with all in it
    BLOCKING = "in the place of versions"  # something else that has that name
    BAD_NAME = "bad name"  # no index can hold it
    UNREADABLE = "unreadable"  # for us
    MOVING = "moving"  # it changed, or went, while it was hashed
    MOUNTED = "mounted"  # on another file system, to which nothing can be moved in one step
    EMPTY = "empty directory"
    PASSED_OVER = "passed over"  # the caller says so

    @property
    def harmless(self) -> bool:
        """Whether a backup has no such thing anyway, or another command takes it."""
        harmful = (
            SkipReason.BLOCKING,
            SkipReason.BAD_NAME,
            SkipReason.UNREADABLE,
            SkipReason.MOVING,
            SkipReason.MOUNTED,
        )
        return self not in harmful


@dataclass(frozen=True, slots=True)
class SourceTree:
    """A tree: ``directory`` is, or becomes, the mirror's ``at``, without a slash at its end."""

    directory: Path
    at: bytes = b""


@dataclass(slots=True)
class SurveyReport:
    """What a survey has to tell beside the files.

    :ivar left: how much of each kind is not adopted, and the first few paths of it.
    :ivar others: files and directories that belong to another user than this process.
    :ivar linked: files with more names than one.
    """

    left: Counter[SkipReason] = field(default_factory=Counter)
    examples: dict[SkipReason, list[bytes]] = field(default_factory=dict)
    others: int = 0
    linked: int = 0

    def leave(self, why: SkipReason, path: bytes) -> None:
        """Note that something is not adopted."""
        self.left[why] += 1
        shown = self.examples.setdefault(why, [])
        if len(shown) < _SHOWN:
            shown.append(path)


class SurveyedFile(NamedTuple):
    """A file of a survey, a row of its table. Times are nanoseconds; ``root`` is the number of the source."""

    path: bytes
    root: int
    inode: int
    size: int
    modified: int
    changed: int
    mode: int
    md5: bytes | None = None

    def is_as(self, status: os.stat_result) -> bool:
        now = status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        return now == (self.inode, self.size, self.modified, self.changed)


class Survey:
    """What lies in some trees. A context manager, for one thread.

    :param sources: none of them below another one's place.
    :param table: where it is kept, so that a crash does not lose what was hashed; None for nowhere.
    :param passes_over: tells of the path of a file that it is none of those that are looked for.
    :raises DestinationBusy: another survey keeps its table there.
    """

    def __init__(
        self,
        sources: Sequence[SourceTree],
        table: Path | None = None,
        passes_over: Callable[[bytes], bool] = lambda path: False,
    ) -> None:
        self.told = SurveyReport()
        self._sources = sources
        self._passes_over = passes_over
        try:
            self._table = _opened(table)
        except sqlite3.DatabaseError as error:
            assert table is not None
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY:
                raise DestinationBusy(
                    f"{table}: another `mdbackup adopt` is at work there: wait for its end"
                ) from None
            # A power cut has spoilt it.
            for spoilt in table.parent.glob(f"{table.name}*"):
                spoilt.unlink()
            self._table = _opened(table)

    def __enter__(self) -> Survey:
        return self

    def __exit__(self, *error: object) -> None:
        self._table.close()

    # --- looking ------------------------------------------------------------------------------------

    def walk(self, advance: Callable[[], object] = lambda: None) -> None:
        """Look at everything, and forget what an earlier survey found that is there no more.

        :param advance: called for each file.
        :raises OSError: the disk fails as a whole.
        """
        self._table.execute("UPDATE file SET seen = 0")
        for number, source in enumerate(self._sources):
            for file in self._below(number, source):
                self._table.execute(_UPSERT, _row(file))
                advance()
        self._table.execute("DELETE FROM file WHERE NOT seen")
        self._table.commit()

    def _below(self, number: int, source: SourceTree) -> Iterator[SurveyedFile]:
        device = os.stat(source.directory).st_dev
        ahead = [b""]
        with Tree(source.directory) as tree:
            while ahead:
                folder = ahead.pop()
                try:
                    names = sorted(tree.names_in(folder))
                except OSError as error:
                    if not concerns_one_file(error):
                        raise
                    self.told.leave(SkipReason.UNREADABLE, source.at + folder or b"/")
                    continue
                if folder and not names:
                    self.told.leave(SkipReason.EMPTY, source.at + folder)
                for name in names:
                    below = folder + b"/" + name
                    status, why = self._looked_at(tree, below, source.at + below, device)
                    if why is not None or status is None:
                        self.told.leave(why or SkipReason.MOVING, source.at + below)
                    elif stat.S_ISDIR(status.st_mode):
                        ahead.append(below)
                    else:
                        self.told.linked += status.st_nlink > 1
                        yield SurveyedFile(
                            *(source.at + below, number, status.st_ino, status.st_size, status.st_mtime_ns),
                            *(status.st_ctime_ns, stat.S_IMODE(status.st_mode)),
                        )

    def _looked_at(
        self, tree: Tree, below: bytes, path: bytes, device: int
    ) -> tuple[os.stat_result | None, SkipReason | None]:
        """Return what stands at ``below`` in a tree, if anything still does, and why it is not adopted."""
        try:
            status = tree.lstat(below)
        except OSError as error:
            if not concerns_one_file(error):
                raise
            return None, SkipReason.UNREADABLE
        if status is None:
            return None, SkipReason.MOVING
        folder, _, name = below.rpartition(b"/")
        self.told.others += status.st_uid != os.geteuid()
        why = self._why_left(path, name, status, device)
        if why is None and name.startswith(b".") and _is_folded_old(tree, folder, status):
            why = SkipReason.RESERVED
        return status, why

    def _why_left(self, path: bytes, name: bytes, status: os.stat_result, device: int) -> SkipReason | None:
        is_directory = stat.S_ISDIR(status.st_mode)
        if name == OLD:
            return SkipReason.RESERVED if is_directory else SkipReason.BLOCKING
        if stat.S_ISLNK(status.st_mode):
            return SkipReason.SYMLINK
        if not is_directory and not stat.S_ISREG(status.st_mode):
            return SkipReason.SPECIAL
        if is_directory:
            return SkipReason.MOUNTED if status.st_dev != device else None
        try:
            check_path(path)
        except ValueError:
            return SkipReason.BAD_NAME
        return SkipReason.PASSED_OVER if self._passes_over(path) else None

    @property
    def files(self) -> int:
        """How many files there are to adopt."""
        return int(self._table.execute("SELECT count(*) FROM file").fetchone()[0])

    @property
    def size(self) -> int:
        """Their bytes."""
        return int(self._table.execute("SELECT total(size) FROM file").fetchone()[0])

    def hash(self, threads: int, advance: Callable[[int], None] = lambda size: None) -> None:
        """Hash each file that was not hashed yet.

        :param threads: how many at a time.
        :param advance: called with how many bytes more were read, in any thread.
        :raises OSError: the disk fails as a whole.
        """
        done = 0
        for source in self._sources:
            # Who has just copied it here may not know of a disk that refused some of it. From now on what is
            # hashed is what the disk has.
            with Tree(source.directory) as tree:
                tree.sync()
        with ExitStack() as stack:
            roots = [partial(Tree, source.directory) for source in self._sources]
            trees = [stack.enter_context(TreePerThread(root)) for root in roots]
            hash_one = partial(_hash, trees, [len(source.at) for source in self._sources], advance)
            for file, md5, why in parallel_map(self._unhashed(), hash_one, threads, lambda file: file.size):
                if md5 is None:
                    self._table.execute("DELETE FROM file WHERE path = ?", (file.path,))
                    self.told.leave(why, file.path)
                else:
                    self._table.execute("UPDATE file SET md5 = ? WHERE path = ?", (md5, file.path))
                done += 1
                if done % _PAGE == 0 or file.size > 100_000_000:
                    self._table.commit()
        self._table.commit()

    def _unhashed(self) -> Iterator[SurveyedFile]:
        return self.found("md5 IS NULL AND")

    def found(self, condition: str = "") -> Iterator[SurveyedFile]:
        """Yield the files in path order, while the table may be changed."""
        last = b""
        while True:
            rows = self._table.execute(
                "SELECT path, root, inode, size, modified, changed, mode, md5 FROM file "  # noqa: S608 - ours
                f"WHERE {condition} path > ? ORDER BY path LIMIT {_PAGE}",
                (last,),
            ).fetchall()
            if not rows:
                return
            for row in rows:
                yield _from_row(row)
            last = rows[-1][0]

    # --- telling ------------------------------------------------------------------------------------

    def write_index(self, path: Path) -> None:
        """Write the consumer index that an adoption would make."""
        with IndexWriter(path) as writer:
            for file in self.found():
                if file.md5 is not None:
                    writer.add(file.path, file.md5)

    def changes(self, tree: Tree) -> Iterator[Change]:
        """Yield what an adoption makes of the files, but for those that changed since they were hashed."""
        for file in self.found():
            there = tree.lstat(file.path)
            if there is None or not file.is_as(there):
                self.told.leave(SkipReason.MOVING, file.path)
            elif file.md5 is not None:
                mtime = file.modified // 10**9
                yield Change(
                    *(file.path, ChangeKind.ADOPTED),
                    md5=file.md5,
                    size=file.size,
                    mtime=mtime,
                    mode=file.mode,
                )


def _is_folded_old(tree: Tree, folder: bytes, status: os.stat_result) -> bool:
    """Whether the file system takes something in a folder, of another name, for the directory of versions."""
    old = tree.lstat(folder + b"/" + OLD)
    return old is not None and os.path.samestat(old, status)


def _row(file: SurveyedFile) -> tuple[Any, ...]:
    """Return a file as it is stored, but for its md5.

    Numbers that need more than the 63 bits of SQLite are texts: inodes of some network file systems, and
    nanoseconds from the year 2262 on.
    """
    inode, modified, changed = (b"%d" % number for number in (file.inode, file.modified, file.changed))
    return file.path, file.root, inode, file.size, modified, changed, file.mode


def _from_row(row: tuple[Any, ...]) -> SurveyedFile:
    path, root, inode, size, modified, changed, mode, md5 = row
    return SurveyedFile(path, root, int(inode), size, int(modified), int(changed), mode, md5)


def _opened(table: Path | None) -> sqlite3.Connection:
    if table is not None:  # what SQLite puts beside it belongs to its owner
        os.close(open_for_owner(table, os.O_RDWR | os.O_CREAT, 0o644))
    opened = sqlite3.connect(table or "", timeout=0)
    opened.execute("PRAGMA locking_mode = EXCLUSIVE")
    try:
        opened.execute("BEGIN EXCLUSIVE")  # and nobody else until it is closed
        opened.commit()
    except sqlite3.DatabaseError:
        opened.close()
        raise
    if opened.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
        opened.close()
        raise sqlite3.DatabaseError
    opened.execute(
        "CREATE TABLE IF NOT EXISTS file (path BLOB PRIMARY KEY, root INTEGER, inode BLOB, size INTEGER,"
        " modified BLOB, changed BLOB, mode INTEGER, md5 BLOB, seen INTEGER) WITHOUT ROWID"
    )
    return opened


# What was hashed before counts as long as the file is the same.
_UPSERT = """
INSERT INTO file VALUES (?, ?, ?, ?, ?, ?, ?, NULL, 1) ON CONFLICT (path) DO UPDATE SET
md5 = CASE WHEN inode = excluded.inode AND size = excluded.size AND modified = excluded.modified
AND changed = excluded.changed THEN md5 END,
root = excluded.root, inode = excluded.inode, size = excluded.size, modified = excluded.modified,
changed = excluded.changed, mode = excluded.mode, seen = 1
"""


def _hash(
    trees: list[TreePerThread], cut: list[int], advance: Callable[[int], None], file: SurveyedFile
) -> tuple[SurveyedFile, bytes | None, SkipReason]:
    """Return the md5 of a file, or why there is none. In any thread."""
    try:
        with trees[file.root]().opened(file.path[cut[file.root] :]) as descriptor:
            if file.is_as(os.fstat(descriptor)):
                md5 = md5_of(descriptor, progress=advance)
                if file.is_as(os.fstat(descriptor)):
                    return file, md5, SkipReason.MOVING
    except FileNotFoundError:
        pass
    except OSError as error:
        if not concerns_one_file(error):
            raise
        return file, None, SkipReason.UNREADABLE
    return file, None, SkipReason.MOVING


def is_in(index: Path) -> Callable[[bytes], bool]:
    """Return what tells of a path, asked in any order, whether a canonical index has it."""
    table = sqlite3.connect("")
    table.execute("CREATE TABLE entry (path BLOB PRIMARY KEY) WITHOUT ROWID")
    entries = read_entries(index)
    while rows := [(entry.path,) for entry in islice(entries, _PAGE)]:
        table.executemany("INSERT INTO entry VALUES (?)", rows)
    return lambda path: table.execute("SELECT 1 FROM entry WHERE path = ?", (path,)).fetchone() is not None
