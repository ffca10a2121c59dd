"""The files of trees that are to become a mirror, or versions in it: found, examined and hashed."""

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
from operator import attrgetter
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

_PAGE = 1000  # files read from the table at a time
_MAX_EXAMPLES = 5  # paths named per reason to skip


class SkipReason(StrEnum):
    """Why something in a tree is skipped."""

    SYMLINK = "symlink"
    SPECIAL = "special"  # a device, a named pipe, a socket
    RESERVED = "reserved"  # a directory with the name of those for versions, with everything in it
    BLOCKING = "in the place of versions"  # something else with that name
    BAD_NAME = "bad name"  # no index can hold it
    UNREADABLE = "unreadable"  # for us
    MOVING = "moving"  # it changed or disappeared while it was examined
    MOUNTED = "mounted"  # on another file system, to which nothing can be moved in one step
    EMPTY = "empty directory"
    PASSED_OVER = "passed over"  # the caller does not want it

    @property
    def harmless(self) -> bool:
        """Whether no backup has such a thing anyway, or another command imports it."""
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
    """A tree: ``directory`` is, or becomes, the mirror's path ``at``, which has no slash at its end."""

    directory: Path
    at: bytes = b""


@dataclass(slots=True)
class SurveyReport:
    """What a survey found beside the files.

    :ivar skipped: how many things were skipped for each reason.
    :ivar examples: the first few paths of them.
    :ivar foreign: files and directories owned by another user than that of this process.
    :ivar hard_linked: files with more than one name.
    """

    skipped: Counter[SkipReason] = field(default_factory=Counter)
    examples: dict[SkipReason, list[bytes]] = field(default_factory=dict)
    foreign: int = 0
    hard_linked: int = 0

    def skip(self, reason: SkipReason, path: bytes) -> None:
        """Record that something is skipped."""
        self.skipped[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _MAX_EXAMPLES:
            examples.append(path)


class SurveyedFile(NamedTuple):
    """A file of a survey, and a row of its table. Times are in nanoseconds.

    :ivar root: index of its source.
    """

    path: bytes
    root: int
    inode: int
    size: int
    modified: int
    changed: int
    mode: int
    md5: bytes | None = None

    def matches(self, status: os.stat_result) -> bool:
        """Whether the file is unchanged since it was examined."""
        now = status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        return now == (self.inode, self.size, self.modified, self.changed)


class Survey:
    """The files in some trees. A context manager, for one thread.

    :param sources: none of them below the place of another.
    :param table: a file to keep the results in, so that a crash does not lose hashes; None to keep none.
    :param ignores: whether the file at a path is not wanted.
    :ivar report: what was found beside the files.
    :raises DestinationBusy: another survey is using the table.
    """

    def __init__(
        self,
        sources: Sequence[SourceTree],
        table: Path | None = None,
        ignores: Callable[[bytes], bool] = lambda path: False,
    ) -> None:
        self.report = SurveyReport()
        self._sources = sources
        self._ignores = ignores
        try:
            self._table = _open_table(table)
        except sqlite3.DatabaseError as error:
            assert table is not None
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY:
                raise DestinationBusy(
                    f"{table}: another `mdbackup adopt` is running there: wait until it has finished"
                ) from None
            # A power failure has corrupted it.
            for corrupted in table.parent.glob(f"{table.name}*"):
                corrupted.unlink()
            self._table = _open_table(table)

    def __enter__(self) -> Survey:
        return self

    def __exit__(self, *error: object) -> None:
        self._table.close()

    # --- walking ------------------------------------------------------------------------------------

    def walk(self, advance: Callable[[], object] = lambda: None) -> None:
        """Examine everything, and forget files from an earlier survey that no longer exist.

        :param advance: called for each file.
        :raises OSError: the whole disk fails.
        """
        self._table.execute("UPDATE file SET seen = 0")
        for number, source in enumerate(self._sources):
            for file in self._walk_source(number, source):
                self._table.execute(_UPSERT, _row(file))
                advance()
        self._table.execute("DELETE FROM file WHERE NOT seen")
        self._table.commit()

    def _walk_source(self, number: int, source: SourceTree) -> Iterator[SurveyedFile]:
        device = os.stat(source.directory).st_dev
        ahead = [b""]
        with Tree(source.directory) as tree:
            while ahead:
                folder = ahead.pop()
                for name in self._list(tree, source, folder):
                    place = folder + b"/" + name
                    path = source.at + place
                    status, reason = self._examine(tree, place, path, device)
                    if reason is not None or status is None:
                        self.report.skip(reason or SkipReason.MOVING, path)
                    elif stat.S_ISDIR(status.st_mode):
                        ahead.append(place)
                    else:
                        self.report.hard_linked += status.st_nlink > 1
                        yield SurveyedFile(
                            *(path, number, status.st_ino, status.st_size, status.st_mtime_ns),
                            *(status.st_ctime_ns, stat.S_IMODE(status.st_mode)),
                        )

    def _list(self, tree: Tree, source: SourceTree, folder: bytes) -> list[bytes]:
        """Return the names in a directory, sorted; none if it cannot be listed."""
        try:
            names = sorted(tree.names_in(folder))
        except OSError as error:
            if not concerns_one_file(error):
                raise
            self.report.skip(SkipReason.UNREADABLE, source.at + folder or b"/")
            return []
        if folder and not names:
            self.report.skip(SkipReason.EMPTY, source.at + folder)
        return names

    def _examine(
        self, tree: Tree, place: bytes, path: bytes, device: int
    ) -> tuple[os.stat_result | None, SkipReason | None]:
        """Return the status of what is at a place in a tree, if it still exists, and why it is skipped."""
        try:
            status = tree.lstat(place)
        except OSError as error:
            if not concerns_one_file(error):
                raise
            return None, SkipReason.UNREADABLE
        if status is None:
            return None, SkipReason.MOVING
        folder, _, name = place.rpartition(b"/")
        self.report.foreign += status.st_uid != os.geteuid()
        reason = self._reason_to_skip(path, name, status, device)
        if reason is None and name.startswith(b".") and _is_folded_old(tree, folder, status):
            reason = SkipReason.RESERVED
        return status, reason

    def _reason_to_skip(
        self, path: bytes, name: bytes, status: os.stat_result, device: int
    ) -> SkipReason | None:
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
        return SkipReason.PASSED_OVER if self._ignores(path) else None

    @property
    def files(self) -> int:
        """How many files there are."""
        return int(self._table.execute("SELECT count(*) FROM file").fetchone()[0])

    @property
    def size(self) -> int:
        """Their bytes."""
        return int(self._table.execute("SELECT total(size) FROM file").fetchone()[0])

    # --- hashing ------------------------------------------------------------------------------------

    def hash(self, threads: int, advance: Callable[[int], None] = lambda size: None) -> None:
        """Hash each file that has not been hashed yet.

        :param threads: how many at a time.
        :param advance: called in any thread with the number of bytes just read.
        :raises OSError: the whole disk fails.
        """
        done = 0
        for source in self._sources:
            # Whoever has just copied it here may not know that the disk refused some of it. After a sync
            # what is hashed is what is on the disk.
            with Tree(source.directory) as tree:
                tree.sync()
        with ExitStack() as stack:
            roots = [partial(Tree, source.directory) for source in self._sources]
            trees = [stack.enter_context(TreePerThread(root)) for root in roots]
            hash_one = partial(_hash, trees, [len(source.at) for source in self._sources], advance)
            for file, md5, reason in parallel_map(self._unhashed(), hash_one, threads, attrgetter("size")):
                if md5 is None:
                    self._table.execute("DELETE FROM file WHERE path = ?", (file.path,))
                    self.report.skip(reason, file.path)
                else:
                    self._table.execute("UPDATE file SET md5 = ? WHERE path = ?", (md5, file.path))
                done += 1
                if done % _PAGE == 0 or file.size > 100_000_000:
                    self._table.commit()
        self._table.commit()

    def _unhashed(self) -> Iterator[SurveyedFile]:
        return self._select("md5 IS NULL AND")

    # --- results ------------------------------------------------------------------------------------

    def surveyed_files(self) -> Iterator[SurveyedFile]:
        """Yield the files in path order, even if the table changes meanwhile."""
        return self._select("")

    def _select(self, condition: str) -> Iterator[SurveyedFile]:
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

    def write_index(self, path: Path) -> None:
        """Write the consumer index that an adoption would make."""
        with IndexWriter(path) as writer:
            for file in self.surveyed_files():
                if file.md5 is not None:
                    writer.add(file.path, file.md5)

    def changes(self, tree: Tree) -> Iterator[Change]:
        """Yield the changes that adopt the files, except those that changed since they were hashed."""
        for file in self.surveyed_files():
            status = tree.lstat(file.path)
            if status is None or not file.matches(status):
                self.report.skip(SkipReason.MOVING, file.path)
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
    """Whether something with another name is the directory of versions, as the file system folds names."""
    old = tree.lstat(folder + b"/" + OLD)
    return old is not None and os.path.samestat(old, status)


def _row(file: SurveyedFile) -> tuple[Any, ...]:
    """Return a file as it is stored, without its md5.

    Numbers that may need more than SQLite's 63 bits are stored as text: inodes of some network file systems,
    and nanoseconds from the year 2262 on.
    """
    inode, modified, changed = (b"%d" % number for number in (file.inode, file.modified, file.changed))
    return file.path, file.root, inode, file.size, modified, changed, file.mode


def _from_row(row: tuple[Any, ...]) -> SurveyedFile:
    path, root, inode, size, modified, changed, mode, md5 = row
    return SurveyedFile(path, root, int(inode), size, int(modified), int(changed), mode, md5)


def _open_table(table: Path | None) -> sqlite3.Connection:
    if table is not None:  # the files that SQLite creates beside it get its owner
        os.close(open_for_owner(table, os.O_RDWR | os.O_CREAT, 0o644))
    connection = sqlite3.connect(table or "", timeout=0)
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    try:
        connection.execute("BEGIN EXCLUSIVE")  # nobody else can open it until it is closed
        connection.commit()
    except sqlite3.DatabaseError:
        connection.close()
        raise
    if connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
        connection.close()
        raise sqlite3.DatabaseError
    connection.execute(
        "CREATE TABLE IF NOT EXISTS file (path BLOB PRIMARY KEY, root INTEGER, inode BLOB, size INTEGER,"
        " modified BLOB, changed BLOB, mode INTEGER, md5 BLOB, seen INTEGER) WITHOUT ROWID"
    )
    return connection


# An earlier hash is valid as long as the file is unchanged.
_UPSERT = """
INSERT INTO file VALUES (?, ?, ?, ?, ?, ?, ?, NULL, 1) ON CONFLICT (path) DO UPDATE SET
md5 = CASE WHEN inode = excluded.inode AND size = excluded.size AND modified = excluded.modified
AND changed = excluded.changed THEN md5 END,
root = excluded.root, inode = excluded.inode, size = excluded.size, modified = excluded.modified,
changed = excluded.changed, mode = excluded.mode, seen = 1
"""


def _hash(
    trees: list[TreePerThread], prefixes: list[int], advance: Callable[[int], None], file: SurveyedFile
) -> tuple[SurveyedFile, bytes | None, SkipReason]:
    """Return the md5 of a file, or why it has none. In any thread.

    :param prefixes: for each source, the length of its place in paths.
    """
    try:
        with trees[file.root]().opened(file.path[prefixes[file.root] :]) as descriptor:
            if file.matches(os.fstat(descriptor)):
                md5 = md5_of(descriptor, progress=advance)
                if file.matches(os.fstat(descriptor)):
                    return file, md5, SkipReason.MOVING
    except FileNotFoundError:
        pass
    except OSError as error:
        if not concerns_one_file(error):
            raise
        return file, None, SkipReason.UNREADABLE
    return file, None, SkipReason.MOVING


def index_lookup(index: Path) -> Callable[[bytes], bool]:
    """Return a function that says whether a canonical index has a path, for any order of paths."""
    table = sqlite3.connect("")
    table.execute("CREATE TABLE entry (path BLOB PRIMARY KEY) WITHOUT ROWID")
    entries = read_entries(index)
    while rows := [(entry.path,) for entry in islice(entries, _PAGE)]:
        table.executemany("INSERT INTO entry VALUES (?)", rows)
    return lambda path: table.execute("SELECT 1 FROM entry WHERE path = ?", (path,)).fetchone() is not None
