"""Content that is already on this side: staged, live under the wanted path, or live under another one.

A live file that should have it is always hashed before it is used.
"""

from __future__ import annotations

import os

from airflow_mdbackup.scheme.backup.plan import PlanItem
from airflow_mdbackup.scheme.backup.results import Result
from airflow_mdbackup.scheme.files.content import copy_of, md5_of
from airflow_mdbackup.scheme.files.syscalls import concerns_one_file
from airflow_mdbackup.scheme.files.tree import Tree
from airflow_mdbackup.scheme.history.outcomes import Outcome
from airflow_mdbackup.scheme.store.staging import Staging


class LocalContent:
    """Finds what need not be transferred from the provider.

    :ivar parts: md5s with an incomplete file in staging when the task began.
    """

    def __init__(self, tree: Tree, staging: Staging) -> None:
        self._tree = tree
        self._staging = staging
        self.parts = staging.parts()

    def is_staged(self, md5: bytes) -> bool:
        """Whether staging has the content. A staged file with other content is removed."""
        if not self._staging.has(md5):
            return False
        try:
            if self._staging.is_whole(md5, md5):
                return True
        except OSError as error:
            if not concerns_one_file(error):
                raise
        self._staging.remove(md5)
        return False

    def adopt(self, item: PlanItem) -> Result | None:
        """Return the result if the live file already has the wanted content, else None."""
        try:
            with self._tree.opened(item.path) as descriptor:
                status = os.fstat(descriptor)
                if md5_of(descriptor) != item.md5:
                    return None
        except OSError as error:
            if not concerns_one_file(error):
                raise
            return None
        return Result(
            *(item.path, item.md5, item.replaces, Outcome.ADOPTED),
            size=status.st_size,
            inode=status.st_ino,
            modified=status.st_mtime_ns,
        )

    def copy(self, item: PlanItem) -> bool:
        """Copy the content from a live file that should have it; false if it does not.

        A part that was already received from the provider is not discarded for that.
        """
        assert item.source is not None
        part = self.lock_part(item.md5)
        if part is None:
            return False
        try:
            if os.fstat(part).st_size:
                return False
            self.parts.discard(item.md5)
            if self._staging.has(item.md5):  # another task has just staged it
                self._staging.drop_part(item.md5)
                return self.is_staged(item.md5)
            if self._copy(item.source, part) == item.md5:
                self._staging.keep_part(item.md5)
                return True
            self._staging.drop_part(item.md5)
            return False
        finally:
            os.close(part)

    def _copy(self, source: bytes, part: int) -> bytes | None:
        """Copy a live file and return the md5 of the copy; None if it cannot be read."""
        try:
            with self._tree.opened(source) as live:
                return copy_of(live, part)
        except OSError as error:
            if not concerns_one_file(error):
                raise
            return None

    def size_of_live(self, path: bytes | None) -> int:
        """Return the size of a live file in bytes; 0 if it does not exist or cannot be read."""
        if path is None:
            return 0
        try:
            with self._tree.opened(path) as live:
                return os.fstat(live).st_size
        except OSError as error:
            if not concerns_one_file(error):
                raise
            return 0

    def lock_part(self, md5: bytes) -> int | None:
        """Open and lock a part; None if another task writes it, or we may not."""
        try:
            return self._staging.lock_part(md5)
        except OSError as error:
            if not concerns_one_file(error) or self._staging.part(md5) is None:
                raise
            return None

    def drop_part(self, md5: bytes) -> None:
        """Remove a part whose content is staged by now, unless another task writes it."""
        part = self.lock_part(md5)
        if part is not None:
            self._staging.drop_part(md5)
            os.close(part)
