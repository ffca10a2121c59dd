"""A tree that another tool made becomes the mirror, so that the first run transfers only what differs.

::

    walked    what lies in the mirror, and in trees that are to come there, into a table on the disk
    hashed    each regular file, several at a time; what was hashed before a crash is not hashed again
    moved     each tree to its place, by one rename
    ahead     the history of all that is adopted; then the marker, so that from now on it is a backup
    finished  consumer index and history, as every commit is (see settle)
    left      what the provider does not have leaves the index again, in a commit of its own

Before the marker nothing is adopted, and runs refuse ``dest``; behind it all is, since whoever comes next
finishes that commit. The same command again goes on in either case. No file is opened for writing, and none
is removed.

What this does not give: what the tree was before. History begins with the adoption.
"""

from __future__ import annotations

import errno
import os
import shlex
import sqlite3
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from itertools import islice, permutations
from pathlib import Path
from typing import Any, NamedTuple

from airflow_mdbackup.scheme.diff import Forget
from airflow_mdbackup.scheme.errors import DestinationBusy, DestinationRefused
from airflow_mdbackup.scheme.forget import take_out
from airflow_mdbackup.scheme.history import PENDING, Change, What, commits, pending
from airflow_mdbackup.scheme.index import IndexWriter, check_path, count_entries, read_entries
from airflow_mdbackup.scheme.mirror import OLD, PERSON_WAIT, Mirror, Run
from airflow_mdbackup.scheme.names import to_text
from airflow_mdbackup.scheme.ordered import Alongside
from airflow_mdbackup.scheme.records import read_header, read_records, write_records, write_state
from airflow_mdbackup.scheme.settle import finish, refresh_status, settle
from airflow_mdbackup.scheme.threads import TreePerThread, spread
from airflow_mdbackup.scheme.totals import totals_state
from airflow_mdbackup.scheme.tree import Tree, concerns_one_file, make_directory, md5_of, open_for_owner

_RUN = "adopt__"  # what the run id of an adoption begins with
_PAGE = 1000  # files that are taken from the table at a time
_SHOWN = 5  # paths that are named of each kind that is left


class Left(StrEnum):
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
        harmful = (Left.BLOCKING, Left.BAD_NAME, Left.UNREADABLE, Left.MOVING, Left.MOUNTED)
        return self not in harmful


@dataclass(frozen=True, slots=True)
class Source:
    """A tree: ``directory`` is, or becomes, the mirror's ``at``, without a slash at its end."""

    directory: Path
    at: bytes = b""


@dataclass(slots=True)
class Told:
    """What a survey has to tell beside the files.

    :ivar left: how much of each kind is not adopted, and the first few paths of it.
    :ivar others: files and directories that belong to another user than this process.
    :ivar linked: files with more names than one.
    """

    left: Counter[Left] = field(default_factory=Counter)
    examples: dict[Left, list[bytes]] = field(default_factory=dict)
    others: int = 0
    linked: int = 0

    def leave(self, why: Left, path: bytes) -> None:
        """Note that something is not adopted."""
        self.left[why] += 1
        shown = self.examples.setdefault(why, [])
        if len(shown) < _SHOWN:
            shown.append(path)


