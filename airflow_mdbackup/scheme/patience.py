"""Which files changed on the provider while they were pulled, in how many runs in a row.

A file that never holds still is worth a person's look, though one run's warning is not. Runs that had the
same provider index count as one: what changed once after that was built, all of them find changed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from airflow_mdbackup.scheme.errors import DestinationRefused
from airflow_mdbackup.scheme.mirror import Mirror, Run
from airflow_mdbackup.scheme.ordered import Alongside
from airflow_mdbackup.scheme.records import Record, RecordWriter, read_header, read_records

log = logging.getLogger(__name__)

_RUNS = 3  # in a row in which a file may change


class Changing(Record, frozen=True):
    """A file, and how many runs in a row it has changed."""

    path: bytes
    runs: int


class Patience:
    """Counts on for one run, given its changed files in path order. A context manager."""

    def __init__(self, mirror: Mirror, run: Run) -> None:
        index = read_header(run.state)["index"]
        self._path = mirror.changing
        self._known = {"run_id": run.run_id, "index": [index["digest"], index["time"]]}
        self._step = 1
        self._earlier = Alongside(self._records())
        self._writer = RecordWriter[Changing](self._path, **self._known)

    def __enter__(self) -> Patience:
        return self

    def _records(self) -> Iterator[Changing]:
        """Yield what earlier runs counted, as far as it can be read."""
        if not self._path.exists():
            return
        try:
            before = read_header(self._path)
            if any(before.get(key) == value for key, value in self._known.items()):
                self._step = 0
            yield from read_records(self._path, Changing)
        except DestinationRefused as error:
            log.warning("Which files changed in earlier runs is not known: %s", error)

    def wears_out(self, path: bytes) -> bool:
        """Note that ``path`` changed in this run too, and return whether that is once too often."""
        earlier = self._earlier.find(path)
        runs = max(1, earlier.runs + self._step) if earlier is not None else 1
        self._writer.add(Changing(path, runs))
        return runs >= _RUNS

    def __exit__(self, *error: Any) -> None:
        self._writer.__exit__(*error)
