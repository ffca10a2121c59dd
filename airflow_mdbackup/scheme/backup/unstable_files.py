"""Which files changed on the provider while they were pulled, in how many runs in a row.

A file that never holds still is worth a person's look, though one run's warning is not. Runs that had the
same provider index count as one: what changed once after that was built, all of them find changed. A run that
did not come to a file, since it was limited to others or was cut off, says nothing of it.
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

_RUNS = 3  # in a row in which a file may change


class UnstableFile(Record, frozen=True):
    """A file that changed, in how many runs in a row, and the last of them.

    :ivar index: digest and time of the provider index of that run.
    """

    path: bytes
    runs: int
    run_id: str = ""
    index: str = ""


class UnstableFiles:
    """Counts on for one run, told of its entries in path order. A context manager.

    :param judged_all: whether an entry of which it is not told held still.
    """

    def __init__(self, mirror: Mirror, run: Run, judged_all: bool) -> None:
        index = read_header(run.state)["index"]
        self._path = mirror.changing
        self._now = {"run_id": run.run_id, "index": f"{index['digest']} {index['time']}"}
        self._judged_all = judged_all
        self._earlier = self._records()
        self._next = next(self._earlier, None)
        self._writer = RecordWriter[UnstableFile](self._path)

    def __enter__(self) -> UnstableFiles:
        return self

    def _records(self) -> Iterator[UnstableFile]:
        """Yield what earlier runs counted, as far as it can be read."""
        if not self._path.exists():
            return
        try:
            yield from read_records(self._path, UnstableFile)
        except CorruptFile as error:
            log.warning("Which files changed in earlier runs is not known: %s", error)

    def gives_up_on(self, path: bytes, outcome: Outcome) -> bool:
        """Note what became of an entry, and return whether it changed once too often."""
        self._pass_by(path)
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
        return runs >= _RUNS

    def _pass_by(self, path: bytes | None) -> None:
        """Go on to ``path``, or to the end, past entries of which this run says nothing."""
        while self._next is not None and (path is None or self._next.path < path):
            if not self._judged_all:
                self._writer.add(self._next)
            self._next = next(self._earlier, None)

    def __exit__(self, kind: Any, *error: Any) -> None:
        if kind is None:
            self._pass_by(None)
        self._writer.__exit__(kind, *error)
