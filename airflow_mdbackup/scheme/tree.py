"""Files below one directory, reached without ever following a symlink, and what POSIX has but ``os`` lacks.

A :class:`Tree` takes absolute byte paths (``/backups/alpha``) and walks to them from its root by directory
descriptors with ``O_NOFOLLOW``, so that no name, and no link that somebody planted on the way, leads out of
it. Descriptors of directories are kept for the next path. One thread at a time.

Sources: openat(2), renameat2(2), syncfs(2), ioctl_ficlone(2).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Self

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_BLOCK = 1 << 20
_HOLE = 1 << 16  # bytes; of zeros, a hole in what is written
_ZEROS = bytes(_HOLE)


def not_followed(path: str, flags: int) -> int:
    """Open a file for :func:`open`, as its ``opener``, unless a symlink has that name.

    One that root makes belongs to whoever has the directory; see :func:`give_to_owner`.

    :raises OSError: ELOOP.
    """
    return open_for_owner(path, flags, 0o666)


def open_for_owner(
    path: bytes | os.PathLike[str] | str, flags: int, mode: int = 0o600, *, directory: int | None = None
) -> int:
    """Open a file, unless a symlink has that name. One that root makes belongs to its directory's owner.

    :param directory: a descriptor of the one that ``path`` is in, if it is a name.
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
    """Make a directory. One that root makes belongs to the owner of the directory above.

    :param directory: see :func:`open_for_owner`.
    :raises FileExistsError: something has that name.
    """
    os.mkdir(path, mode, dir_fd=directory)
    if os.geteuid() == 0:
        made = os.open(path, _DIRECTORY, dir_fd=directory)
        try:
            give_to_owner(made, _directory_of(path, directory))
        finally:
            os.close(made)


