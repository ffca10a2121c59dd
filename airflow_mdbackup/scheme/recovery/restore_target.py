"""Where a restore may write, and how it is kept from writing anywhere else.

::

    named   a directory below a base, by its whole path, by one from there, or not at all
    walked  from the base on, one directory after the other, following no symlink; what is missing is made
    looked  at what it must not touch: backups, and whatever else it is told of
    held    open until all is restored, with a directory in it that is ours alone
    noted   which names files get now, where that takes placeholders: what a kill leaves goes the next time

What this does not give: safety from somebody who can write below the base himself, and puts a symlink there
between the walk and the opening; nor an empty file that somebody makes under such a name while it is noted,
if a kill comes then.
"""

from __future__ import annotations

import errno
import fcntl
import os
import pwd
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from airflow_mdbackup.scheme.errors import DestinationBusy, DestinationRefused
from airflow_mdbackup.scheme.files.content import write_all
from airflow_mdbackup.scheme.files.folder import Folder
from airflow_mdbackup.scheme.files.syscalls import concerns_one_file
from airflow_mdbackup.scheme.files.tree import Tree
from airflow_mdbackup.scheme.store.mirror import Mirror

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_ON_THE_WAY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC  # which need not be readable
_MOST_LINKS = 40
_NOT_HERE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENAMETOOLONG)


def target_below(base: Path, target: str, keep_out: Iterable[Path] = (), *, make: bool = True) -> Path:
    """Return the directory that somebody names, if it is below ``base``, with all symlinks above resolved.

    :param base: an absolute path of a directory that is there.
    :param target: an absolute path, or one from ``base`` on.
    :param keep_out: directories that it must be neither within nor above.
    :param make: make the directories that are missing.
    :raises DestinationRefused: it is not below the base, leads elsewhere, or touches what it must not.
    :raises OSError: the disk is full or broken.
    """
    if not base.is_absolute() or not base.is_dir():
        raise DestinationRefused(
            f"{base} is no absolute path of a directory on this machine, below which files are restored: "
            "make it, for the user of the workers alone"
        )
    real = base.resolve(strict=True)
    parts = _parts_below(base, real, target)
    _walk(real, parts, target)
    there = real.joinpath(*parts)
    for other in [*keep_out, *(place for place in (there, *there.parents) if Mirror(place, "").is_set_up())]:
        resolved = other.resolve()
        if there.is_relative_to(resolved) or resolved.is_relative_to(there):
            raise DestinationRefused(f"{there} must be neither within nor above {other}: name another one")
    if make:
        _walk(real, parts, target, make=True)
    return there


def _parts_below(base: Path, real: Path, target: str) -> tuple[str, ...]:
    path = Path(target)
    fine = target.isprintable() and ".." not in path.parts
    for above in (base, real):
        if fine and (above / path).is_relative_to(above):
            parts = (above / path).relative_to(above).parts
            if parts:
                return parts
    raise DestinationRefused(
        f"{target!r} is not below {base}, or cannot be printed: name a directory below it, by its whole path "
        "or from there"
    )


def _walk(real: Path, parts: tuple[str, ...], target: str, *, make: bool = False) -> None:
    """Go through the directories one by one, so that none of them is a symlink; make what is missing."""
    at = os.open(real, _DIRECTORY)
    try:
        for part in parts:
            at = _enter(at, part, 0o700 if make else None)
    except FileNotFoundError:
        pass  # and so is what would be below it
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        raise DestinationRefused(
            f"{error.filename!r} in {target!r} is no directory, or a symlink: name another one"
        ) from None
    finally:
        os.close(at)


def _enter(at: int, name: str, mode: int | None, flags: int = _DIRECTORY) -> int:
    """Return a descriptor of a directory in the one that is open as ``at``, which is closed then.

    :param mode: with which it is made if it is missing; None: it is not made.
    """
    try:
        below = os.open(name, flags, dir_fd=at)
    except FileNotFoundError:
        if mode is None:
            raise
        with suppress(FileExistsError):
            os.mkdir(name, mode, dir_fd=at)
        below = os.open(name, flags, dir_fd=at)
    os.close(at)
    return below


