"""When tests judge the age of backups, and by what status."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from airflow_mdbackup.scheme.files.jsonl import write_state
from airflow_mdbackup.scheme.store.mirror import Mirror

HOUR = timedelta(hours=1)
NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


def set_up(dest: Path, **status: Any) -> Mirror:
    """Make a destination whose status is as given, or has not been written yet."""
    mirror = Mirror(dest, "web")
    mirror.claim()
    if status:
        write_state(mirror.status, {"provider": "web", "order": "1", **status})
    return mirror