def make_directory(path: Path, mode: int = 0o700, *, parents: bool = False) -> None:
    """Make a directory, as :func:`make_new_directory` does, unless there is one.

    :param parents: make those above it, too.
    :raises FileExistsError: something else has that name.
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
    """Give an open file or directory of root's to the owner of its directory, who has to use it later.

    Not a file with another name, and no directory with something in it: whoever may write to the directory
    might have put it there in place of ours.
    """
    if os.geteuid() != 0:
        return
    status, owner = os.fstat(descriptor), os.stat(directory)
    if status.st_uid != 0 or owner.st_uid == 0:
        return
    if not os.listdir(descriptor) if stat.S_ISDIR(status.st_mode) else status.st_nlink == 1:
        with suppress(PermissionError):  # a root that may not, as in some containers
            os.fchown(descriptor, owner.st_uid, owner.st_gid)


class Blocked(OSError):
    """Something that is no directory stands where a directory of the path belongs.

    :ivar at: the path of that thing.
    :ivar is_symlink: whether it is a symlink.
    """

    def __init__(self, at: bytes, is_symlink: bool) -> None:
        super().__init__(errno.ENOTDIR, os.strerror(errno.ENOTDIR), at)
        self.at = at
        self.is_symlink = is_symlink


class Tree:
    """The files below a directory that exists. Use as a context manager, or :meth:`close` it.

    :param root: the directory: its path, or a descriptor of it, which stays the caller's.
    :param gives: what root makes in it belongs to the owner of the directory in which it is made.
    """

    KEPT = 64  # directory descriptors kept open

    def __init__(self, root: os.PathLike[str] | int, *, gives: bool = True) -> None:
        directory, at = (b".", root) if isinstance(root, int) else (root, None)
        self._root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=at)
        self._gives = gives
        self._kept: OrderedDict[bytes, int] = OrderedDict()
        self._last = b"", self._root  # the directory of the last path, and its descriptor
        self._missing = b"//"  # a directory that was not there when last looked for
        self._shared: OrderedDict[bytes, dict[int, list[bytes]]] = OrderedDict()  # by directory, see has_twin

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.forget_directories()
        os.close(self._root)

    def forget_directories(self) -> None:
        """Close the kept descriptors, which may be of directories that are no longer where they were."""
        self._last = b"", self._root
        self._missing = b"//"
        self._shared.clear()
        while self._kept:
            os.close(self._kept.popitem()[1])

    def _forget(self, directory: bytes) -> None:
        """Close the descriptor of one directory, which has just been taken away, if it is kept."""
        self._shared.pop(directory, None)
        if directory == self._last[0]:
            self._last = b"", self._root
        if (descriptor := self._kept.pop(directory, None)) is not None:
            os.close(descriptor)

    def sync(self) -> None:
        """Bring all that was written to this filesystem onto its disk; see :func:`syncfs`."""
        syncfs(self._root)

    def _parent(self, path: bytes, *, create: bool = False) -> tuple[int, bytes]:
        """Return the descriptor of the directory of ``path``, and the name in it.

        :raises FileNotFoundError: a directory is missing, and ``create`` is false.
        :raises Blocked: something else stands there.
        """
        directory, _, name = path.rpartition(b"/")
        if create:
            self._missing = b"//"  # what is about to be made may stand there
            self._shared.pop(directory, None)
        if directory == self._last[0]:
            return self._last[1], name
        if not create and self._is_missing(directory):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), directory)
        descriptor = self._directory(directory, create)
        self._last = directory, descriptor
        return descriptor, name

    def _is_missing(self, directory: bytes) -> bool:
        """Whether it is known not to be there, from a path shortly before."""
        missing = self._missing
        return directory.startswith(missing) and directory[len(missing) : len(missing) + 1] in b"/"

    def _directory(self, path: bytes, create: bool) -> int:
        names = []
        while path and path not in self._kept:
            path, _, name = path.rpartition(b"/")
            names.append(name)
        descriptor = self._root
        if path:
            descriptor = self._kept[path]
            self._kept.move_to_end(path)
        while names:
            name = names.pop()
            path = path + b"/" + name
            descriptor = self._enter(descriptor, name, path, create)
        return descriptor

    def _enter(self, parent: int, name: bytes, path: bytes, create: bool) -> int:
        """Open the directory ``name``, which is ``path`` from the root, and keep it."""
        try:
            descriptor = os.open(name, _DIRECTORY, dir_fd=parent)
        except FileNotFoundError:
            if not create:
                self._missing = path
                raise
            with suppress(FileExistsError):  # somebody else has just made it
                if self._gives:
                    make_new_directory(name, 0o755, directory=parent)
                else:
                    os.mkdir(name, 0o755, dir_fd=parent)
            descriptor = os.open(name, _DIRECTORY, dir_fd=parent)
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            mode = os.lstat(name, dir_fd=parent).st_mode
            raise Blocked(path, stat.S_ISLNK(mode)) from None
        self._kept[path] = descriptor
        if len(self._kept) > self.KEPT:
            self._forget(next(iter(self._kept)))
        return descriptor

    def lstat(self, path: bytes) -> os.stat_result | None:
        """Return what stands at ``path`` itself, or None. A path below a file or symlink is not there."""
        if path != self._missing and self._is_missing(path):
            return None
        try:
            parent, name = self._parent(path)
            return os.lstat(name, dir_fd=parent)
        except (FileNotFoundError, Blocked):
            return None
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:  # for this filesystem, so that it cannot be there
                return None
            raise

    def has_file(self, path: bytes) -> bool:
        """Whether a regular file is known to stand at ``path``. What cannot be looked at is not known."""
        try:
            return is_file(self.lstat(path))
        except OSError as error:
            if concerns_one_file(error):
                return False
            raise

    def blocker(self, path: bytes) -> Blocked | None:
        """Return what keeps ``path`` from having its directory, or None."""
        if path != self._missing and self._is_missing(path):
            return None
        try:
            self._parent(path)
        except Blocked as blocked:
            # Its traceback leads back to whoever keeps it: files that are open there would stay so.
            blocked.__context__ = None
            return blocked.with_traceback(None)
        except FileNotFoundError:
            pass
        return None

    def open(self, path: bytes) -> int:
        """Return a descriptor for reading the regular file at ``path``.

        :raises FileNotFoundError: there is none, or a symlink or special file stands there.
        """
        try:
            parent, name = self._parent(path)
            descriptor = os.open(name, _FILE, dir_fd=parent)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from None
            raise
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return descriptor

    def files_below(self, directory: bytes = b"") -> Iterator[bytes]:
        """Yield the paths of what is no directory below ``directory``, as the file system spells them.

        What cannot be looked at is left out.

        :raises OSError: nothing else can be looked at either.
        """
        return (path for path, is_directory in self._below(directory) if not is_directory)

    def remove_below(self, directory: bytes = b"") -> None:
        """Take away all that lies below ``directory``, which stays.

        :raises OSError: something resists, or somebody adds to it. The rest is still there.
        """
        for path, is_directory in self._below(directory):
            parent, name = self._parent(path)
            if is_directory:
                os.rmdir(name, dir_fd=parent)
                self._forget(path)
            else:
                os.unlink(name, dir_fd=parent)

    def _below(self, directory: bytes) -> Iterator[tuple[bytes, bool]]:
        """Yield what lies below ``directory``, behind what lies below that, and whether it is a directory.

        Without recursion, and without a descriptor for each level: a provider may nest two thousand. Paths
        of directories to come are kept as names in their parents, or else many with a long one fill memory.
        """
        ahead: list[tuple[bytes, list[bytes]]] = []
        folder = directory
        while True:
            files, folders = self._listed(folder)
            yield from ((folder + b"/" + name, False) for name in files)
            ahead.append((folder, folders))
            while not ahead[-1][1]:
                folder, _ = ahead.pop()
                if not ahead:
                    return
                yield folder, True
            parent, names = ahead[-1]
            folder = parent + b"/" + names.pop()

    def _listed(self, directory: bytes) -> tuple[list[bytes], list[bytes]]:
        """Return the names of what is no directory in ``directory``, and of the directories in it.

        There are none where it cannot be listed.
        """
        names: tuple[list[bytes], list[bytes]] = [], []
        try:
            with os.scandir(self._directory(directory, create=False)) as entries:
                for entry in entries:
                    names[entry.is_dir(follow_symlinks=False)].append(os.fsencode(entry.name))
        except OSError as error:
            if not concerns_one_file(error):
                raise
        return names

    def names_in(self, directory: bytes) -> list[bytes]:
        """Return the names in a directory; none if it is not there."""
        try:
            return list(map(os.fsencode, os.listdir(self._directory(directory, create=False))))
        except (FileNotFoundError, Blocked):
            return []

    @contextmanager
    def opened(self, path: bytes) -> Iterator[int]:
        """Hold a descriptor for reading the regular file at ``path``; see :meth:`open`."""
        descriptor = self.open(path)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def has_twin(self, path: bytes) -> bool:
        """Whether another name in the same directory is the same file.

        The directory is read once for many files, until this tree makes a name in it. What it had then is
        looked at again, so that nobody who takes names away meanwhile has the last one taken for a second.
        """
        parent, name = self._parent(path)
        status = os.lstat(name, dir_fd=parent)
        directory = path.rpartition(b"/")[0]
        if directory not in self._shared:
            self._shared[directory] = _names_by_shared_inode(parent)
            if len(self._shared) > self.KEPT:
                self._shared.popitem(last=False)
        others = self._shared[directory].get(status.st_ino, ())
        return any(other != name and _is_same(other, parent, status) for other in others)

    def link(self, source: bytes, target: bytes) -> None:
        """Give the file ``source`` a second name, making directories for it; never overwrites.

        :raises FileExistsError: something has the name ``target``.
        """
        to, new = self._parent(target, create=True)
        there, name = self._parent(source)
        os.link(name, new, src_dir_fd=there, dst_dir_fd=to, follow_symlinks=False)

    def create(self, path: bytes) -> int:
        """Return a descriptor for writing a new file at ``path``, making directories for it.

        :raises FileExistsError: something has that name.
        """
        parent, name = self._parent(path, create=True)
        return open_for_owner(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, directory=parent)

    def give(self, path: bytes) -> None:
        """Give the file at ``path`` to the owner of its directory, if root does this, and it is root's.

        :raises FileNotFoundError: there is none, and root does this.
        """
        if os.geteuid() == 0:
            with self.opened(path) as descriptor:
                give_to_owner(descriptor, self._parent(path)[0])

    def put(self, source: Folder, file: bytes, path: bytes) -> None:
        """Move a file of ``source`` to ``path`` in one step, over a file that stands there.

        :raises FileNotFoundError: ``source`` does not have it.
        """
        parent, name = self._parent(path, create=True)
        os.rename(file, name, src_dir_fd=source.descriptor, dst_dir_fd=parent)

    def put_new(self, source: Folder, file: bytes, path: bytes) -> None:
        """Move a file of ``source`` to ``path`` in one step; never overwrites.

        :raises FileExistsError: something has that name.
        """
        parent, name = self._parent(path, create=True)
        rename_noreplace(source.descriptor, file, parent, name)

    def drop_rest(self, source: Folder, file: bytes, path: bytes) -> None:
        """Take away what stands at ``path``, if it can only be what a cut-off :meth:`put_new` left there."""
        parent, name = self._parent(path, create=True)
        if os.lstat(file, dir_fd=source.descriptor).st_size:
            drop_placeholder(source.descriptor, file, parent, name)

    def move(self, source: bytes, target: bytes) -> None:
        """Move whatever stands at ``source`` as a whole to ``target``; never overwrites.

        :raises FileExistsError: something has the name ``target``.
        """
        to, new = self._parent(target, create=True)
        there, name = self._parent(source)
        rename_noreplace(there, name, to, new)
        self.forget_directories()

    def move_again(self, source: bytes, target: bytes) -> bool:
        """Go on with a :meth:`move` that was cut off, if it was. Return whether ``target`` is there then.

        What came to ``source`` since, if the move was carried out, is a directory where it was none, or the
        reverse.
        """
        if self.lstat(source) is not None:
            self.drop_placeholder(source, target)
            if self.lstat(target) is None:
                self.move(source, target)
        return self.lstat(target) is not None

    def drop_placeholder(self, source: bytes, target: bytes) -> None:
        """Take away what stands at ``target``, if it can only be what a cut-off :meth:`move` left there.

        :raises FileNotFoundError: nothing stands at ``source``.
        """
        to, new = self._parent(target, create=True)
        there, name = self._parent(source)
        drop_placeholder(there, name, to, new)

    def unlink(self, path: bytes) -> None:
        """Take the name ``path`` away. Its bytes live on under another, or a person wants them to go."""
        parent, name = self._parent(path)
        os.unlink(name, dir_fd=parent)

    def remove_empty(self, directory: bytes) -> bool:
        """Take a directory away if it is empty, and return whether it was."""
        try:
            parent, name = self._parent(directory)
            os.rmdir(name, dir_fd=parent)
        except OSError as error:
            if not concerns_one_file(error):
                raise
            return False
        self._forget(directory)
        return True


def _names_by_shared_inode(directory: int) -> dict[int, list[bytes]]:
    """Return the inodes that more than one name in an open directory has, each with its names."""
    once, again = set[int](), set[int]()
    with os.scandir(directory) as entries:
        for entry in entries:
            (again if entry.inode() in once else once).add(entry.inode())
    names: dict[int, list[bytes]] = {}
    if again:
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.inode() in again:
                    names.setdefault(entry.inode(), []).append(os.fsencode(entry.name))
    return names


def _is_same(name: bytes, directory: int, status: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.lstat(name, dir_fd=directory), status)
    except FileNotFoundError:
        return False


class Folder:
    """The files of one directory, by name. A context manager.

    :param directory: its path, or a descriptor of it, which is the folder's from now on.
    """

    def __init__(self, directory: os.PathLike[str] | int) -> None:
        if isinstance(directory, int):
            self.descriptor = directory
        else:
            self.descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self.descriptor)

    def sync(self) -> None:
        """Bring all that was written to this filesystem onto its disk; see :func:`syncfs`."""
        syncfs(self.descriptor)

    def has(self, name: bytes) -> bool:
        """Whether there is a regular file of that name."""
        try:
            return is_file(os.lstat(name, dir_fd=self.descriptor))
        except FileNotFoundError:
            return False

    def open(self, name: bytes) -> int:
        """Return a descriptor for reading.

        :raises FileNotFoundError: there is no such file.
        """
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.descriptor)

    def needs_placeholders(self, one: bytes, other: bytes) -> bool:
        """Whether :func:`rename_noreplace` makes placeholders on this filesystem, which a kill leaves.

        :param one: a name that nothing has, and ``other`` likewise: it is tried with a file.
        """
        os.close(open_for_owner(one, os.O_WRONLY | os.O_CREAT | os.O_EXCL, directory=self.descriptor))
        try:
            return not rename_if_free(self.descriptor, one, self.descriptor, other)
        finally:
            self.remove(one)
            self.remove(other)

    def is_whole(self, name: bytes, md5: bytes) -> bool:
        """Whether a file has the content that it should have, by hashing it.

        :raises OSError: there is none, or none that can be read.
        """
        descriptor = self.open(name)
        try:
            return md5_of(descriptor) == md5
        finally:
            os.close(descriptor)

    def remove(self, name: bytes) -> None:
        """Take a file away, if it is there."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.descriptor)


