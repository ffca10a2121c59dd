"""Staging: verified content, and partial files, waiting to become live."""

from __future__ import annotations

import fcntl
import os

from airflow_mdbackup.scheme.files.content import write_all
from airflow_mdbackup.scheme.files.folder import Folder
from airflow_mdbackup.scheme.files.syscalls import concerns_one_file, open_for_owner, rename_if_free


class Staging(Folder):
    """Verified content that is not in the mirror yet, by md5. For one thread.

    A file was whole and verified when it got an md5 as its name. After a crash of the machine that may no
    longer be true, unless a durable result vouches for it.
    """

    def store(self, md5: bytes, content: bytes, folder: Folder, name: bytes) -> None:
        """Stage small content, in one step, unless another task has just done so.

        :param folder: where it is written first, as ``name``, which must be unused.
        :raises OSError: the disk is full or broken.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        descriptor = open_for_owner(name, flags, directory=folder.descriptor)
        try:
            write_all(descriptor, content)
        finally:
            os.close(descriptor)
        self._rename_to_md5(folder, name, md5)

    def _rename_to_md5(self, folder: Folder, name: bytes, md5: bytes) -> None:
        """Rename verified content to its md5, not over a file that another task's results vouch for.

        If the filesystem cannot rename without overwriting, it overwrites: no result vouches for this file,
        so it is hashed before use. An empty placeholder might be mistaken for content.
        """
        try:
            if rename_if_free(folder.descriptor, name, self.descriptor, md5):
                return
        except FileExistsError:
            if self.has(md5):
                folder.remove(name)
                return
        os.rename(name, md5, src_dir_fd=folder.descriptor, dst_dir_fd=self.descriptor)

    def status(self, name: bytes) -> os.stat_result | None:
        """Return the status of a file; None if it is missing, for example just committed."""
        try:
            return os.lstat(name, dir_fd=self.descriptor)
        except FileNotFoundError:
            return None

    def holds(self, md5: bytes, inode: int | None, changed: int | None) -> bool:
        """Whether content is staged as this inode with this change time, in nanoseconds.

        A file that was staged later and not synced may be damaged by a power cut. So a durable result vouches
        only for the very file that it recorded.
        """
        staged = self.status(md5)
        return staged is not None and (staged.st_ino, staged.st_ctime_ns) == (inode, changed)

    def parts(self) -> set[bytes]:
        """Return the md5s that have a partial file."""
        names = map(os.fsencode, os.listdir(self.descriptor))
        return {name.removesuffix(b".part") for name in names if name.endswith(b".part")}

    def part(self, md5: bytes) -> os.stat_result | None:
        """Return the status of the partial file of content; None if there is none."""
        return self.status(md5 + b".part")

    def is_being_written(self, md5: bytes) -> bool:
        """Whether a task is writing a partial file. False if it cannot be opened."""
        try:
            part = os.open(md5 + b".part", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.descriptor)
        except OSError as error:
            if not concerns_one_file(error):
                raise
            return False
        try:
            fcntl.flock(part, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(part)
        return False

    def lacks(self, md5: bytes, size: int) -> int:
        """Return how many of the ``size`` bytes of content that is not staged are still missing."""
        part = self.part(md5)
        return size if part is None else max(0, size - part.st_size)

    def lock_part(self, md5: bytes) -> int | None:
        """Return a descriptor of the partial file of content, locked; None if another task is writing it.

        It may have any length, and is not verified.

        :raises OSError: it cannot be opened.
        """
        name = md5 + b".part"
        while True:
            part = open_for_owner(name, os.O_RDWR | os.O_CREAT, directory=self.descriptor)
            try:
                fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Its last writer may have renamed or removed it before we had the lock.
                if os.path.samestat(os.fstat(part), os.stat(name, dir_fd=self.descriptor)):
                    return part
                os.close(part)
            except FileNotFoundError:
                os.close(part)
            except BlockingIOError:
                os.close(part)
                return None
            except BaseException:
                os.close(part)
                raise

    def keep_part(self, md5: bytes) -> None:
        """Stage a partial file that is now whole and verified, unless another task has. It must be locked."""
        self._rename_to_md5(self, md5 + b".part", md5)

    def drop_part(self, md5: bytes) -> None:
        """Remove the partial file of content, if there is one. It must be locked."""
        self.remove(md5 + b".part")
