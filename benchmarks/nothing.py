"""A DAG file: a DAG of the shape of a provider's, whose tasks do nothing. See `benchmarks.overhead`.

It has the tasks, the dependencies, the trigger rules and the retries of `airflow_mdbackup.dags.backup`, and
imports nothing of it.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG, BaseOperator, TriggerRule


class Nothing(BaseOperator):
    """Return what it was given."""

    def __init__(self, *, result: Any = None, shard: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.result = result
        self.shard = shard

    def execute(self, context: Any) -> Any:
        return self.result


with DAG(
    dag_id="nothing",
    schedule=None,
    start_date=datetime(2020, 1, 1),
    max_active_runs=1,
    default_args={"retries": 1, "retry_delay": timedelta(seconds=5), "max_active_tis_per_dag": 1},
):
    build = Nothing(task_id="build_provider_index")
    fetch = Nothing(task_id="fetch_index")
    diff = Nothing(task_id="diff_indexes", result=[{"shard": 0, "files": 0}])
    pull = Nothing.partial(task_id="pull_changed").expand(shard=diff.output)
    finished = EmptyOperator(task_id="shards_finished", trigger_rule=TriggerRule.ALL_DONE)
    archive = Nothing(task_id="archive_old")
    commit = Nothing(task_id="commit_backup")
    build >> fetch >> diff >> pull >> finished
    [diff, finished] >> archive >> commit