class Surveyed(NamedTuple):
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
        sources: Sequence[Source],
        table: Path | None = None,
        passes_over: Callable[[bytes], bool] = lambda path: False,
    ) -> None:
        self.told = Told()
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

    def _below(self, number: int, source: Source) -> Iterator[Surveyed]:
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
                    self.told.leave(Left.UNREADABLE, source.at + folder or b"/")
                    continue
                if folder and not names:
                    self.told.leave(Left.EMPTY, source.at + folder)
                for name in names:
                    below = folder + b"/" + name
                    status, why = self._looked_at(tree, below, source.at + below, device)
                    if why is not None or status is None:
                        self.told.leave(why or Left.MOVING, source.at + below)
                    elif stat.S_ISDIR(status.st_mode):
                        ahead.append(below)
                    else:
                        self.told.linked += status.st_nlink > 1
                        yield Surveyed(
                            *(source.at + below, number, status.st_ino, status.st_size, status.st_mtime_ns),
                            *(status.st_ctime_ns, stat.S_IMODE(status.st_mode)),
                        )

    def _looked_at(
        self, tree: Tree, below: bytes, path: bytes, device: int
    ) -> tuple[os.stat_result | None, Left | None]:
        """Return what stands at ``below`` in a tree, if anything still does, and why it is not adopted."""
        try:
            status = tree.lstat(below)
        except OSError as error:
            if not concerns_one_file(error):
                raise
            return None, Left.UNREADABLE
        if status is None:
            return None, Left.MOVING
        folder, _, name = below.rpartition(b"/")
        self.told.others += status.st_uid != os.geteuid()
        why = self._why_left(path, name, status, device)
        if why is None and name.startswith(b".") and _is_folded_old(tree, folder, status):
            why = Left.RESERVED
        return status, why

    def _why_left(self, path: bytes, name: bytes, status: os.stat_result, device: int) -> Left | None:
        is_directory = stat.S_ISDIR(status.st_mode)
        if name == OLD:
            return Left.RESERVED if is_directory else Left.BLOCKING
        if stat.S_ISLNK(status.st_mode):
            return Left.SYMLINK
        if not is_directory and not stat.S_ISREG(status.st_mode):
            return Left.SPECIAL
        if is_directory:
            return Left.MOUNTED if status.st_dev != device else None
        try:
            check_path(path)
        except ValueError:
            return Left.BAD_NAME
        return Left.PASSED_OVER if self._passes_over(path) else None

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
            for file, md5, why in spread(self._unhashed(), hash_one, threads, lambda file: file.size):
                if md5 is None:
                    self._table.execute("DELETE FROM file WHERE path = ?", (file.path,))
                    self.told.leave(why, file.path)
                else:
                    self._table.execute("UPDATE file SET md5 = ? WHERE path = ?", (md5, file.path))
                done += 1
                if done % _PAGE == 0 or file.size > 100_000_000:
                    self._table.commit()
        self._table.commit()

    def _unhashed(self) -> Iterator[Surveyed]:
        return self.found("md5 IS NULL AND")

    def found(self, condition: str = "") -> Iterator[Surveyed]:
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
                self.told.leave(Left.MOVING, file.path)
            elif file.md5 is not None:
                mtime = file.modified // 10**9
                yield Change(
                    *(file.path, What.ADOPTED), md5=file.md5, size=file.size, mtime=mtime, mode=file.mode
                )


def _is_folded_old(tree: Tree, folder: bytes, status: os.stat_result) -> bool:
    """Whether the file system takes something in a folder, of another name, for the directory of versions."""
    old = tree.lstat(folder + b"/" + OLD)
    return old is not None and os.path.samestat(old, status)


def _row(file: Surveyed) -> tuple[Any, ...]:
    """Return a file as it is stored, but for its md5.

    Numbers that need more than the 63 bits of SQLite are texts: inodes of some network file systems, and
    nanoseconds from the year 2262 on.
    """
    inode, modified, changed = (b"%d" % number for number in (file.inode, file.modified, file.changed))
    return file.path, file.root, inode, file.size, modified, changed, file.mode


def _from_row(row: tuple[Any, ...]) -> Surveyed:
    path, root, inode, size, modified, changed, mode, md5 = row
    return Surveyed(path, root, int(inode), size, int(modified), int(changed), mode, md5)


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
    trees: list[TreePerThread], cut: list[int], advance: Callable[[int], None], file: Surveyed
) -> tuple[Surveyed, bytes | None, Left]:
    """Return the md5 of a file, or why there is none. In any thread."""
    try:
        with trees[file.root]().opened(file.path[cut[file.root] :]) as descriptor:
            if file.is_as(os.fstat(descriptor)):
                md5 = md5_of(descriptor, progress=advance)
                if file.is_as(os.fstat(descriptor)):
                    return file, md5, Left.MOVING
    except FileNotFoundError:
        pass
    except OSError as error:
        if not concerns_one_file(error):
            raise
        return file, None, Left.UNREADABLE
    return file, None, Left.MOVING


# --- adopting ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Adopted:
    """What became of an adoption.

    :ivar files: entries in the consumer index.
    :ivar gone: how many of what was adopted have left it again, because the provider does not have them.
    """

    files: int
    gone: int


def is_begun(mirror: Mirror) -> bool:
    """Whether an adoption was cut off, which the same command goes on with."""
    return mirror.adopting.exists()


def is_adopted(mirror: Mirror) -> bool:
    """Whether an adoption that was cut off had got so far that it only has to be finished."""
    if not is_begun(mirror) or not mirror.is_marked():
        return False
    first = next(iter([*commits(mirror), *pending(mirror)]), None)
    return first is not None and str(read_header(first).get("run_id")).startswith(_RUN)


