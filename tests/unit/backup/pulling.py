"""What tests of pulling share: files to pull, and what must be here then."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from airflow_mdbackup.scheme.backup.pull import pull
from airflow_mdbackup.scheme.backup.results import Result
from airflow_mdbackup.scheme.files.jsonl import read_records
from airflow_mdbackup.scheme.store.run import Run
from airflow_mdbackup.scheme.transfer.sftp import Reader
from tests.pair import Pair, ServerProcess

SIZE = 300_000  # as large as files are that can be taken up in the middle


def plan_files(pair: Pair, files: int = 20, size: int = SIZE) -> Run:
    """Put files on A and plan to pull them all."""
    for number in range(files):
        pair.put(f"{number:02}", b"%05d" % number * (size // 5))
    pair.build_index()
    run = pair.new_run()
    pair.fetch(run)
    pair.plan = pair.diff(run)
    return run


def results(run: Run) -> list[Result]:
    return list(read_records(run.results(0), Result))


def pull_over(pair: Pair, run: Run, channel: Callable[[Any], Any]) -> None:
    """Pull with a channel around the real one."""

    def connect() -> Reader:
        server = ServerProcess()
        pair.servers.append(server)
        return Reader(channel(server.channel))

    pull(pair.mirror, run, 0, connect)


def staged(pair: Pair) -> set[str]:
    return {path.name for path in pair.mirror.staging.iterdir() if path.suffix != ".part"}


def check_whole(pair: Pair) -> None:
    """Make sure that B has what A has, and that nothing is left in staging."""
    assert pair.index_b() == pair.index_a()
    for path, digest in pair.index_a().items():
        live = Path(os.fsdecode(os.fsencode(pair.mirror.files) + path))
        assert hashlib.md5(live.read_bytes()).hexdigest().encode() == digest
    assert list(pair.mirror.staging.iterdir()) == []
