"""A DAG made of the operators by hand: a backup that another step follows."""

from datetime import timedelta

from airflow.providers.standard.operators.bash import BashOperator
from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG, TriggerRule

from airflow_mdbackup.assets import provider_asset
from airflow_mdbackup.operators import (
    RETRY_POLICY,
    ArchiveOld,
    BuildProviderIndex,
    CommitBackup,
    DiffIndexes,
    FetchIndex,
    PullChanged,
)

BACKUP = {"provider": "srv1", "dest": "/srv/backups/srv1"}
SOURCE = ["/backups"]
ASSET = provider_asset("srv1")

with DAG(
    dag_id="backup_srv1_by_hand",
    schedule=None,
    default_args={"retries": 2, "retry_delay": timedelta(minutes=5), "retry_policy": RETRY_POLICY},
) as dag:
    build = BuildProviderIndex(
        task_id="build_provider_index",
        provider="srv1",
        ssh_conn_id="srv1_index",
        chroot="/home/backupop",
        source=SOURCE,
    )
    fetch = FetchIndex(
        task_id="fetch_index", **BACKUP, sftp_conn_id="srv1_backupop", built=build.output, inlets=[ASSET]
    )
    diff = DiffIndexes(task_id="diff_indexes", **BACKUP, source=SOURCE, exclude=["*.tmp"], shards=4)
    pull = PullChanged.partial(
        task_id="pull_changed", **BACKUP, sftp_conn_id="srv1_backupop", source=SOURCE
    ).expand(shard=diff.output)
    finished = EmptyOperator(task_id="shards_finished", trigger_rule=TriggerRule.ALL_DONE)
    archive = ArchiveOld(task_id="archive_old", **BACKUP)
    commit = CommitBackup(task_id="commit_backup", **BACKUP, outlets=[ASSET])
    report = BashOperator(task_id="report", bash_command="df -h /srv/backups")

    build >> fetch >> diff >> pull >> finished
    [diff, finished] >> archive >> commit >> report
