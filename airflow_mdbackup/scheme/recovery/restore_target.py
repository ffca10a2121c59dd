"""Where a restore may write, and how it is kept from writing anywhere else.

::

    name      a directory below a base, by its absolute path, by one relative to the base, or not at all
    check     from the base down, following no symlink; it must not touch backups, nor the other directories
              that the caller rules out
    open      and keep open until everything is restored, with a directory in it that is ours alone
    note      which names files are about to get, if that takes placeholders: the next restore removes those
              that a kill leaves

Limitations: no protection from somebody who can write below the base, and puts a symlink there between the
check and the opening; nor for an empty file that somebody creates under a noted name, if a kill comes then.
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

from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.errors import DestinationBusy, DestinationRefused
from airflow_mdbackup.scheme.files.content import write_all
from airflow_mdbackup.scheme.files.folder import Folder
from airflow_mdbackup.scheme.files.syscalls import concerns_one_file
from airflow_mdbackup.scheme.files.tree import Tree
from airflow_mdbackup.scheme.store.mirror import Mirror

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PASS_THROUGH = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC  # it need not be readable
_MAX_LINKS = 40
_UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENAMETOOLONG)


# --- choosing a target ------------------------------------------------------------------------------


def resolve_target(base: Path, target: str, keep_out: Iterable[Path] = (), *, make: bool = True) -> Path:
    """Return the directory that an operator names, if it is below ``base``, with symlinks above resolved.

    :param base: an absolute path of an existing directory.
    :param target: an absolute path, or one relative to ``base``.
    :param keep_out: directories that it must be neither within nor above.
    :param make: create missing directories.
    :raises DestinationRefused: it is not below the base, leads elsewhere, or touches what it must not; or
        it cannot be created.
    :raises OSError: the disk is full or broken.
    """
    if not base.is_absolute() or not base.is_dir():
        raise DestinationRefused(
            f"{base}, below which files are restored, is not an absolute path of an existing directory: "
            "create it, for the user of the workers alone"
        )
    real_base = base.resolve(strict=True)
    directory = real_base.joinpath(*_parts_below(base, real_base, target))
    _refuse_symlinks(real_base, directory, target)
    backups = [place for place in (directory, *directory.parents) if Mirror(place, "").is_set_up()]
    for other in [*keep_out, *backups]:
        resolved = other.resolve()
        if directory.is_relative_to(resolved) or resolved.is_relative_to(directory):
            raise DestinationRefused(
                f"{directory} must be neither within nor above {other}: choose another directory"
            )
    if make:
        os.close(_open_directory(directory, 0o700))
    return directory


def _parts_below(base: Path, real_base: Path, target: str) -> tuple[str, ...]:
    path = Path(target)
    is_usable = target.isprintable() and ".." not in path.parts
    for above in (base, real_base):
        if is_usable and (above / path).is_relative_to(above):
            parts = (above / path).relative_to(above).parts
            if parts:
                return parts
    raise DestinationRefused(
        f"{target!r} is not below {base}, or cannot be printed: name a directory below it, by its absolute "
        "path or relative to it"
    )


def _refuse_symlinks(real_base: Path, directory: Path, target: str) -> None:
    """Make sure that what exists of ``directory`` are directories, and not symlinks, from the base down."""
    below = os.fsencode(directory.relative_to(real_base))
    with Tree(real_base) as tree:
        blocked = tree.blocker(b"/" + below + b"/.")
    if blocked is not None:
        what = "a symlink" if blocked.is_symlink else "not a directory"
        place = f"{real_base}{to_text(blocked.at)}"
        raise DestinationRefused(f"{target!r}: {place} is {what}: choose another directory")


def resolve_trusted(path: Path) -> Path:
    """Return the absolute path of a directory, which need not exist, with the symlinks on the way resolved.

    :raises DestinationRefused: one of the symlinks belongs neither to root nor to us, so it leads wherever
        its owner wants.
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
            raise DestinationRefused(f"{path}: {at} is not a directory: choose another one") from None
        except OSError as error:
            if error.errno not in _UNUSABLE:
                raise
            raise DestinationRefused(f"{path}: {error.strerror}. Choose another directory") from None
        if not stat.S_ISLNK(status.st_mode):
            at /= part
            continue
        links += 1
        if status.st_uid not in (0, os.geteuid()) or links > _MAX_LINKS:
            raise DestinationRefused(
                f"{path}: {at / part} is a symlink of another user: choose a path without it"
            )
        to = Path(os.readlink(at / part))
        at = Path("/") if to.is_absolute() else at
        ahead = [*to.parts[to.is_absolute() :], *ahead]
    return at


def find_other_writer(path: Path) -> str | None:
    """Return, for people, who else can write to a directory, or to where it will be made; None if nobody.

    Its owner can delete and replace what is restored there, whoever owns those files, and can read what is
    below it if it already exists.

    :raises DestinationRefused: see :func:`resolve_trusted`.
    """
    directory = resolve_trusted(path)
    existing = next(place for place in (directory, *directory.parents) if place.exists())
    status = existing.stat()
    can = "can read and replace" if existing == directory else "can replace"
    if status.st_uid not in (0, os.geteuid()):
        try:
            name = pwd.getpwuid(status.st_uid).pw_name
        except KeyError:
            name = f"the user {status.st_uid}"
        return f"{existing} belongs to {name}, who {can} everything restored there"
    for bit, who in ((stat.S_IWOTH, "everybody"), (stat.S_IWGRP, f"the group {status.st_gid}")):
        if status.st_mode & bit and not status.st_mode & stat.S_ISVTX:
            return f"{existing} is writable by {who}, who {can} everything restored there"
    return None