def remove_tree(directory: os.PathLike[str]) -> None:
    """Take a directory away with all that lies below it, however deep that is nested. What resists stays."""
    with suppress(OSError):
        # Not what a symlink of that name leads to.
        with Folder(os.open(directory, _DIRECTORY)) as folder, Tree(folder.descriptor) as tree:
            tree.remove_below()
        os.rmdir(directory)


def is_file(status: os.stat_result | None) -> bool:
    """Whether a regular file stands there."""
    return status is not None and stat.S_ISREG(status.st_mode)


def seconds(status: os.stat_result) -> int:
    """Return when a file was written last, in whole Unix seconds, rounded down; negative before 1970.

    ``st_mtime`` is a float, which rounds a time that is far away up.
    """
    return status.st_mtime_ns // 10**9


def concerns_one_file(error: OSError) -> bool:
    """Whether an error is about the file that was touched, and not about the disk or the process."""
    return error.errno not in _OF_ALL


_OF_ALL = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE, errno.ENODEV),
    *(errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT),  # of network and FUSE file systems
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
)


# --- bytes ------------------------------------------------------------------------------------------


def md5_of(descriptor: int, into: int | None = None, progress: Callable[[int], None] | None = None) -> bytes:
    """Return the md5 of what a file has on its disk, from where ``descriptor`` stands to its end.

    What was written a moment ago is not there yet; see :func:`forget_cached`.

    :param into: a descriptor that gets a copy of the bytes.
    :param progress: called with the number of bytes of each block.
    """
    md5 = hashlib.md5(usedforsecurity=False)
    forget_cached(descriptor)
    while block := os.read(descriptor, _BLOCK):
        md5.update(block)
        if into is not None:
            write_sparse(into, block)
        if progress is not None:
            progress(len(block))
    if into is not None:
        end_sparse(into)
    return md5.hexdigest().encode()


