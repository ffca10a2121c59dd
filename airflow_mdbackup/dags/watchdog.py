"""The DAG that notices when backups stop.

It has a task for each provider, named after it, so that other providers do not affect the task's history; and
one for the configuration as a whole. Its DAG file is separate, so that it loads even if that of the backups
does not.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

from airflow.sdk import DAG

from airflow_mdbackup.alerts.callbacks import failure_callbacks
from airflow_mdbackup.assets import provider_asset
from airflow_mdbackup.config import Configuration, load, providers_file
from airflow_mdbackup.config.provider import is_name
from airflow_mdbackup.operators.watch_backup import WatchBackup, WatchConfiguration

WATCHDOG = "mdbackup_watchdog"
CONFIGURATION = "Configuration"  # no provider's name has a capital letter
_DOC = """# The watch over all backups

Every hour, the task of each provider whose last good backup is older than its `max_age` fails, and reports it
by the provider's `alerts`: at once, and then once a day. It reads what Airflow recorded about the backups. It
cannot notice that Airflow itself is down: run `mdbackup status` outside of Airflow, too.
"""


def watchdog_dag(path: Path | None = None) -> DAG:
    """Return the DAG that watches all providers. Whatever the configuration contains, this does not raise.

    :param path: the configuration; by default the one that Airflow's options name.
    """
    configuration = load(providers_file() if path is None else path)
    with DAG(
        dag_id=WATCHDOG,
        description="Fail and alert when a backup is older than its max_age",
        doc_md=_DOC,
        schedule="@hourly",
        start_date=datetime(2020, 1, 1),
        catchup=False,
        max_active_runs=1,
        max_active_tasks=4,  # a hundred providers must not block other DAGs
        is_paused_upon_creation=False,
        tags={"mdbackup"},
        # Stale backups fail at once; the retry is for a check that could not run.
        default_args={"retries": 1, "retry_delay": timedelta(minutes=1)},
    ) as dag:
        _add_tasks(configuration)
    return dag


def _add_tasks(configuration: Configuration) -> None:
    WatchConfiguration(task_id=CONFIGURATION, problems=[str(problem) for problem in configuration.problems])
    for provider in configuration.providers:
        WatchBackup(
            task_id=provider.name,
            provider=provider.name,
            max_age=provider.max_age,
            inlets=[provider_asset(provider.name)],
            on_failure_callback=failure_callbacks(provider).get("on_failure_callback"),
        )
    for name, problems in configuration.refused.items():
        if is_name(name):
            WatchBackup(
                task_id=name,
                provider=name,
                max_age=None,
                problems=[str(problem) for problem in problems],
                inlets=[provider_asset(name)],
            )
