"""Files below one directory, reached without ever following a symlink.

A :class:`Tree` takes absolute byte paths (``/backups/alpha``) and walks to them from its root by directory
descriptors with ``O_NOFOLLOW``, so that no name and no planted link leads out of it. Descriptors of
directories are kept for the next path. For one thread at a time.

Source: openat(2).
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from airflow_mdbackup.scheme.files import syscalls
from airflow_mdbackup.scheme.files.folder import Folder
from airflow_mdbackup.scheme.files.syscalls import (
    OPEN_DIRECTORY,
    concerns_one_file,
    drop_placeholder,
    give_to_owner,
    is_file,
    make_new_directory,
    open_for_owner,
    rename_noreplace,
)

_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class PathBlocked(OSError):
    """Something other than a directory is where a directory of the path should be.

    :ivar at: its path.
    :ivar is_symlink: whether it is a symlink.
    """

    def __init__(self, at: bytes, is_symlink: bool) -> None:
        super().__init__(errno.ENOTDIR, os.strerror(errno.ENOTDIR), at)
        self.at = at
        self.is_symlink = is_symlink


class Tree:
    """The files below a directory that exists. Use as a context manager, or :meth:`close` it.

    :param root: the path of the directory, or a descriptor of it, which the caller closes.
    :param gives: whether what root creates in it is given to the owner of its parent directory.
    """

    KEPT = 64  # directory descriptors kept open

    def __init__(self, root: os.PathLike[str] | int, *, gives: bool = True) -> None:
        directory, at = (b".", root) if isinstance(root, int) else (root, None)
        self._root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=at)
        self._gives = gives
        self._kept: OrderedDict[bytes, int] = OrderedDict()
        self._last = b"", self._root  # the directory of the last path, and its descriptor
        self._missing = b"//"  # a directory that was missing at the last lookup
        self._shared: OrderedDict[bytes, dict[int, list[bytes]]] = OrderedDict()  # by directory, see has_twin

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.forget_directories()
        os.close(self._root)

    def forget_directories(self) -> None:
        """Close the kept descriptors; their directories may have been moved."""
        self._last = b"", self._root
        self._missing = b"//"
        self._shared.clear()
        while self._kept:
            os.close(self._kept.popitem()[1])

    def _forget(self, directory: bytes) -> None:
        """Close the descriptor of a directory that has just been removed, if it is kept."""
        self._shared.pop(directory, None)
        if directory == self._last[0]:
            self._last = b"", self._root
        if (descriptor := self._kept.pop(directory, None)) is not None:
            os.close(descriptor)

    def sync(self) -> None:
        """Write everything on this filesystem to its disk; see :func:`.syncfs`."""
        syscalls.syncfs(self._root)

    def _parent(self, path: bytes, *, create: bool = False) -> tuple[int, bytes]:
        """Return the descriptor of the directory of ``path``, and the name in it.

        :raises FileNotFoundError: a directory is missing, and ``create`` is false.
        :raises PathBlocked: something else is there.
        """
        directory, _, name = path.rpartition(b"/")
        if create:
            self._missing = b"//"  # it may be about to be created
            self._shared.pop(directory, None)
        if directory == self._last[0]:
            return self._last[1], name
        if not create and self._is_missing(directory):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), directory)
        descriptor = self._directory(directory, create)
        self._last = directory, descriptor
        return descriptor, name

    def _is_missing(self, directory: bytes) -> bool:
        """Whether the last lookup showed that it is missing."""
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
            descriptor = os.open(name, OPEN_DIRECTORY, dir_fd=parent)
        except FileNotFoundError:
            if not create:
                self._missing = path
                raise
            with suppress(FileExistsError):  # created by somebody else just now
                if self._gives:
                    make_new_directory(name, 0o755, directory=parent)
                else:
                    os.mkdir(name, 0o755, dir_fd=parent)
            descriptor = os.open(name, OPEN_DIRECTORY, dir_fd=parent)
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            mode = os.lstat(name, dir_fd=parent).st_mode
            raise PathBlocked(path, stat.S_ISLNK(mode)) from None
        self._kept[path] = descriptor
        if len(self._kept) > self.KEPT:
            self._forget(next(iter(self._kept)))
        return descriptor

    def lstat(self, path: bytes) -> os.stat_result | None:
        """Return the status of ``path`` itself, or None. A path below a file or symlink does not exist."""
        if path != self._missing and self._is_missing(path):
            return None
        try:
            parent, name = self._parent(path)
            return os.lstat(name, dir_fd=parent)
        except (FileNotFoundError, PathBlocked):
            return None
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:  # for this filesystem, so it cannot exist
                return None
            raise

    def has_file(self, path: bytes) -> bool:
        """Whether a regular file is at ``path``. False if that cannot be seen."""
        try:
            return is_file(self.lstat(path))
        except OSError as error:
            if concerns_one_file(error):
                return False
            raise

    def blocker(self, path: bytes) -> PathBlocked | None:
        """Return what keeps ``path`` from having its directory, or None."""
        if path != self._missing and self._is_missing(path):
            return None
        try:
            self._parent(path)
        except PathBlocked as blocked:
            # Its traceback would keep the frames of its callers, and the files open in them.
            blocked.__context__ = None
            return blocked.with_traceback(None)
        except FileNotFoundError:
            pass
        return None

    def open(self, path: bytes) -> int:
        """Return a descriptor for reading the regular file at ``path``.

        :raises FileNotFoundError: it is missing, or a symlink or special file.
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
        """Yield the paths of everything but directories below ``directory``, as the file system spells them.

        Directories that cannot be read are left out.

        :raises OSError: the disk or the process fails as a whole.
        """
        return (path for path, is_directory in self._below(directory) if not is_directory)

    def remove_below(self, directory: bytes = b"") -> None:
        """Remove everything below ``directory``, but not the directory itself.

        :raises OSError: something cannot be removed, or is added meanwhile. The rest is still there.
        """
        for path, is_directory in self._below(directory):
            parent, name = self._parent(path)
            if is_directory:
                os.rmdir(name, dir_fd=parent)
                self._forget(path)
            else:
                os.unlink(name, dir_fd=parent)

    def _below(self, directory: bytes) -> Iterator[tuple[bytes, bool]]:
        """Yield each path below ``directory``, children first, and whether it is a directory.

        Without recursion, and without a descriptor per level: a provider may nest two thousand. Directories
        still to be read are kept as names, because many long paths would fill memory.
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
        """Return the names in ``directory``: those that are not directories, and those that are.

        Both are empty if it cannot be listed.
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
        """Return the names in a directory; an empty list if it is missing."""
        try:
            return list(map(os.fsencode, os.listdir(self._directory(directory, create=False))))
        except (FileNotFoundError, PathBlocked):
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

        The directory is read once for many files, until this tree creates a name in it. Names found then are
        checked again, because one that was removed meanwhile is not a second name.
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
        """Give the file ``source`` a second name, creating its directories; never overwrites.

        :raises FileExistsError: something has the name ``target``.
        """
        to, new = self._parent(target, create=True)
        there, name = self._parent(source)
        os.link(name, new, src_dir_fd=there, dst_dir_fd=to, follow_symlinks=False)

    def create(self, path: bytes) -> int:
        """Return a descriptor for writing a new file at ``path``, creating its directories.

        :raises FileExistsError: something has that name.
        """
        parent, name = self._parent(path, create=True)
        return open_for_owner(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, directory=parent)

    def give(self, path: bytes) -> None:
        """Give the file at ``path`` to the owner of its directory, if it is root's and root calls this.

        :raises FileNotFoundError: it is missing, and root calls this.
        """
        if os.geteuid() == 0:
            with self.opened(path) as descriptor:
                give_to_owner(descriptor, self._parent(path)[0])

    def put(self, source: Folder, file: bytes, path: bytes) -> None:
        """Move a file of ``source`` to ``path`` in one step, replacing a file there.

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
        """Remove what is at ``path`` if only a cut-off :meth:`put_new` can have left it there."""
        parent, name = self._parent(path, create=True)
        if os.lstat(file, dir_fd=source.descriptor).st_size:
            drop_placeholder(source.descriptor, file, parent, name)

    def move(self, source: bytes, target: bytes) -> None:
        """Move whatever is at ``source`` to ``target`` as a whole; never overwrites.

        :raises FileExistsError: something has the name ``target``.
        """
        to, new = self._parent(target, create=True)
        there, name = self._parent(source)
        rename_noreplace(there, name, to, new)
        self.forget_directories()

    def move_again(self, source: bytes, target: bytes) -> bool:
        """Finish a :meth:`move` that may have been cut off; return whether ``target`` exists then.

        If the move was done, anything at ``source`` is newer: a directory where it was not one, or the
        reverse.
        """
        if self.lstat(source) is not None:
            self.drop_placeholder(source, target)
            if self.lstat(target) is None:
                self.move(source, target)
        return self.lstat(target) is not None

    def drop_placeholder(self, source: bytes, target: bytes) -> None:
        """Remove what is at ``target`` if only a cut-off :meth:`move` can have left it there.

        :raises FileNotFoundError: nothing is at ``source``.
        """
        to, new = self._parent(target, create=True)
        there, name = self._parent(source)
        drop_placeholder(there, name, to, new)

    def unlink(self, path: bytes) -> None:
        """Remove the name ``path``. Its bytes have another name, or an operator wants them deleted."""
        parent, name = self._parent(path)
        os.unlink(name, dir_fd=parent)

    def remove_empty(self, directory: bytes) -> bool:
        """Remove a directory if it is empty, and return whether it was."""
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
    """Return the inodes with more than one name in an open directory, each with its names."""
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


def remove_tree(directory: os.PathLike[str]) -> None:
    """Remove a directory and everything below it, at any depth. What cannot be removed stays."""
    with suppress(OSError):
        # Not through a symlink.
        with Folder(os.open(directory, OPEN_DIRECTORY)) as folder, Tree(folder.descriptor) as tree:
            tree.remove_below()
        os.rmdir(directory)


class TreePerThread:
    """A tree per thread, because a tree is for one thread only. A context manager.

    :param make: opens one.
    """

    def __init__(self, make: Callable[[], Tree]) -> None:
        self._make = make
        self._own = threading.local()
        self._opened = ExitStack()
        self._lock = threading.Lock()

    def __enter__(self) -> TreePerThread:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def __call__(self) -> Tree:
        """Return the tree of the calling thread."""
        tree: Tree | None = getattr(self._own, "tree", None)
        if tree is None:
            tree = self._own.tree = self._make()
            with self._lock:
                self._opened.enter_context(tree)
        return tree
