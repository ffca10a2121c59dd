"""TODO"""

from __future__ import annotations

import logging
from typing import Any

from airflow_mdbackup.scheme.files.jsonl import CorruptFile, write_state
from airflow_mdbackup.scheme.history.usage import totals_state
from airflow_mdbackup.scheme.index.canonical import count_entries
from airflow_mdbackup.scheme.store.mirror import Mirror

log = logging.getLogger(__name__)


def status_or_lost(mirror: Mirror) -> dict[str, Any]:
    """Return the status as the last run left it. One that is spoilt is no reason to do nothing."""
    try:
        return mirror.read_status()
    except CorruptFile as error:
        log.warning("%s. When the last good run was is not known until the next one", error)
        return {}


def refresh_status(mirror: Mirror) -> None:
    """Have the status tell what index and disk hold since the last commit; if there is one. Needs the lock.

    That is no reason for anything to fail which is committed by then.
    """
    status = status_or_lost(mirror)
    if not status:
        return
    try:
        if mirror.committed.exists():
            status["files"] = count_entries(mirror.committed)
        write_state(mirror.status, {**status, **totals_state(mirror, status)})
    except OSError as error:
        log.warning("%s is as it was before this commit: %s", mirror.status, error)