def check_adoptable(mirror: Mirror, trees: Sequence[Source]) -> None:
    """Make sure that ``dest`` has no backup yet, and that the trees can be moved there.

    :raises DestinationRefused: it has one, is another provider's, or holds something else; or a tree is not
        there, lies on another file system, or its place is taken.
    """
    if mirror.is_marked():
        mirror.check()
        if _has_backup(mirror):
            mirror.adopting.unlink(missing_ok=True)  # of one that was never carried out
            raise DestinationRefused(
                f"{mirror.provider}: {mirror.dest} has a backup already, and nothing was changed. More files "
                "can be put in place: the next run hashes what its index does not have, and pulls the rest"
            )
    elif any(commits(mirror)):
        raise DestinationRefused(
            f"{mirror.provider}: {mirror.dest} has the history of a backup, and no marker: another disk's "
            "rest? Move it away, or bring its provider-id back"
        )
    ours = [tree.directory.resolve() for tree in trees]
    for other in mirror.foreign():
        if not any(tree.is_relative_to(other.resolve()) for tree in ours):
            raise DestinationRefused(
                f"{mirror.provider}: {mirror.dest} holds {other.name!r}, which has no place in a backup. If "
                f"that is the tree: --tree {shlex.quote(str(other))} --at PATH; else move it away"
            )
    for one, two in permutations(trees, 2):
        if _place(mirror, one).is_relative_to(_place(mirror, two)):
            raise DestinationRefused(
                f"{mirror.provider}: {one.directory} would come into {two.directory}: move it there first"
            )
        if one.directory.resolve().is_relative_to(two.directory.resolve()):
            raise DestinationRefused(
                f"{mirror.provider}: {one.directory} is part of {two.directory}, and comes with it: leave it "
                "out, or move it away first"
            )
    for tree in trees:
        if not (is_begun(mirror) and _is_moved(mirror, tree)):
            _check_tree(mirror, tree)


def _has_backup(mirror: Mirror) -> bool:
    return mirror.index.exists() or any(commits(mirror)) or any(pending(mirror))


def _is_moved(mirror: Mirror, tree: Source) -> bool:
    """Whether an adoption that was cut off has put a tree in its place."""
    return not os.path.lexists(tree.directory) and _place(mirror, tree).is_dir()


def sources_of(mirror: Mirror, trees: Sequence[Source]) -> list[Source]:
    """Return what an adoption looks at: what is in the mirror already, and the trees that are to come."""
    coming = [tree for tree in trees if not _is_moved(mirror, tree)]
    return [Source(mirror.files), *coming] if mirror.files.is_dir() else coming


def _place(mirror: Mirror, tree: Source) -> Path:
    return mirror.files / os.fsdecode(tree.at.lstrip(b"/"))


def _check_tree(mirror: Mirror, tree: Source) -> None:
    directory, place = tree.directory, _place(mirror, tree)
    who = f"{mirror.provider}: {directory}"
    if directory.is_symlink() or not directory.is_dir():
        raise DestinationRefused(f"{who} is no directory of its own (a symlink, or not there): name the tree")
    if OLD in tree.at.split(b"/"):
        raise DestinationRefused(f"{who} cannot come to {to_text(tree.at)}: {OLD.decode()} is for versions")
    there, dest = directory.resolve(), mirror.dest.resolve()
    if dest.is_relative_to(there):
        raise DestinationRefused(
            f"{who} is the dest, or above it, and cannot be moved into itself. Move it aside first: mv "
            f"{shlex.quote(str(directory))} {shlex.quote(f'{directory}.tree')}, and name that"
        )
    if there.is_relative_to(mirror.files.resolve()):
        raise DestinationRefused(f"{who} lies in the mirror already: leave --tree out")
    blocked = None
    if mirror.files.exists():
        with mirror.tree() as files:
            blocked = files.blocker(tree.at + b"/.")
    if blocked is not None or (os.path.lexists(place) and any(place.iterdir())):
        raise DestinationRefused(f"{who} cannot come to {place}, where something is already: move that away")
    above = next(folder for folder in (mirror.dest, *mirror.dest.parents) if folder.exists())
    if above.stat().st_dev != directory.stat().st_dev:
        raise _elsewhere(mirror, tree)


def _elsewhere(mirror: Mirror, tree: Source) -> DestinationRefused:
    place = _place(mirror, tree)
    source, target = shlex.quote(str(tree.directory)), shlex.quote(str(place))
    return DestinationRefused(
        f"{mirror.provider}: {tree.directory} is on another file system than {mirror.dest}, or is a mount "
        "point, so that no rename brings it there. Copy it (on one disk with btrfs or XFS that takes no "
        f"room), and adopt without --tree: mkdir -p {target} && cp --reflink=auto -a {source}/. {target}/"
    )


