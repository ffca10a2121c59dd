"""What the last finished run knows about files whose entries an operator removed from the index before it.

The next run copies the file of such an entry again, unless the provider no longer has it. In that case no
run ever does, and no history says so, because nothing changed on this side. The provider's index as that run
fetched it shows it, as long as the directory of the run exists.
"""

from __future__ import annotations

from functools import cached_property

from airflow_mdbackup.scheme.common.sorted_paths import SortedLookup
from airflow_mdbackup.scheme.errors import DestinationRefused
from airflow_mdbackup.scheme.files.jsonl import read_header
from airflow_mdbackup.scheme.history.replay import FileVersion
from airflow_mdbackup.scheme.index.canonical import Entry, digest, read_entries
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.version_names import stamp_of_file


class LastRun:
    """The last finished run, if its directory still exists. Ask about contents in path order."""

    def __init__(self, mirror: Mirror) -> None:
        self._run = mirror.last_finished()

    @cached_property
    def fetched(self) -> str:
        """When it fetched the provider's index, as a stamp; empty if there is no such run."""
        return "" if self._run is None else stamp_of_file(self._run.state)

    def lists(self, content: FileVersion) -> bool | None:
        """Whether the provider's index of that run has the path.

        None if not known, or if the path left our index only after that run had fetched the provider's.
        """
        if not content.left or content.left >= self.fetched or self._entries is None:
            return None
        return self._entries.find(content.path) is not None

    @cached_property
    def _entries(self) -> SortedLookup[Entry] | None:
        """The provider's index; None if it is not unchanged since it was fetched."""
        if self._run is None:
            return None
        try:
            is_unchanged = digest(self._run.index) == read_header(self._run.state)["index"]["digest"]
        except (OSError, KeyError, DestinationRefused):
            return None
        return SortedLookup(read_entries(self._run.index)) if is_unchanged else None
