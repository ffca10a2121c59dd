"""TODO"""

from __future__ import annotations

import fcntl
import os

from airflow_mdbackup.scheme.files.content import write_all
from airflow_mdbackup.scheme.files.syscalls import concerns_one_file, open_for_owner, rename_if_free
from airflow_mdbackup.scheme.files.tree import Folder


class Staging(Folder):
    """Verified content that is not in the mirror yet, by md5. For one thread.

    Whatever has an md5 as its name was whole and verified when it got that. After a crash of the machine it
    need not be any more, unless a durable result tells of it.
    """

    def store(self, md5: bytes, content: bytes, folder: Folder, name: bytes) -> None:
        """Stage small content, in one step, unless another task just has.

        :param folder: where it is written, as ``name``, which nobody else uses.
        :raises OSError: the disk is full or broken.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        descriptor = open_for_owner(name, flags, directory=folder.descriptor)
        try:
            write_all(descriptor, content)
        finally:
            os.close(descriptor)
        self._take_in(folder, name, md5)

    def _take_in(self, folder: Folder, name: bytes, md5: bytes) -> None:
        """Give verified content its md5 as name; not over what another task's results tell of.

        Where a name cannot be taken only if it is free, it is taken all the same: what was there is hashed
        before use, since no result tells of this file. An empty placeholder might pass for content.
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
        """Return what is known of a file; None if it is not there, as when a commit has just taken it."""
        try:
            return os.lstat(name, dir_fd=self.descriptor)
        except FileNotFoundError:
            return None

    def holds(self, md5: bytes, inode: int | None, changed: int | None) -> bool:
        """Whether content is staged that was that inode, last changed then, in nanoseconds.

        What was staged since, and not brought onto the disk, a power cut may have spoilt. So a durable result
        vouches for the very file of which it tells.
        """
        staged = self.status(md5)
        return staged is not None and (staged.st_ino, staged.st_ctime_ns) == (inode, changed)

    def parts(self) -> set[bytes]:
        """Return the md5s of which a part is there."""
        names = map(os.fsencode, os.listdir(self.descriptor))
        return {name.removesuffix(b".part") for name in names if name.endswith(b".part")}

    def part(self, md5: bytes) -> os.stat_result | None:
        """Return what is known of what has come of content; None if nothing has."""
        return self.status(md5 + b".part")

    def is_being_written(self, md5: bytes) -> bool:
        """Whether some task is at a part now. Of what cannot be opened that is not known."""
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
        """Return how many of the ``size`` bytes of content that is not staged have not come yet."""
        part = self.part(md5)
        return size if part is None else max(0, size - part.st_size)

    def lock_part(self, md5: bytes) -> int | None:
        """Return a descriptor of what has come of content, locked; None if another task is at it.

        What is there may be of any length, and is proven by nothing yet.

        :raises OSError: there is one, but not for us.
        """
        name = md5 + b".part"
        while True:
            part = open_for_owner(name, os.O_RDWR | os.O_CREAT, directory=self.descriptor)
            try:
                fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Its last writer may have renamed or removed it between our open and our lock.
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
        """Stage content that is whole and verified now, unless another task has. Its part must be locked."""
        self._take_in(self, md5 + b".part", md5)

    def drop_part(self, md5: bytes) -> None:
        """Take away what has come of content, if it is there. It must be locked."""
        self.remove(md5 + b".part")
