"""Entries leave the consumer index because a person wants their files to be copied again.

Their files stay. The next run compares each with the provider's index: it adopts a file that is as it should
be, and pulls another one, of which the old bytes become a version.

Source: the seed's section "Index Files", which knows of the whole index only.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

from airflow_mdbackup.scheme.history import FORGET, PENDING, Change, What, last, run_id_of
from airflow_mdbackup.scheme.index import Entry, digest, read_entries
from airflow_mdbackup.scheme.mirror import PERSON_WAIT, Mirror
from airflow_mdbackup.scheme.records import write_records
from airflow_mdbackup.scheme.settle import (
    consumer_index,
    finish,
    hand_edits,
    refresh_status,
    settle,
    status_or_lost,
)


def forget(mirror: Mirror, wanted: Callable[[bytes], bool]) -> list[bytes]:
    """Take entries out of the consumer index, and return their paths.

    :param wanted: tells of a path whether its entry is to go.
    :raises ConsumerIndexDamaged: somebody damaged the consumer index.
    :raises DestinationBusy: a run holds the lock for too long.
    :raises DestinationFull, DestinationRefused, DestinationBroken, WorkerExhausted: see
        :meth:`.Mirror.told_plainly`.
    """
    return take_out(mirror, lambda entry: wanted(entry.path), FORGET, PERSON_WAIT)


def take_out(mirror: Mirror, wanted: Callable[[Entry], bool], who: str, wait: float) -> list[bytes]:
    """Take entries out of the consumer index, as :func:`forget` does, and return their paths.

    :param wanted: tells of an entry whether it is to go. It is asked under the lock.
    :param who: what does it: in history, and told to those who wait meanwhile.
    :param wait: seconds that it may take to get the lock.
    """
    with mirror.told_plainly(), mirror.lock(who, wait):
        target = mirror.forgetting
        try:
            settle(mirror, target)
            current = consumer_index(mirror, target)
            if current is None:
                return []
            gone = [entry for entry in read_entries(current) if wanted(entry)]
            if gone:
                stamp = mirror.next_stamp()
                run_id = run_id_of(who, stamp)
                path = mirror.history_path(stamp, run_id)
                path = path.with_name(path.name + PENDING)
                # It is newer than no run's index: each entry is judged by itself.
                order = max(str(where.get("order", "")) for where in (status_or_lost(mirror), last(mirror)))
                write_records(
                    path,
                    chain(
                        hand_edits(mirror, current),
                        (Change(entry.path, What.FORGOTTEN, old_md5=entry.md5) for entry in gone),
                    ),
                    run_id=run_id,
                    provider=mirror.provider,
                    stamp=stamp,
                    at=mirror.now(),
                    order=order,
                    before=digest(mirror.index),
                )
                finish(mirror, path, current, fresh=True)
            refresh_status(mirror)
            return [entry.path for entry in gone]
        finally:
            target.unlink(missing_ok=True)