# --- writing to it ----------------------------------------------------------------------------------


class OpenTarget:
    """A directory into which files are restored, and a work directory in it. A context manager.

    Both are kept open and used through their descriptors alone, so that nobody who may rename what is on the
    way to them, or in them, can make us write elsewhere. Missing directories are created: the target itself
    for us alone, because files are restored with the modes that they had, but without the directories that
    protected them.

    :param path: the directory, as :func:`resolve_trusted` returns it. No symlink on the way is followed.
    :raises DestinationRefused: it is not a directory, or its work directory is not ours.
    :raises DestinationBusy: another restore is writing to it.
    :raises OSError: it cannot be created or used.
    """

    WORK = ".mdbackup-restoring"
    _NAMING = b"naming"  # a file in it: paths at which an empty file is a placeholder, each followed by NUL

    def __init__(self, path: Path) -> None:
        self.path = path
        with ExitStack() as opened:
            self._root = opened.enter_context(Folder(_open_directory(path, 0o755)))
            self.work = opened.enter_context(Folder(self._open_work()))
            self._lock()
            self._clean_up()
            self._needs_placeholders = self.work.needs_placeholders(b"0", b"1")
            self._close = opened.pop_all()

    def __enter__(self) -> OpenTarget:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):  # if the disk fails, the next restore cleans up
            self._clean_up()
            os.rmdir(self.WORK, dir_fd=self._root.descriptor)
        self._close.close()

    def _clean_up(self) -> None:
        """Delete files to which this restore, or one that was killed, did not give their final names."""
        self._remove_placeholders()
        for left in os.listdir(self.work.descriptor):
            self.work.remove(os.fsencode(left))

    @contextmanager
    def naming(self, paths: Iterable[bytes]) -> Iterator[None]:
        """Give files unused names in the ``with`` block, between two syncs of everything written.

        :param paths: files that did not exist when last looked at. If naming takes placeholders, these paths
            are noted first, so that the next restore after a kill recognizes them.
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

    def _remove_placeholders(self) -> None:
        """Delete what has a noted name and is like the note itself, which was created in the same way."""
        try:
            note = self.work.open(self._NAMING)
        except FileNotFoundError:
            return
        with open(note, "rb") as file:
            mode = os.fstat(note).st_mode
            paths = file.read().split(b"\0")[:-1]  # what follows the last NUL was cut off
        with self.tree() as tree:
            for path in filter(None, paths):
                try:
                    found = tree.lstat(path)
                    if found is not None and (found.st_mode, found.st_size) == (mode, 0):
                        tree.unlink(path)
                except OSError as error:
                    if not concerns_one_file(error):
                        raise
        self.work.remove(self._NAMING)

    def tree(self) -> Tree:
        """Return the files in it, for one thread."""
        return Tree(self._root.descriptor, gives=False)

    def _open_work(self) -> int:
        with suppress(FileExistsError):
            os.mkdir(self.WORK, 0o700, dir_fd=self._root.descriptor)
        try:
            work = os.open(self.WORK, _DIRECTORY, dir_fd=self._root.descriptor)
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
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
            f"{self.path / self.WORK} is needed as the work directory of restores, but is not ours alone: "
            "move it away"
        )

    def _lock(self) -> None:
        try:
            fcntl.flock(self.work.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found = os.lstat(self.WORK, dir_fd=self._root.descriptor)
            if os.path.samestat(os.fstat(self.work.descriptor), found):
                return
        except (BlockingIOError, FileNotFoundError):
            pass
        # If the work directory is gone, another restore has just finished and removed it.
        raise DestinationBusy(f"another restore is writing to {self.path}: wait until it has finished")


def _open_directory(path: Path, mode_above: int) -> int:
    """Return a descriptor of a directory; it and the directories above it are created if missing.

    :param path: see :func:`resolve_trusted`. No symlink on the way is followed.
    :param mode_above: of directories created above it; it is itself created for us alone.
    :raises DestinationRefused: something else is in the way, or it cannot be created.
    """
    at = os.open("/", _PASS_THROUGH)
    try:
        for above in [*reversed(path.parents), path][1:]:
            is_last = above == path
            mode, flags = (0o700, _DIRECTORY) if is_last else (mode_above, _PASS_THROUGH)
            at = _enter(at, above.name, mode, flags)
    except OSError as error:
        os.close(at)
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            raise DestinationRefused(
                f"{path}: {error.filename!r} is not a directory: choose another one"
            ) from None
        if error.errno in _UNUSABLE:
            raise DestinationRefused(
                f"{path} cannot be created or written to: {error.strerror}. Choose another directory"
            ) from None
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None
    return at


def _enter(at: int, name: str, mode: int, flags: int) -> int:
    """Open a directory in the one that is open as ``at``, which is closed then; create it if missing."""
    try:
        below = os.open(name, flags, dir_fd=at)
    except FileNotFoundError:
        with suppress(FileExistsError):
            os.mkdir(name, mode, dir_fd=at)
        below = os.open(name, flags, dir_fd=at)
    os.close(at)
    return below
