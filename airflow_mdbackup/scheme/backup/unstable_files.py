"""Counts the runs in a row in which a file changed on the provider while it was pulled.

One run's warning needs no attention, but a file that changes every time does. Runs with the same provider
index count as one: if a file changed once after that was built, all of them find it changed. A run that did
not reach a file, because it was limited to others or was cut off, does not count.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from airflow_mdbackup.scheme.files.jsonl import CorruptFile, Record, RecordWriter, read_header, read_records
from airflow_mdbackup.scheme.history.outcomes import Outcome
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.run import Run

log = logging.getLogger(__name__)

_MAX_RUNS = 3  # in a row, after which a changing file is a failure


class UnstableFile(Record, frozen=True):
    """A file that changed.

    :ivar runs: how many runs in a row.
    :ivar run_id: the last of them.
    :ivar index: digest and time of its provider index.
    """

    path: bytes
    runs: int
    run_id: str = ""
    index: str = ""


class UnstableFiles:
    """Updates the counts by the entries of one run, in path order. A context manager.

    :param is_complete: whether a file that is not among them did not change.
    """

    def __init__(self, mirror: Mirror, run: Run, is_complete: bool) -> None:
        index = read_header(run.state)["index"]
        self._path = mirror.changing
        self._now = {"run_id": run.run_id, "index": f"{index['digest']} {index['time']}"}
        self._is_complete = is_complete
        self._earlier = self._records()
        self._next = next(self._earlier, None)
        self._writer = RecordWriter[UnstableFile](self._path)

    def __enter__(self) -> UnstableFiles:
        return self

    def _records(self) -> Iterator[UnstableFile]:
        """Yield the counts of earlier runs, as far as they can be read."""
        if not self._path.exists():
            return
        try:
            yield from read_records(self._path, UnstableFile)
        except CorruptFile as error:
            log.warning("It is unknown which files changed in earlier runs: %s", error)

    def update(self, path: bytes, outcome: Outcome) -> bool:
        """Count the outcome of an entry, and return whether it changed in too many runs."""
        self._advance(path)
        earlier = None
        if self._next is not None and self._next.path == path:
            earlier, self._next = self._next, next(self._earlier, None)
        if outcome != Outcome.CHANGED:
            if earlier is not None and outcome.failure:
                self._writer.add(earlier)
            return False
        counted = earlier is not None and (
            earlier.run_id == self._now["run_id"] or earlier.index == self._now["index"]
        )
        runs = (earlier.runs if earlier is not None else 0) + (not counted)
        self._writer.add(UnstableFile(path, runs, **self._now))
        return runs >= _MAX_RUNS

    def _advance(self, path: bytes | None) -> None:
        """Advance to ``path``, or to the end, past entries that this run did not report."""
        while self._next is not None and (path is None or self._next.path < path):
            if not self._is_complete:
                self._writer.add(self._next)
            self._next = next(self._earlier, None)

    def __exit__(self, kind: Any, *error: Any) -> None:
        if kind is None:
            self._advance(None)
        self._writer.__exit__(kind, *error)