class OpenTarget:
    """A directory into which files are restored, and one in it in which they are written. A context manager.

    Both are held open, and reached by their descriptors alone, so that nobody who may rename what lies on the
    way, or in it, has us write elsewhere. What is missing is made: the directory itself for us alone, since
    files come with the modes that they had, but without the directories that protected them.

    :param path: of the directory, as :func:`trusted` returns it. No symlink on the way is followed.
    :raises DestinationRefused: it is no directory, or what it has for us to write in is not ours.
    :raises DestinationBusy: another restore writes to it.
    :raises OSError: it cannot be made, or used.
    """

    WORK = ".mdbackup-restoring"
    _NAMING = b"naming"  # in it: paths at which an empty file is a placeholder, each ended by a NUL

    def __init__(self, path: Path) -> None:
        self.path = path
        with ExitStack() as opened:
            self._root = opened.enter_context(Folder(_opened(path)))
            self.work = opened.enter_context(Folder(self._opened_work()))
            self._lock()
            self._tidy_up()
            self._needs_placeholders = self.work.needs_placeholders(b"0", b"1")
            self._close = opened.pop_all()

    def __enter__(self) -> OpenTarget:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):  # if the disk fails, the next one goes on
            self._tidy_up()
            os.rmdir(self.WORK, dir_fd=self._root.descriptor)
        self._close.close()

    def _tidy_up(self) -> None:
        """Take away what this restore, or one that was killed, has not given a name."""
        self._drop_placeholders()
        for left in os.listdir(self.work.descriptor):
            self.work.remove(os.fsencode(left))

    @contextmanager
    def naming(self, paths: Iterable[bytes]) -> Iterator[None]:
        """Give files names that nothing has, between two syncs of all that was written.

        :param paths: of files that were not there when they were last looked at. Where a name takes a
            placeholder, they are noted before, so that whoever comes after a kill knows it for one.
        :raises OSError: the disk is full or broken.
        """
        if self._needs_placeholders:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            note = os.open(self._NAMING, flags, 0o600, dir_fd=self.work.descriptor)
            try:
                write_all(note, b"".join(path + b"\0" for path in paths))
            finally:
                os.close(note)
        self.work.sync()
        yield
        self.work.sync()
        self.work.remove(self._NAMING)

    def _drop_placeholders(self) -> None:
        """Take away what was made to hold a place, and is like the note of it, made in the same way."""
        try:
            note = self.work.open(self._NAMING)
        except FileNotFoundError:
            return
        with open(note, "rb") as file:
            mode = os.fstat(note).st_mode
            paths = file.read().split(b"\0")[:-1]  # what is behind the last one was cut off
        with self.tree() as tree:
            for path in filter(None, paths):
                try:
                    there = tree.lstat(path)
                    if there is not None and (there.st_mode, there.st_size) == (mode, 0):
                        tree.unlink(path)
                except OSError as error:
                    if not concerns_one_file(error):
                        raise
        self.work.remove(self._NAMING)

    def tree(self) -> Tree:
        """Return the files in it, for one thread."""
        return Tree(self._root.descriptor, gives=False)

    def _opened_work(self) -> int:
        with suppress(FileExistsError):
            os.mkdir(self.WORK, 0o700, dir_fd=self._root.descriptor)
        try:
            work = os.open(self.WORK, _DIRECTORY, dir_fd=self._root.descriptor)
        except NotADirectoryError:
            raise self._not_ours() from None
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise self._not_ours() from None
        status = os.fstat(work)
        names = os.listdir(work)
        are_ours = all(name.isdigit() or name == self._NAMING.decode() for name in names)
        if status.st_uid != os.geteuid() or status.st_mode & 0o077 or not are_ours:
            os.close(work)
            raise self._not_ours()
        return work

    def _not_ours(self) -> DestinationRefused:
        return DestinationRefused(
            f"{self.path / self.WORK} is where restoring works, and is not ours alone: move it away"
        )

    def _lock(self) -> None:
        try:
            fcntl.flock(self.work.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            there = os.lstat(self.WORK, dir_fd=self._root.descriptor)
            if os.path.samestat(os.fstat(self.work.descriptor), there):
                return
        except (BlockingIOError, FileNotFoundError):
            pass
        # If it is gone, another one that has just come to its end has taken it away.
        raise DestinationBusy(f"another restore writes to {self.path}: wait for its end")


def trusted(path: Path) -> Path:
    """Return the whole path of a directory that need not be there, with the symlinks on the way resolved.

    :raises DestinationRefused: one of them belongs neither to root nor to us, so that it leads where its
        owner wants.
    """
    ahead = list(Path(os.path.abspath(path)).parts[1:])
    at, links = Path("/"), 0
    while ahead:
        part = ahead.pop(0)
        if part == "..":
            at = at.parent
            continue
        try:
            status = os.lstat(at / part)
        except FileNotFoundError:
            return at.joinpath(part, *ahead)
        except NotADirectoryError:
            raise DestinationRefused(f"{path}: {at} is no directory: name another one") from None
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            raise DestinationRefused(f"{path}: {error.strerror}. Name another directory") from None
        if not stat.S_ISLNK(status.st_mode):
            at /= part
            continue
        links += 1
        if status.st_uid not in (0, os.geteuid()) or links > _MOST_LINKS:
            raise DestinationRefused(f"{path}: {at / part} is a symlink of somebody else: name another way")
        to = Path(os.readlink(at / part))
        at = Path("/") if to.is_absolute() else at
        ahead = [*to.parts[to.is_absolute() :], *ahead]
    return at


def _opened(path: Path) -> int:
    """Return a descriptor of a directory, making it, and those above it, if need be.

    :param path: see :func:`trusted`.
    """
    at = os.open("/", _ON_THE_WAY)
    try:
        for above in [*reversed(path.parents), path][1:]:
            is_last = above == path
            at = _enter(at, above.name, 0o700 if is_last else 0o755, _DIRECTORY if is_last else _ON_THE_WAY)
    except OSError as error:
        os.close(at)
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            raise DestinationRefused(
                f"{path}: {error.filename!r} is no directory: name another one"
            ) from None
        if error.errno in _NOT_HERE:
            raise DestinationRefused(
                f"{path} cannot be made, or written to: {error.strerror}. Name another directory"
            ) from None
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None
    return at


def whose(path: Path) -> str | None:
    """Return, for people, who else can write to a directory, or to where it will be made; None if nobody can.

    Who owns it can take away and replace what is restored there, whoever owns that, and read what is below
    one that is there already.

    :raises DestinationRefused: see :func:`trusted`.
    """
    there = trusted(path)
    above = next(place for place in (there, *there.parents) if place.exists())
    status = above.stat()
    can = "can read and replace" if above == there else "can replace"
    if status.st_uid not in (0, os.geteuid()):
        try:
            name = pwd.getpwuid(status.st_uid).pw_name
        except KeyError:
            name = f"the user {status.st_uid}"
        return f"{above} belongs to {name}, who {can} all that is restored there"
    for bit, who in ((stat.S_IWOTH, "everybody"), (stat.S_IWGRP, f"the group {status.st_gid}")):
        if status.st_mode & bit and not status.st_mode & stat.S_ISVTX:
            return f"{above} can be written by {who}, who {can} all that is restored there"
    return None
