"""What the run that was finished last knows of files that a person took out of the index before it began.

Such an entry waits for the next run, which copies its file again; unless the provider has it no more. Then
no run does, nor does any history tell, for nothing has changed here. The provider's index as that run fetched
it does, for as long as the run's directory stays.
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
    """The run that was finished last, if it is still known. Asked of contents in path order."""

    def __init__(self, mirror: Mirror) -> None:
        self._run = mirror.last_finished()

    @cached_property
    def fetched(self) -> str:
        """When it fetched the provider's index, as a stamp; empty if there is no such run."""
        return "" if self._run is None else stamp_of_file(self._run.state)

    def lists(self, content: FileVersion) -> bool | None:
        """Whether the provider's index of that run has a path.

        None if that is not known, or the path left our index only since the run fetched the provider's.
        """
        if not content.left or content.left >= self.fetched or self._entries is None:
            return None
        return self._entries.find(content.path) is not None

    @cached_property
    def _entries(self) -> SortedLookup[Entry] | None:
        """The provider's index; None if it is no longer what was fetched."""
        if self._run is None:
            return None
        try:
            is_whole = digest(self._run.index) == read_header(self._run.state)["index"]["digest"]
        except (OSError, KeyError, DestinationRefused):
            return None
        return SortedLookup(read_entries(self._run.index)) if is_whole else None
