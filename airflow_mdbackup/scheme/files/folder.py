"""The files of one directory, by name."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Self

from airflow_mdbackup.scheme.files import syscalls
from airflow_mdbackup.scheme.files.content import md5_of
from airflow_mdbackup.scheme.files.syscalls import is_file, open_for_owner, rename_if_free


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
        """Write everything on this filesystem to its disk; see :func:`.syncfs`."""
        syscalls.syncfs(self.descriptor)

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
        """Whether :func:`rename_noreplace` needs placeholders on this filesystem, which a kill leaves behind.

        :param one: an unused name, and ``other`` likewise: it is tried with a file.
        """
        os.close(open_for_owner(one, os.O_WRONLY | os.O_CREAT | os.O_EXCL, directory=self.descriptor))
        try:
            return not rename_if_free(self.descriptor, one, self.descriptor, other)
        finally:
            self.remove(one)
            self.remove(other)

    def is_whole(self, name: bytes, md5: bytes) -> bool:
        """Whether a file has the right content, by hashing it.

        :raises OSError: it is missing or cannot be read.
        """
        descriptor = self.open(name)
        try:
            return md5_of(descriptor) == md5
        finally:
            os.close(descriptor)

    def remove(self, name: bytes) -> None:
        """Remove a file, if it is there."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.descriptor)
