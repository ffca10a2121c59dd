"""Which files changed on the provider while they were pulled, in how many runs in a row.

A file that never holds still is worth a person's look, though one run's warning is not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from airflow_mdbackup.scheme.mirror import Mirror, Run
from airflow_mdbackup.scheme.ordered import Alongside
from airflow_mdbackup.scheme.records import Record, RecordWriter, read_header, read_records

_RUNS = 3  # in a row in which a file may change


class Changing(Record, frozen=True):
    """A file, and how many runs in a row it has changed."""

    path: bytes
    runs: int


class Patience:
    """Counts on for one run, given its changed files in path order. A context manager."""

    def __init__(self, mirror: Mirror, run: Run) -> None:
        self._path = mirror.changing
        self._step = 1
        earlier: Iterable[Changing] = ()
        if self._path.exists():
            self._step = 0 if read_header(self._path)["run_id"] == run.run_id else 1
            earlier = read_records(self._path, Changing)
        self._earlier = Alongside(earlier)
        self._writer = RecordWriter[Changing](self._path, run_id=run.run_id)

    def __enter__(self) -> Patience:
        return self

    def wears_out(self, path: bytes) -> bool:
        """Note that ``path`` changed in this run too, and return whether that is once too often."""
        earlier = self._earlier.find(path)
        runs = max(1, earlier.runs + self._step) if earlier is not None else 1
        self._writer.add(Changing(path, runs))
        return runs >= _RUNS

    def __exit__(self, *error: Any) -> None:
        self._writer.__exit__(*error)