def forget_cached(descriptor: int) -> None:
    """Have an open file read from its disk, and not from memory.

    If a disk refuses to take what was written, the kernel says so once, to those who are there to hear it.
    From then on memory has bytes that pass for the disk's. Bytes that are still to be written stay in memory,
    and an error in doing so is told to the next ``sync``. posix_fadvise(2).
    """
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def copy_of(source: int, target: int) -> bytes:
    """Make one open file a copy of another, whatever it was, and return the md5 of what was copied.

    Blocks are shared where the filesystem can.
    """
    # Cloning replaces only as much as there is to be cloned. What is empty is left so, since ext4 brings a
    # file that was truncated onto the disk as soon as it is closed.
    if os.fstat(target).st_size:
        os.ftruncate(target, 0)
    os.lseek(target, 0, os.SEEK_SET)
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return md5_of(source, into=target)
    return md5_of(source)


def shares_blocks(directory: os.PathLike[str]) -> bool:
    """Whether :func:`copy_of` takes no room for content within the filesystem of ``directory``."""
    with TemporaryFile(dir=directory, buffering=0) as source, TemporaryFile(dir=directory) as target:
        source.write(bytes(4096))
        try:
            fcntl.ioctl(target, _FICLONE, source.fileno())
        except OSError:
            return False
    return True


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of ``data``, which ``os.write`` need not do in one go."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def write_sparse(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of ``data`` where the file stands, leaving a hole where it is nothing but zeros.

    At the end of the file holes are made by :func:`end_sparse`.
    """
    view = memoryview(data)
    done = 0
    for start in range(0, len(view), _HOLE):
        block = view[start : start + _HOLE]
        if block == _ZEROS[: len(block)]:
            write_all(descriptor, view[done:start])
            os.lseek(descriptor, len(block), os.SEEK_CUR)
            done = start + len(block)
    write_all(descriptor, view[done:])


def end_sparse(descriptor: int) -> None:
    """Have a file end where it stands, if it ends in a hole."""
    position = os.lseek(descriptor, 0, os.SEEK_CUR)
    if os.fstat(descriptor).st_size < position:
        os.ftruncate(descriptor, position)


# --- what os lacks ----------------------------------------------------------------------------------

_FICLONE = 0x40049409
_RENAME_NOREPLACE = 1
_libc = ctypes.CDLL(None, use_errno=True)


def syncfs(descriptor: int) -> None:
    """Bring everything written to the filesystem of an open directory onto its disk.

    One call instead of an fsync for each of many files. Whatever the disk has refused since the directory was
    opened is an error here (since Linux 5.8), whoever else was told of it; what it refused before is not. So
    it must be open before the first byte is written that this call is to vouch for.
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
    """Rename within one filesystem, if nothing has the name ``target``.

    :return: false if the filesystem cannot do that in one step (NFS, many of FUSE), so that nothing was done.
    :raises FileExistsError: something has that name.
    """
    if _libc.renameat2(source_directory, source, target_directory, target, _RENAME_NOREPLACE) == 0:
        return True
    error = _os_error(target)
    if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        raise error
    return False


