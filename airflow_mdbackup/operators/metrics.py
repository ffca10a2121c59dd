"""Record backups in Airflow's metrics (StatsD, OpenTelemetry); docs/monitoring.md has the names."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from airflow.providers.common.compat.sdk import Stats

if TYPE_CHECKING:
    from airflow_mdbackup.scheme.backup.commit_summary import CommitSummary
    from airflow_mdbackup.scheme.backup.pull_progress import PullSummary


def record_pull(provider: str, summary: PullSummary) -> None:
    """Record the pull of one shard."""
    Stats.incr(f"mdbackup.{provider}.transferred", summary.transferred, tags={"provider": provider})
    Stats.timing(f"mdbackup.{provider}.pull", summary.seconds * 1000, tags={"provider": provider})


def record_commit(provider: str, summary: CommitSummary) -> None:
    """Record a commit, good or not."""
    tags = {"provider": provider}
    for outcome, count in summary.outcomes.items():
        Stats.incr(f"mdbackup.{provider}.entries.{outcome}", count, tags=tags)
    Stats.incr(f"mdbackup.{provider}.placed", summary.size, tags=tags)
    Stats.timing(f"mdbackup.{provider}.commit", summary.seconds * 1000, tags=tags)
    Stats.gauge(f"mdbackup.{provider}.files", summary.files, tags=tags)
    Stats.gauge(f"mdbackup.{provider}.failed", summary.failed, tags=tags)
    if not (summary.failed or summary.superseded or summary.partial):
        Stats.gauge(f"mdbackup.{provider}.last_good", int(time.time()), tags=tags)
