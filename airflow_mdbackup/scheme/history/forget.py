"""Removes entries from the consumer index so that their files are fetched again.

The files stay. The next run compares each with the provider's index: it adopts a file that is correct, and
pulls any other, whose old bytes become a version.

Source: the seed's section "Index Files", which does this with the whole index only.
"""

from __future__ import annotations

from collections.abc import Callable

from airflow_mdbackup.scheme.files.jsonl import Record
from airflow_mdbackup.scheme.history.changes import FORGET, Change, ChangeKind
from airflow_mdbackup.scheme.history.journal import transaction
from airflow_mdbackup.scheme.history.status_file import refresh_status
from airflow_mdbackup.scheme.index.canonical import Entry, read_entries
from airflow_mdbackup.scheme.store.locks import OPERATOR_WAIT
from airflow_mdbackup.scheme.store.mirror import Mirror


class ForgottenEntry(Record, frozen=True):
    """An entry that is removed from the consumer index. Its file stays."""

    path: bytes
    md5: bytes


def forget(mirror: Mirror, wanted: Callable[[bytes], bool]) -> list[bytes]:
    """Remove entries from the consumer index, and return their paths.

    :param wanted: says for a path whether its entry is removed.
    :raises ConsumerIndexDamaged: the consumer index is damaged.
    :raises DestinationBusy: a run holds the lock for too long.
    :raises DestinationFull, DestinationRefused, DestinationBroken, WorkerExhausted: see
        :meth:`.Mirror.translate_os_errors`.
    """
    return remove_entries(mirror, lambda entry: wanted(entry.path), FORGET, OPERATOR_WAIT)


def remove_entries(mirror: Mirror, wanted: Callable[[Entry], bool], who: str, wait: float) -> list[bytes]:
    """Remove entries from the consumer index, as :func:`forget` does, and return their paths.

    :param wanted: says for an entry whether it is removed. It is called under the lock.
    :param who: what removes them: for history, and for those who wait for the lock.
    :param wait: seconds to wait for the lock.
    """
    with mirror.translate_os_errors(), transaction(mirror, who, wait) as tx:
        if tx.index is None:
            return []
        gone = [entry for entry in read_entries(tx.index) if wanted(entry)]
        if gone:
            tx.write(Change(entry.path, ChangeKind.FORGOTTEN, old_md5=entry.md5) for entry in gone)
            tx.carry_out()
        refresh_status(mirror)
        return [entry.path for entry in gone]
