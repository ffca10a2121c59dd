"""What other runs have committed since a plan was made.

In a backfill all runs may be planned before the first one is committed. What that run has pulled need not be
pulled again.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from airflow_mdbackup.scheme.backup.plan import Plan, PlanItem
from airflow_mdbackup.scheme.common.sorted_paths import SortedLookup
from airflow_mdbackup.scheme.history.consumer_index import consumer_index
from airflow_mdbackup.scheme.index.canonical import read_entries
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.run import Run


class CommittedByOthers(NamedTuple):
    """The state of the mirror now.

    :ivar stamp: of the last commit.
    :ivar consumer: the consumer index as of then, in canonical form; None if nothing
        was committed since the plan.
    """

    stamp: str
    consumer: Path | None


def committed_since(mirror: Mirror, run: Run, shard: int, plan: Plan) -> CommittedByOthers:
    """Return what other runs have committed since the plan was made.

    :param shard: of the caller, who holds its lock.
    :raises ConsumerIndexDamaged, DestinationBusy: see :func:`.consumer_index`, :meth:`.Mirror.lock`.
    """
    if mirror.last_commit() == plan.committed:
        return CommittedByOthers(plan.committed, None)
    copy = run.consumer(shard)
    with mirror.lock(f"pull_changed of {run.run_id}"):
        index = consumer_index(mirror, copy)
        if index == mirror.index:
            # The copy is read during the pull, without the lock, while the original may be edited by hand.
            shutil.copyfile(index, copy)
        return CommittedByOthers(mirror.last_commit(), copy if index else None)


class ContentOfOthers:
    """Looks up which items of one shard, in path order, have been committed by other runs.

    :param committed: what :func:`committed_since` returned.
    """

    def __init__(self, committed: CommittedByOthers) -> None:
        self._entries = SortedLookup(read_entries(committed.consumer) if committed.consumer else ())

    def has(self, item: PlanItem) -> bool:
        """Whether another run has committed ``item``."""
        entry = self._entries.find(item.path)
        return entry is not None and entry.md5 == item.md5
