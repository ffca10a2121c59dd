"""A small disk for a backup, and what its runs ask the provider for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from airflow_mdbackup.scheme.store.run import Run
from airflow_mdbackup.scheme.transfer.sftp import Reader
from tests.pair import Pair, ServerProcess
from tests.unit.backup.small_disk import Disk, Patient, Watched


@pytest.fixture
def disk(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk(pair.mirror.dest, monkeypatch)
    yield disk
    disk.unmount()


@pytest.fixture
def asked(pair: Pair) -> Counter[int]:
    """The requests that the provider got from the shards since the plan was made."""
    counts: Counter[int] = Counter()
    fetch, connect = pair.fetch, pair.connect

    def watched() -> Reader:
        server = ServerProcess()
        pair.servers.append(server)
        return Patient(Watched(server.channel, counts))

    def plain_fetch(run: Run, **options: object) -> object:
        pair.connect = connect  # type: ignore[method-assign]
        try:
            return fetch(run, **options)
        finally:
            pair.connect = watched  # type: ignore[method-assign]

    pair.fetch = plain_fetch  # type: ignore[method-assign, assignment]
    return counts
