"""``status.json``: the last good run, the last commit, and the disk usage, for monitoring."""

from __future__ import annotations

import logging
from typing import Any

from airflow_mdbackup.scheme.files.jsonl import CorruptFile, write_state
from airflow_mdbackup.scheme.history.usage import totals_state
from airflow_mdbackup.scheme.index.canonical import count_entries
from airflow_mdbackup.scheme.store.mirror import Mirror

log = logging.getLogger(__name__)


def status_or_lost(mirror: Mirror) -> dict[str, Any]:
    """Return the status as the last run left it; empty, with a warning, if the file is corrupted."""
    try:
        return mirror.read_status()
    except CorruptFile as error:
        log.warning("%s. It is ignored; the last good run is not known until the next one", error)
        return {}


def refresh_status(mirror: Mirror) -> None:
    """Update file count and disk usage in the status, if there is one. Needs the lock.

    A failure to write it is only a warning: the commit itself is done.
    """
    status = status_or_lost(mirror)
    if not status:
        return
    try:
        if mirror.committed.exists():
            status["files"] = count_entries(mirror.committed)
        write_state(mirror.status, {**status, **totals_state(mirror, status)})
    except OSError as error:
        log.warning("%s was not updated after this commit: %s", mirror.status, error)