def adopt(mirror: Mirror, survey: Survey, trees: Sequence[Source]) -> None:
    """Move the trees to their places, and make a backup of all that was surveyed.

    Before the first call of all, :func:`check_adoptable`. May be called again after a crash, with a new
    survey, or by :func:`go_on` if the adoption had got so far.

    :raises DestinationRefused: a backup has come meanwhile, or a tree cannot be moved.
    :raises DestinationBusy: a run holds the lock for too long.
    :raises DestinationFull, DestinationBroken, WorkerExhausted: see :meth:`.Mirror.told_plainly`.
    """
    with mirror.told_plainly():
        mirror.make_directories()
        with mirror.lock("adopt", PERSON_WAIT):
            if mirror.is_marked() and _has_backup(mirror):
                raise DestinationRefused(f"{mirror.provider}: {mirror.dest} has just got a backup by a run")
            for cut_off in pending(mirror):
                cut_off.unlink()  # without a marker nobody has begun to carry it out
            for tree in trees:
                if not _is_moved(mirror, tree):
                    _move(mirror, tree)
            stamp = mirror.next_stamp()
            run_id = f"{_RUN}{stamp}"
            path = mirror.history_path(stamp, run_id)
            path = path.with_name(path.name + PENDING)
            header = {
                "run_id": run_id,
                "provider": mirror.provider,
                "stamp": stamp,
                "at": mirror.now(),
                "order": "",
                "before": "",
            }
            with mirror.tree() as files:
                files.sync()
                write_records(path, survey.changes(files), **header)
            mirror.mark()
            missed = partial(_missed, survey.told)
            _write_status(mirror, finish(mirror, path, None, fresh=True, missed=missed))


def _missed(told: Told, change: Change, why: str) -> None:
    told.leave(Left.UNREADABLE, change.path)


def go_on(mirror: Mirror) -> None:
    """Finish an adoption that was cut off in the middle of its commit, if nobody has.

    :raises DestinationBusy, DestinationFull, DestinationBroken, WorkerExhausted: see :func:`adopt`.
    """
    with mirror.told_plainly(), mirror.lock("adopt", PERSON_WAIT):
        mirror.check()
        settle(mirror, mirror.forgetting)
        mirror.forgetting.unlink(missing_ok=True)
        _write_status(mirror, count_entries(mirror.index) if mirror.index.exists() else 0)


def conclude(mirror: Mirror, run: Run | None) -> Adopted:
    """Take out of the index again what the provider does not have, and end the adoption.

    :param run: with a plan that :func:`.diff.preview` made; None if what the provider has is not known.
    :raises DestinationBusy, DestinationFull, DestinationBroken, WorkerExhausted: see :func:`adopt`.
    """
    gone: list[bytes] = []
    if run is not None:
        leaving = Alongside(read_records(run.forget, Forget))
        gone = take_out(mirror, lambda entry: leaving.find(entry.path) is not None, "adopt", PERSON_WAIT)
    mirror.adopting.unlink(missing_ok=True)
    return Adopted(count_entries(mirror.index), len(gone))


def _move(mirror: Mirror, tree: Source) -> None:
    """Give a tree its place, by a rename that replaces an empty directory at most."""
    _check_tree(mirror, tree)
    place = _place(mirror, tree)
    make_directory(place.parent, 0o755, parents=True)
    try:
        os.rename(tree.directory, place)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EBUSY):
            raise
        raise _elsewhere(mirror, tree) from None


def _write_status(mirror: Mirror, files: int) -> None:
    """Write a status that knows of no good run, unless there is one."""
    if mirror.status.exists():
        refresh_status(mirror)
    else:
        status = {"provider": mirror.provider, "order": "", "files": files}
        write_state(mirror.status, {**status, **totals_state(mirror, status, files)})


def is_in(index: Path) -> Callable[[bytes], bool]:
    """Return what tells of a path, asked in any order, whether a canonical index has it."""
    table = sqlite3.connect("")
    table.execute("CREATE TABLE entry (path BLOB PRIMARY KEY) WITHOUT ROWID")
    entries = read_entries(index)
    while rows := [(entry.path,) for entry in islice(entries, _PAGE)]:
        table.executemany("INSERT INTO entry VALUES (?)", rows)
    return lambda path: table.execute("SELECT 1 FROM entry WHERE path = ?", (path,)).fetchone() is not None
