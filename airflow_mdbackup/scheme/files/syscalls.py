"""System calls that Python lacks, and files and directories that root creates for their owner.

Sources: renameat2(2), syncfs(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def permissions(mode: int) -> int:
    """Return the mode of a file on the consumer: readable by its owner, and never setuid."""
    return mode & 0o777 | 0o400


OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def not_followed(path: str, flags: int) -> int:
    """Open a file, as an ``opener`` of :func:`open`, unless it is a symlink.

    A file that root creates is given to the owner of its directory; see :func:`give_to_owner`.

    :raises OSError: ELOOP.
    """
    return open_for_owner(path, flags, 0o666)


def open_for_owner(
    path: bytes | os.PathLike[str] | str, flags: int, mode: int = 0o600, *, directory: int | None = None
) -> int:
    """Open a file, unless it is a symlink. One that root creates is given to the owner of its directory.

    :param directory: a descriptor of the directory, if ``path`` is a name in it.
    """
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=directory)
    if flags & os.O_CREAT:
        try:
            give_to_owner(descriptor, _directory_of(path, directory))
        except BaseException:
            os.close(descriptor)
            raise
    return descriptor


def make_new_directory(
    path: bytes | os.PathLike[str] | str, mode: int = 0o700, *, directory: int | None = None
) -> None:
    """Create a directory. One that root creates is given to the owner of its parent.

    :param directory: see :func:`open_for_owner`.
    :raises FileExistsError: the name is taken.
    """
    os.mkdir(path, mode, dir_fd=directory)
    if os.geteuid() == 0:
        made = os.open(path, OPEN_DIRECTORY, dir_fd=directory)
        try:
            give_to_owner(made, _directory_of(path, directory))
        finally:
            os.close(made)


def make_directory(path: Path, mode: int = 0o700, *, parents: bool = False) -> None:
    """Create a directory, as :func:`make_new_directory` does, unless it exists.

    :param parents: create its parents, too.
    :raises FileExistsError: something else has the name.
    """
    if parents and not path.parent.exists():
        make_directory(path.parent, 0o777, parents=True)
    try:
        make_new_directory(path, mode)
    except FileExistsError:
        if not path.is_dir():
            raise


def _directory_of(path: bytes | os.PathLike[str] | str, directory: int | None) -> int | str:
    return (os.path.dirname(os.fsdecode(path)) or ".") if directory is None else directory


def give_to_owner(descriptor: int, directory: int | str) -> None:
    """Give an open file or directory of root's to the owner of its parent directory, who will use it.

    Not a file with a second name, nor a directory that is not empty: somebody who can write to the parent
    might have put it there in place of ours.
    """
    if os.geteuid() != 0:
        return
    status, owner = os.fstat(descriptor), os.stat(directory)
    if status.st_uid != 0 or owner.st_uid == 0:
        return
    if not os.listdir(descriptor) if stat.S_ISDIR(status.st_mode) else status.st_nlink == 1:
        with suppress(PermissionError):  # root may lack the right, as in some containers
            os.fchown(descriptor, owner.st_uid, owner.st_gid)


def is_file(status: os.stat_result | None) -> bool:
    """Whether it is a regular file."""
    return status is not None and stat.S_ISREG(status.st_mode)


def seconds(status: os.stat_result) -> int:
    """Return the modification time in whole Unix seconds, rounded down; negative before 1970.

    ``st_mtime`` is a float, which may round up.
    """
    return status.st_mtime_ns // 10**9


def concerns_one_file(error: OSError) -> bool:
    """Whether an error is about one file, and not about the disk or the process."""
    return error.errno not in _OF_ALL


_OF_ALL = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE, errno.ENODEV),
    *(errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT),  # of network and FUSE file systems
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
)
_RENAME_NOREPLACE = 1
_libc = ctypes.CDLL(None, use_errno=True)


def syncfs(descriptor: int) -> None:
    """Write everything on the filesystem of an open directory to its disk.

    One call instead of an fsync per file. It reports every write error since the directory was opened (since
    Linux 5.8), even if it was also reported elsewhere, but none from before. So the directory must be open
    before the first byte is written that this call is to guarantee.
    """
    if _libc.syncfs(descriptor) != 0:
        raise _os_error(os.readlink(b"/proc/self/fd/%d" % descriptor))


def fsync_directory(directory: os.PathLike[str]) -> None:
    """Make the names in ``directory`` durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename_if_free(source_directory: int, source: bytes, target_directory: int, target: bytes) -> bool:
    """Rename within one filesystem, unless the name ``target`` is taken.

    :return: false if the filesystem cannot do that in one step (NFS, many FUSE ones); nothing was done then.
    :raises FileExistsError: the name is taken.
    """
    if _libc.renameat2(source_directory, source, target_directory, target, _RENAME_NOREPLACE) == 0:
        return True
    error = _os_error(target)
    if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        raise error
    return False


def rename_noreplace(source_directory: int, source: bytes, target_directory: int, target: bytes) -> None:
    """Rename within one filesystem; raises :class:`FileExistsError` where ``os.rename`` would overwrite.

    If the filesystem cannot, an empty ``target`` is created and then replaced. A crash in between leaves it:
    see :func:`drop_placeholder`.
    """
    if rename_if_free(source_directory, source, target_directory, target):
        return
    create, remove = _PLACEHOLDERS[stat.S_ISDIR(os.lstat(source, dir_fd=source_directory).st_mode)]
    create(target, target_directory)
    try:
        os.rename(source, target, src_dir_fd=source_directory, dst_dir_fd=target_directory)
    except BaseException:
        remove(target, dir_fd=target_directory)
        raise


def drop_placeholder(source_directory: int, source: bytes, target_directory: int, target: bytes) -> None:
    """Remove ``target`` if only a cut-off :func:`rename_noreplace` of ``source`` can have left it."""
    try:
        there = os.lstat(target, dir_fd=target_directory)
    except FileNotFoundError:
        return
    is_directory = stat.S_ISDIR(os.lstat(source, dir_fd=source_directory).st_mode)
    if is_directory and stat.S_ISDIR(there.st_mode):
        with suppress(OSError):  # not empty, so it is the thing itself
            os.rmdir(target, dir_fd=target_directory)
    elif not is_directory and is_file(there) and not there.st_size:
        os.unlink(target, dir_fd=target_directory)


def _make_file(name: bytes, directory: int) -> None:
    os.close(open_for_owner(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, directory=directory))


def _make_directory(name: bytes, directory: int) -> None:
    make_new_directory(name, directory=directory)


# How to create and remove a placeholder for a file, and for a directory.
_PLACEHOLDERS: dict[bool, tuple[Callable[[bytes, int], None], Callable[..., None]]] = {
    False: (_make_file, os.unlink),
    True: (_make_directory, os.rmdir),
}


def _os_error(name: bytes) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), name)
