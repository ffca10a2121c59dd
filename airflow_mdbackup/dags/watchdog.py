"""The DAG that sees to it that backups do not just stay away.

A task per provider, under the provider's name, so that its history stays its own when others come and go;
and one for the configuration as a whole. It is in a file of its own, so that it lives when that of the
backups does not.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

from airflow.sdk import DAG

from airflow_mdbackup.alerts.callbacks import failure_callbacks
from airflow_mdbackup.assets import provider_asset
from airflow_mdbackup.config import load, providers_file
from airflow_mdbackup.config.provider import is_name
from airflow_mdbackup.operators.watch_backup import WatchBackup, WatchConfiguration

WATCHDOG = "mdbackup_watchdog"
CONFIGURATION = "Configuration"  # no provider's name has a capital letter
_DOC = """# The watch over all backups

Every hour, the task of each provider whose last good backup is older than its `max_age` fails, and says so
by the provider's `alerts`: at once, and then once a day. This reads what Airflow remembers of the backups.
What it cannot see is its own death: let `mdbackup status` run outside of Airflow, too.
"""


def watchdog_dag(path: Path | None = None) -> DAG:
    """Return the DAG that watches all providers. Never raises for what the configuration says.

    :param path: the configuration; by default what Airflow's options name.
    """
    configuration = load(providers_file() if path is None else path)
    with DAG(
        dag_id=WATCHDOG,
        description="Fail, and tell, when a backup is older than it may be",
        doc_md=_DOC,
        schedule="@hourly",
        start_date=datetime(2020, 1, 1),
        catchup=False,
        max_active_runs=1,
        max_active_tasks=4,  # of a hundred providers, others shall not wait for this
        is_paused_upon_creation=False,
        tags={"mdbackup"},
        # A verdict fails at once; what is tried again is a watch that could not look.
        default_args={"retries": 1, "retry_delay": timedelta(minutes=1)},
    ) as dag:
        WatchConfiguration(
            task_id=CONFIGURATION, problems=[str(problem) for problem in configuration.problems]
        )
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
    return dag