def rename_noreplace(source_directory: int, source: bytes, target_directory: int, target: bytes) -> None:
    """Rename within one filesystem; fails with :class:`FileExistsError` where ``os.rename`` overwrites.

    Where the filesystem cannot, ``target`` is made first, empty, and then renamed over. A crash in between
    leaves it: see :func:`drop_placeholder`.
    """
    if rename_if_free(source_directory, source, target_directory, target):
        return
    make, take_away = _PLACEHOLDERS[stat.S_ISDIR(os.lstat(source, dir_fd=source_directory).st_mode)]
    make(target, target_directory)
    try:
        os.rename(source, target, src_dir_fd=source_directory, dst_dir_fd=target_directory)
    except BaseException:
        take_away(target, dir_fd=target_directory)
        raise


def drop_placeholder(source_directory: int, source: bytes, target_directory: int, target: bytes) -> None:
    """Take ``target`` away if it can only be what a cut-off :func:`rename_noreplace` of ``source`` left."""
    try:
        there = os.lstat(target, dir_fd=target_directory)
    except FileNotFoundError:
        return
    is_directory = stat.S_ISDIR(os.lstat(source, dir_fd=source_directory).st_mode)
    if is_directory and stat.S_ISDIR(there.st_mode):
        with suppress(OSError):  # it is not empty, and so the thing itself
            os.rmdir(target, dir_fd=target_directory)
    elif not is_directory and is_file(there) and not there.st_size:
        os.unlink(target, dir_fd=target_directory)


def _make_file(name: bytes, directory: int) -> None:
    os.close(open_for_owner(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, directory=directory))


def _make_directory(name: bytes, directory: int) -> None:
    make_new_directory(name, directory=directory)


# How to make and take away what holds the place of a file, and of a directory.
_PLACEHOLDERS: dict[bool, tuple[Callable[[bytes, int], None], Callable[..., None]]] = {
    False: (_make_file, os.unlink),
    True: (_make_directory, os.rmdir),
}


def _os_error(name: bytes) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), name)
