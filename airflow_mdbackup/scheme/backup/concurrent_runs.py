"""What other runs have committed since a plan was made.

In a backfill all runs may be planned before the first one is committed. What that one brings need not come
again.
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
    """What is committed by now.

    :ivar stamp: of the last commit.
    :ivar consumer: the consumer index as of then, in canonical form; None if the plan knows it.
    """

    stamp: str
    consumer: Path | None


def committed_since(mirror: Mirror, run: Run, shard: int, plan: Plan) -> CommittedByOthers:
    """Return what other runs have committed since the plan was made.

    :param shard: the one that asks, whose lock the caller holds.
    :raises ConsumerIndexDamaged, DestinationBusy: see :func:`.consumer_index`, :meth:`.Mirror.lock`.
    """
    if mirror.last_commit() == plan.committed:
        return CommittedByOthers(plan.committed, None)
    copy = run.consumer(shard)
    with mirror.lock(f"pull_changed of {run.run_id}"):
        index = consumer_index(mirror, copy)
        if index == mirror.index:
            # Read until the end of the pull, without the lock, whatever hands do to it meanwhile.
            shutil.copyfile(index, copy)
        return CommittedByOthers(mirror.last_commit(), copy if index else None)


class ContentOfOthers:
    """Tells of the items of one shard, in path order, which of them an index has by now.

    :param committed: what :func:`committed_since` returned.
    """

    def __init__(self, committed: CommittedByOthers) -> None:
        self._entries = SortedLookup(read_entries(committed.consumer) if committed.consumer else ())

    def has(self, item: PlanItem) -> bool:
        """Whether another run has brought ``item``."""
        entry = self._entries.find(item.path)
        return entry is not None and entry.md5 == item.md5
