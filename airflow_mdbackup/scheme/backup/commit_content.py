"""Where the new bytes of an entry are: staged, or in another file with the same md5.

The staged file is renamed to the first entry with its md5. All others get a copy, made from the staged file
or from a live file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from airflow_mdbackup.scheme.backup.plan import Plan
from airflow_mdbackup.scheme.backup.results import Result, results
from airflow_mdbackup.scheme.common.bloom import BloomFilter
from airflow_mdbackup.scheme.files.content import copy_of
from airflow_mdbackup.scheme.files.syscalls import concerns_one_file, make_directory, open_for_owner
from airflow_mdbackup.scheme.files.tree import Tree
from airflow_mdbackup.scheme.history.apply import STAGING
from airflow_mdbackup.scheme.index.canonical import read_entries
from airflow_mdbackup.scheme.store.run import Run
from airflow_mdbackup.scheme.store.staging import Staging

_MAX_SOURCES = 3  # live files to try as a source of missing content


class CannotCommit(Exception):
    """An entry cannot be brought into the mirror. The message says why and what to do."""


class CommitContent:
    """Provides the content of the entries that a run commits.

    :param index: the consumer index as it is, in canonical form; None if there is none.
    """

    def __init__(self, run: Run, plan: Plan, tree: Tree, staging: Staging, index: Path | None) -> None:
        self._run = run
        self._plan = plan
        self._tree = tree
        self._staging = staging
        self._index = index
        self._copies = 0
        self._used = BloomFilter(plan.pull)  # md5s whose staged file goes to one entry
        self._live: dict[bytes, list[bytes]] | None = None

    def provide(self, result: Result) -> str:
        """Return where the new bytes are, after making a copy of them if necessary.

        :raises CannotCommit: they are nowhere.
        """
        if self.use_staged(result):
            return STAGING
        make_directory(self._run.copies)
        name = str(self._copies)
        self._copies += 1
        target = open_for_owner(self._run.copies / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            for source in self._sources(result.md5):
                try:
                    if copy_of(source, target) == result.md5:
                        return name
                finally:
                    os.close(source)
        finally:
            os.close(target)
        raise CannotCommit("its content is no longer in staging; the next run pulls it again")

    def use_staged(self, result: Result) -> bool:
        """Whether the staged file itself goes to this entry, as the first one with its md5.

        A file that the result does not vouch for is hashed first.
        """
        if self._used.seen_before(result.md5):
            return False
        return self._staging.holds(result.md5, result.inode, result.changed) or self._is_staged(result.md5)

    def _is_staged(self, md5: bytes) -> bool:
        """Whether the staged file has this content, by hashing it."""
        try:
            return self._staging.is_whole(md5, md5)
        except OSError as error:
            if not concerns_one_file(error):
                raise
            return False

    def _sources(self, md5: bytes) -> Iterator[int]:
        """Yield descriptors of files that should have these bytes: the staged one, then live ones."""
        yield from _if_readable(self._staging.open, md5)
        if self._live is None:
            self._live = self._find_live()
        for path in self._live.get(md5, ()):
            yield from _if_readable(self._tree.open, path)

    def _find_live(self) -> dict[bytes, list[bytes]]:
        """Return, for all content that is missing in staging, the live files that should have it."""
        missing: dict[bytes, list[bytes]] = {}
        for result in results(self._run, self._plan):
            if result.md5 not in missing and not self._staging.has(result.md5):
                missing[result.md5] = []
        for entry in read_entries(self._index) if self._index else ():
            paths = missing.get(entry.md5)
            if paths is not None and len(paths) < _MAX_SOURCES:
                paths.append(entry.path)
        return missing


def _if_readable(opener: Callable[[bytes], int], name: bytes) -> Iterator[int]:
    """Yield a descriptor of a file, if it can be opened."""
    try:
        descriptor = opener(name)
    except OSError as error:
        if not concerns_one_file(error):
            raise
        return
    yield descriptor
