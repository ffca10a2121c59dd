"""A commit that is cut off, and hands on the index meanwhile."""

from __future__ import annotations

from collections.abc import Iterator

from airflow_mdbackup.scheme.history.changes import pending
from airflow_mdbackup.scheme.history.journal import recover
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.run import Run
from tests.guarantees.crash.crash import crashes
from tests.pair import Pair


def drop_entries(pair: Pair, *names: str) -> None:
    """Edit the consumer index as somebody might by hand: their files stay, but it knows nothing of them."""
    lines = pair.mirror.index.read_bytes().splitlines(keepends=True)
    paths = [pair.path(name) for name in names]
    kept = [line for line in lines if line[34:-1] not in paths]
    kept[-1] = kept[-1].replace(b"files=%d" % (len(lines) - 1), b"files=%d" % (len(kept) - 1))
    pair.mirror.index.write_bytes(b"".join(kept))


def settle(mirror: Mirror) -> None:
    with mirror.lock("a test"):
        recover(mirror, mirror.dest / ".mdbackup" / "consumer.md5")


def cut_off_commits(pair: Pair, run: Run) -> Iterator[None]:
    """Let the commit of ``run`` be cut off at each step that leaves its history written ahead."""
    for crashed in crashes(pair, lambda: pair.commit(pair.mirror.run(run.run_id))):
        if crashed and any(pending(pair.mirror)):
            yield
