"""The outcome of each item of a plan, as records on the disk."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from operator import attrgetter

from airflow_mdbackup.scheme.backup.plan import Plan
from airflow_mdbackup.scheme.files.jsonl import Record, read_header, read_records
from airflow_mdbackup.scheme.store.run import Run

MAX_NAMED = 20  # paths that a summary, or an error, names


def results(run: Run, plan: Plan) -> Iterator[Result]:
    """Yield the results of all finished shards of a plan, in path order."""
    finished = [read_records(run.results(shard), Result) for shard in finished_shards(run, plan)]
    return heapq.merge(*finished, key=attrgetter("path"))


def finished_shards(run: Run, plan: Plan) -> list[int]:
    """Return the shards of a plan that have written results."""
    return [
        shard
        for shard, path in enumerate(map(run.results, range(len(plan.shards))))
        if path.exists() and read_header(path)["plan"] == plan.digest
    ]


class Result(Record, frozen=True):
    """The outcome of one item.

    :ivar inode: of the adopted live file, with ``modified``, its mtime in nanoseconds; or of the staged file,
        with ``changed``, its ctime in nanoseconds.
    """

    path: bytes
    md5: bytes
    replaces: bytes | None
    outcome: str
    size: int | None = None
    mtime: int | None = None
    mode: int | None = None
    inode: int | None = None
    modified: int | None = None
    changed: int | None = None
    detail: str | None = None
